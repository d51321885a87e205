"""The pure train step, and the one jit."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.selection import CombinedSelection, Selection, looks_ahead, row_capacity
from slm_jax.score.token_loss import batch_loss
from slm_jax.train import gradients
from slm_jax.train.objective import Sums, trained_tokens
from slm_jax.train.state import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Sums]]


def make_step(
    model: ModelConfig,
    selection: Selection | CombinedSelection | None,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    gradient_accumulation_steps: int = 1,
    *,
    keep_ratio: optax.Schedule | None = None,
    l2_to_init: float = 0.0,
    ema: float = 0.0,
) -> Step:
    """The step of a phase: state, global batch -> state, sums.

    schedule, keep_ratio: functions of t, the number of the step in the run counted from 1; keep_ratio stands in for
    selection.ratio. l2_to_init: see Phase; the state then carries the phase's first parameters. ema: see
    OptimizerConfig; the state then carries the average.

    The loss is the sum over trained tokens divided by their number in the global batch: sums travel between devices
    and micro-batches, means never do. Where tokens compete across micro-batches, a first pass without gradient gives
    all losses (one forward more, without dropout), and the second takes gradients of what was chosen.
    """
    two_passes = selection is not None and looks_ahead(selection)

    def gradients_of(params: Params, batch: Batch, key: jax.Array, ratio: jax.Array | None) -> tuple[Params, Sums]:
        gradient = _gradient(model, selection, batch.tokens.shape, gradient_accumulation_steps)

        def of_part(part: Batch, key: jax.Array) -> tuple[Params, Sums]:
            chosen = lambda loss: trained_tokens(selection, loss, part, key, ratio=ratio)  # noqa: E731
            return gradient(params, batch=part, choose=chosen, **dropout(key))

        if gradient_accumulation_steps == 1:
            return of_part(batch, key)
        parts, keys = (
            _split_rows(batch, gradient_accumulation_steps),
            jax.random.split(key, gradient_accumulation_steps),
        )
        if not two_passes:
            return _accumulate(of_part, params, (parts, keys))
        losses = _join_rows(jax.lax.map(lambda part: batch_loss(params, model, part), parts))
        trained, sums = trained_tokens(selection, losses, batch, key, gradient_accumulation_steps, ratio)

        def of_chosen(part: Batch, trained: jax.Array, key: jax.Array) -> tuple[Params, Sums]:
            return gradient(params, batch=part, choose=lambda _: (trained, {}), **dropout(key))

        return _accumulate(of_chosen, params, (parts, _split_rows(trained, gradient_accumulation_steps), keys))[0], sums

    def dropout(key: jax.Array) -> dict[str, jax.Array]:
        return {"dropout_key": jax.random.fold_in(key, 1)} if model.dropout else {}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key, t = jax.random.fold_in(jax.random.key(seed), state.step), state.step + 1
        ratio = jnp.asarray(keep_ratio(t), jnp.float32) if keep_ratio else None
        grads, sums = gradients_of(state.params, batch, key, ratio)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["trained_tokens"], 1.0), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if l2_to_init:
            updates = jax.tree.map(lambda u, p, s: u + l2_to_init * (p - s), updates, state.params, state.start)
        rate = jnp.asarray(schedule(t), jnp.float32)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        # Not ema * a + (1 - ema) * p: rounded, the two add up to less than 1, and the average would shrink.
        average = jax.tree.map(lambda a, p: a + (1 - ema) * (p - a), state.average, params) if ema else None
        sums |= {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return TrainState(t, params, opt_state, average, state.start), sums

    return step


def _gradient(
    model: ModelConfig,
    selection: Selection | CombinedSelection | None,
    batch_shape: tuple[int, ...],
    gradient_accumulation_steps: int,
) -> Callable[..., tuple[Params, Sums]]:
    if selection is None:
        return functools.partial(gradients.causal, model=model)
    if selection.gradient == "exact":
        return functools.partial(gradients.exact, model=model)
    capacity = row_capacity(selection, batch_shape, gradient_accumulation_steps)
    return functools.partial(gradients.filtered, model=model, capacity=capacity)


def _accumulate(
    gradient: Callable[..., tuple[Params, Sums]], params: Params, parts: tuple[Any, ...]
) -> tuple[Params, Sums]:
    """Sum of the gradients of the parts, one after the other, and of their sums."""

    def add(total: Params, part: tuple[Any, ...]) -> tuple[Params, Sums]:
        now, sums = gradient(*part)
        return jax.tree.map(jnp.add, total, now), sums

    total, sums = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return total, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


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
