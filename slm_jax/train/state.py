"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from slm_jax.mesh import tree_shardings
from slm_jax.models import forward
from slm_jax.models.config import ModelConfig


class TrainState(NamedTuple):
    """Parameters and optimizer state after `step` steps. Everything else follows from the step and the seed."""

    step: Int[Array, ""]
    params: forward.Params
    opt_state: Any


def new_state(params: forward.Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shapes(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """ShapeDtypeStructs with their shardings: what to allocate and what to restore into."""
    shapes = jax.eval_shape(lambda: new_state(forward.init_params(model, jax.random.key(0)), optimizer))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    params: forward.Params | None = None,
) -> TrainState:
    """A state at step 0, born sharded; from `params` where given, else random by `seed`."""
    shardings = jax.tree.map(lambda shape: shape.sharding, state_shapes(model, optimizer, mesh))
    if params is not None:
        return jax.jit(lambda p: new_state(p, optimizer), out_shardings=shardings)(params)

    def random_state(key: jax.Array) -> TrainState:
        return new_state(forward.init_params(model, key), optimizer)

    return jax.jit(random_state, out_shardings=shardings)(jax.random.key(seed))
