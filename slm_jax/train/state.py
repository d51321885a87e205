"""The state that a training run carries from step to step, and the items of it that a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from slm_jax.mesh import sharded_shapes
from slm_jax.models import forward
from slm_jax.models.model_config import ModelConfig


class TrainState(NamedTuple):
    """Parameters and optimizer state after `step` steps. Everything else follows from the step and the seed.

    step: number of finished steps.
    params: float32, see models/forward.py.
    opt_state: of optax, without the learning rate: the moments.
    average: moving average of the parameters, if the run keeps one.
    start: parameters at the beginning of the phase, if it has l2_to_init. Checkpoints leave them out: the checkpoint at
      the phase boundary has them.
    history: `older` and `newer` parameters, if a selection of the run has a lagged history: those of the last two steps
      that are multiples of Selection.lag; both are the initial ones at first.
    """

    step: Int[Array, ""]
    params: forward.Params
    opt_state: Any
    average: forward.Params | None = None
    start: forward.Params | None = None
    history: dict[str, forward.Params] | None = None

    def items(self) -> dict[str, Any]:
        """The items of a checkpoint, all but `start`; `save` in loop.py adds model, vocabulary hash and counters."""
        items = {"params": self.params, "rest": {"opt_state": self.opt_state, "step": self.step}}
        items |= {"average": self.average} if self.average else {}
        return items | ({"history": self.history} if self.history else {})

    @classmethod
    def of(cls, items: dict[str, Any]) -> "TrainState":
        """The state whose `items` these are."""
        rest = items["rest"]
        return cls(rest["step"], items["params"], rest["opt_state"], items.get("average"), history=items.get("history"))


def new_state(
    params: forward.Params, optimizer: optax.GradientTransformation, ema: bool = False, lagged: bool = False
) -> TrainState:
    average = jax.tree.map(jnp.copy, params) if ema else None
    history = {name: jax.tree.map(jnp.copy, params) for name in ("older", "newer")} if lagged else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average, history=history)


def state_shapes(
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool = False, lagged: bool = False
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings, to allocate or restore into."""
    shapes = jax.eval_shape(lambda: new_state(forward.init_params(model, jax.random.key(0)), optimizer, ema, lagged))
    return sharded_shapes(shapes, mesh)


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    params: forward.Params | None = None,
    ema: bool = False,
    lagged: bool = False,
) -> TrainState:
    """A state at step 0, created sharded; from `params` if given, else random from `seed`."""
    shardings = jax.tree.map(lambda shape: shape.sharding, state_shapes(model, optimizer, mesh, ema, lagged))
    if params is not None:
        return jax.jit(lambda p: new_state(p, optimizer, ema, lagged), out_shardings=shardings)(params)

    def random_state(key: jax.Array) -> TrainState:
        return new_state(forward.init_params(model, key), optimizer, ema, lagged)

    return jax.jit(random_state, out_shardings=shardings)(jax.random.key(seed))
