"""The pure train step, and the one jit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch
from slm_jax.models.config import ModelConfig
from slm_jax.models.forward import Params
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import batch_loss
from slm_jax.train.objective import Sums, trained_tokens
from slm_jax.train.state import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Sums]]


def make_step(
    model: ModelConfig,
    selection: Selection | None,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    micro_batches: int = 1,
    num_devices: int = 1,
) -> Step:
    """The step of a phase: state, global batch -> state, sums.

    The loss is the sum over trained tokens divided by their number in the global batch. With micro-batches a selection
    is still made over the whole batch: a first pass without gradient gives all losses (one forward more), the second
    takes gradients; sums travel between micro-batches, means never do.
    """

    def gradients_at_once(params: Params, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        def total(params: Params) -> tuple[jax.Array, Sums]:
            loss = batch_loss(params, model, batch)
            trained, sums = trained_tokens(selection, loss, batch, key, num_devices)
            return jnp.sum(jnp.where(trained, loss, 0.0)), sums

        return jax.grad(total, has_aux=True)(params)

    def gradients_in_parts(params: Params, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        parts = _split_rows(batch, micro_batches)
        losses = jax.lax.map(lambda part: batch_loss(params, model, part), parts)
        trained, sums = trained_tokens(selection, _join_rows(losses), batch, key, num_devices)

        def add(total: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, None]:
            rows, chosen = part
            gradient = jax.grad(lambda p: jnp.sum(jnp.where(chosen, batch_loss(p, model, rows), 0.0)))(params)
            return jax.tree.map(jnp.add, total, gradient), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (parts, _split_rows(trained, micro_batches)))[0], sums

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients = gradients_at_once if micro_batches == 1 else gradients_in_parts
        grads, sums = gradients(state.params, batch, key)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["trained_tokens"], 1.0), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = jnp.asarray(schedule(state.step + 1), jnp.float32)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        sums |= {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return TrainState(state.step + 1, params, opt_state), sums

    return step


def _split_rows(tree, parts: int):
    """[B, ...] to [parts, B / parts, ...]; part m takes rows m, m + parts, ...: every device keeps its share."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree)


def _join_rows(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def compile_step(step: Step, mesh: Mesh, state_shapes: TrainState) -> Step:
    """jit with the state's shardings pinned on both sides and its memory donated."""
    state_shardings = jax.tree.map(lambda shape: shape.sharding, state_shapes)
    return jax.jit(
        step,
        in_shardings=(state_shardings, mesh_lib.batch_sharding(mesh)),
        out_shardings=(state_shardings, jax.sharding.NamedSharding(mesh, mesh_lib.P())),
        donate_argnums=0,
    )
