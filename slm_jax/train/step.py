"""The train step: losses -> scores -> selection -> weights -> gradient -> update, as one pure function, and its jit.

The loss of a step is sum(weights * losses) / sum(weights), over the global batch: Rho-1 Eq 4 with weights of 0 and 1.
`Phase.weighting` gives the tokens that train other weights, and `Phase.normalise` can divide by their number instead.
Devices and micro-batches exchange sums, never means, so that the result does not depend on how a batch is split.

Shapes: M micro-batches of R = B / M rows each.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.selection import (
    CombinedSelection,
    Selection,
    competes_across_micro_batches,
    filtered_capacity,
    histories,
    history_name,
    select_tokens,
    selection_entropies,
    within_capacity,
)
from slm_jax.score.token_loss import batch_loss, batch_loss_and_entropies, valid_tokens, weighted_loss
from slm_jax.score.weighting import ALIKE, Weighting, depends_on_model, entropies_of, rule_weights
from slm_jax.train.filtered_gradient import filtered_vjp
from slm_jax.train.state import TrainState

MetricSums = dict[str, jax.Array]  # sums and counts over a batch, which add up over devices and micro-batches
Step = Callable[[TrainState, Batch], tuple[TrainState, MetricSums]]
NUM_SOURCES = 256  # source_ids are uint8


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
    weighting: Weighting = ALIKE,
    lag: int = 0,
) -> Step:
    """Makes the step of one phase: (state, global batch) -> (state, metric sums).

    Args:
      model: the architecture.
      selection: which tokens train; None for all of them (causal).
      optimizer: its updates are scaled by -learning rate here.
      schedule: learning rate at step t of the run, counted from 1.
      seed: of random scores and dropout.
      gradient_accumulation_steps: micro-batches per step; same result, less memory.
      keep_ratio: fraction of tokens kept at step t, in place of selection.ratio.
      l2_to_init: see Phase; state.start then holds the parameters at the beginning of the phase.
      ema: see OptimizerConfig; state.average then holds the moving average.
      weighting: how much each token that trains counts.
      lag: see Selection; state.history then holds earlier parameters, renewed every `lag` steps.
    """
    num_micro_batches = gradient_accumulation_steps
    # Where tokens of different micro-batches compete, a first pass without gradient (and without dropout) computes
    # all losses. Selection then sees the whole batch before the first gradient is taken.
    look_ahead = num_micro_batches > 1 and selection is not None and competes_across_micro_batches(selection)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, MetricSums]:
        # A function of seed and step alone: a run that was killed draws the same numbers again.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        t = state.step + 1  # schedules count steps from 1
        ratio = jnp.asarray(keep_ratio(t), jnp.float32) if keep_ratio else None
        params = state.params

        # ---- Losses under earlier states of the run: one more forward pass for each that selection compares with.
        for name in histories(selection):
            past = state.average if name == "average" else (state.history or {}).get("older")
            assert past is not None, f"the state holds no {name}"
            under_past = functools.partial(batch_loss, past, model)
            # [B, L] -> [M, R, L], one micro-batch at a time, -> [B, L]
            losses = _join_rows(jax.lax.map(under_past, _split_rows(batch, num_micro_batches)))
            batch = batch._replace(scores=batch.scores | {history_name(name): losses})

        # ---- Weights, where they must be known before the gradient: [B, L], or None.
        weights, metric_sums = None, {}
        if look_ahead:
            micro_batches = _split_rows(batch, num_micro_batches)
            top_ks = (*selection_entropies(selection), *entropies_of(weighting.rule))
            own = jax.lax.map(lambda part: batch_loss_and_entropies(params, model, part, top_ks), micro_batches)
            losses, entropies = jax.tree.map(_join_rows, own)  # [M, R, L] -> [B, L] each
            weights, metric_sums = token_weights(
                selection, losses, batch, key, num_micro_batches, ratio, weighting, entropies, t
            )

        # ---- Gradient of sum(weights * losses). The capacity is an int: it sizes arrays, so the compiler must know it.
        capacity = filtered_capacity(selection, batch.tokens.shape, num_micro_batches) if selection else 0
        if num_micro_batches == 1:
            gradient, metric_sums = micro_batch_gradient(
                params, model, selection, capacity, batch, None, key, ratio, weighting, t
            )
        else:

            def accumulate(total: Params, part: tuple[Batch, jax.Array | None, jax.Array]) -> tuple[Params, MetricSums]:
                gradient, sums = micro_batch_gradient(params, model, selection, capacity, *part, ratio, weighting, t)
                return jax.tree.map(jnp.add, total, gradient), sums

            zeros = jax.tree.map(jnp.zeros_like, params)
            # batch and weights: [B, L] -> [M, R, L]; keys [M]
            parts = (*_split_rows((batch, weights), num_micro_batches), jax.random.split(key, num_micro_batches))
            gradient, sums = jax.lax.scan(accumulate, zeros, parts)
            metric_sums |= jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)  # [M, ...] -> [...]

        # ---- Update. The only division, by a sum over the global batch. The divisor is computed once per array: if all
        # shared one, XLA would round differently, and runs of earlier versions would not resume to the bit.
        gradient = jax.tree.map(lambda g: g / normaliser(weighting, metric_sums), gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        if l2_to_init:
            # Added to the updates, not to the gradient: like weight decay, it is not scaled by AdamW's moments.
            updates = jax.tree.map(lambda u, p, p0: u + l2_to_init * (p - p0), updates, params, state.start)
        learning_rate = jnp.asarray(schedule(t), jnp.float32)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
        # Not ema * a + (1 - ema) * p: rounded, the two factors add up to less than 1, and the average would shrink.
        average = jax.tree.map(lambda a, p: a + (1 - ema) * (p - a), state.average, params) if ema else None
        history = state.history
        if history:
            renew = functools.partial(jnp.where, t % lag == 0)
            history = {
                "older": jax.tree.map(renew, history["newer"], history["older"]),
                "newer": jax.tree.map(renew, params, history["newer"]),
            }
        metric_sums |= {"grad_norm": optax.tree.norm(gradient), "learning_rate": learning_rate}
        return TrainState(t, params, opt_state, average, state.start, history), metric_sums

    return step


def micro_batch_gradient(
    params: Params,
    model: ModelConfig,
    selection: Selection | CombinedSelection | None,
    capacity: int,
    batch: Batch,
    weights: Float[Array, "B L"] | None,
    key: PRNGKeyArray,
    ratio: Float[Array, ""] | None = None,
    weighting: Weighting = ALIKE,
    step: Int[Array, ""] | int = 0,
) -> tuple[Params, MetricSums]:
    """The gradient of sum(weights * losses) over a micro-batch, with its metric sums, in one of three ways.

    causal: every valid token has weight 1, or one that depends on positions or columns. Because weights are known
      before the losses, one pass over the head computes both losses and gradient.
    exact: weights follow from the losses. The head's backward pass visits the selected tokens only; all positions go
      through the layers below it, because later tokens attend to them.
    filtered: the whole backward pass runs at the positions that predict a selected token, up to `capacity` of them on
      each device. The gradient is approximate, see filtered_gradient.py; dropout is not supported.

    `weights` are those of the look-ahead pass over all micro-batches, if there was one. It has already measured the
    metric sums, so this function returns {} for them. With `weights` None, they are computed here.
    """
    dropout_key = jax.random.fold_in(key, 1) if model.dropout else None

    if selection is None and not depends_on_model(weighting.rule):
        valid = valid_tokens(batch)
        known = weigh(weighting, valid, valid, None, {}, batch, step)

        def loss_sum(params: Params) -> tuple[jax.Array, jax.Array]:
            hidden = forward.hidden_states(
                params, model, batch.tokens, batch.positions, batch.segment_ids, dropout_key
            )  # [B, L] -> [B, L, D]
            head = forward.head_matrix(params, model)
            return weighted_loss(hidden, head, batch.tokens, known, model.vocab_size, valid)

        gradient, losses = jax.grad(loss_sum, has_aux=True)(params)
        # `token_weights` computes the same weights again; it is called for its metric sums, which need the losses.
        return gradient, token_weights(None, losses, batch, key, weighting=weighting, step=step)[1]

    top_ks = (*selection_entropies(selection), *entropies_of(weighting.rule)) if weights is None else ()
    if selection and selection.gradient == "filtered":
        losses, pullback, entropies = filtered_vjp(params, model, batch, capacity, top_ks)
    else:
        losses, pullback, entropies = jax.vjp(
            lambda params: batch_loss_and_entropies(params, model, batch, top_ks, dropout_key), params, has_aux=True
        )

    metric_sums: MetricSums = {}
    if weights is None:
        weights, metric_sums = token_weights(selection, losses, batch, key, 1, ratio, weighting, entropies, step)
    # weights [B, L] are the cotangent of the losses; no gradient flows through the weights themselves.
    (gradient,) = pullback(weights)
    return gradient, metric_sums


def token_weights(
    selection: Selection | CombinedSelection | None,
    losses: Float[Array, "B L"],
    batch: Batch,
    key: PRNGKeyArray,
    num_micro_batches: int = 1,
    ratio: Float[Array, ""] | None = None,
    weighting: Weighting = ALIKE,
    entropies: Mapping[int, Float[Array, "B L"]] | None = None,
    step: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B L"], MetricSums]:
    """Losses -> scores -> selection -> the weight of each token's loss, and the metric sums that follow from it.

    A token without a finite score is never selected. A non-finite loss of the model itself is not hidden: its sum stops
    the run (`StepMetrics`), and so does a weight that is negative or not finite.

    Args:
      selection: None if every valid token trains.
      losses: the model's own.
      batch: with the score columns that selection and weighting read.
      key: of random scores.
      num_micro_batches: the number of parts in which the gradient of this batch is computed.
      ratio: replaces selection.ratio.
      weighting: how much each token that trains counts.
      entropies: by k, those that selection and weighting read.
      step: number of the step in the run, from 1.
    """
    # ---- Which tokens train.
    valid = valid_tokens(batch)
    trained, counts = valid, {}
    if selection is not None:
        mask = select_tokens(selection, losses, batch.scores, valid, key, ratio, entropies)
        trained = mask.selected
        if selection.gradient == "filtered":
            trained = within_capacity(selection, mask.scores, trained, num_micro_batches)
        counts["nonfinite_scores"] = _count(valid & ~mask.usable)
        counts["dropped_tokens"] = _count(mask.selected & ~trained)
    metric_sums = metric_sums_of(losses, valid, trained, batch.source_ids) | counts

    # ---- How much each of them counts.
    weights = weigh(weighting, valid, trained, losses, entropies or {}, batch, step)
    if weighting.on:
        metric_sums["weight_sum"] = jnp.sum(weights)
        metric_sums["weighted_loss_sum"] = jnp.sum(jnp.where(weights != 0, weights * losses, 0.0))
        metric_sums["bad_weights"] = _count(valid & ~(jnp.isfinite(weights) & (weights >= 0)))
        metric_sums["source_weight"] = _by_source(weights, batch.source_ids)
    return weights, metric_sums


def weigh(
    weighting: Weighting,
    valid: Bool[Array, "B L"],
    trained: Bool[Array, "B L"],
    losses: Float[Array, "B L"] | None,
    entropies: Mapping[int, Float[Array, "B L"]],
    batch: Batch,
    step: Int[Array, ""] | int,
) -> Float[Array, "B L"]:
    """The weight of each token: the rule's, or 1, where it trains; `weighting.unselected` at other valid tokens."""
    if not weighting.on:
        return trained.astype(jnp.float32)
    weights: Array | float = 1.0
    if weighting.rule is not None:
        weights = rule_weights(weighting.rule, losses, entropies, batch, jnp.asarray(step))
    return jnp.where(trained, weights, jnp.where(valid, weighting.unselected, 0.0)).astype(jnp.float32)


def normaliser(weighting: Weighting, metric_sums: MetricSums) -> Float[Array, ""]:
    """The divisor of the summed gradient of the global batch: the sum of the weights, or the number of the tokens that
    train (of all valid tokens, if `unselected` gives the others a weight). Never 0: without tokens, the gradient is 0.
    """
    if weighting.on and weighting.normalise == "weights":
        return jnp.where(metric_sums["weight_sum"] == 0, 1.0, metric_sums["weight_sum"])
    return jnp.maximum(metric_sums["valid_tokens" if weighting.unselected else "trained_tokens"], 1.0)


def metric_sums_of(
    losses: Float[Array, "B L"],
    valid: Bool[Array, "B L"],
    trained: Bool[Array, "B L"],
    source_ids: Array,
) -> MetricSums:
    """The sums and counts from which `StepMetrics` computes a row of metrics; scalars, or [NUM_SOURCES] by source."""
    return {
        "positions": jnp.asarray(losses.size, jnp.float32),
        "valid_tokens": _count(valid),
        "trained_tokens": _count(trained),
        "loss_sum": jnp.sum(jnp.where(valid, losses, 0.0)),
        "trained_loss_sum": jnp.sum(jnp.where(trained, losses, 0.0)),
        "untrained_loss_sum": jnp.sum(jnp.where(valid & ~trained, losses, 0.0)),
        "nonfinite_scores": jnp.zeros(()),
        "dropped_tokens": jnp.zeros(()),
        "source_valid": _by_source(valid, source_ids),
        "source_trained": _by_source(trained, source_ids),
        "source_loss": _by_source(jnp.where(valid, losses, 0.0), source_ids),
        "source_not_finite": _by_source(valid & ~jnp.isfinite(losses), source_ids),
    }


def compile_step(step: Step, mesh: Mesh, state_shapes: TrainState) -> Step:
    """Compiles a step with jit. The state keeps its shardings, and the new state takes the memory of the old one."""
    state_shardings = jax.tree.map(lambda shape: shape.sharding, state_shapes)
    return jax.jit(
        step,
        in_shardings=(state_shardings, mesh_lib.batch_sharding(mesh)),
        out_shardings=(state_shardings, jax.sharding.NamedSharding(mesh, mesh_lib.P())),
        donate_argnums=0,
    )


def _by_source(x: Array, source_ids: Array) -> Float[Array, " S"]:
    """The sum of x [B, L] over the tokens of each source, S = NUM_SOURCES."""
    # [B, L] -> [B, S] -> [S]. Rows are added first: a float32 sum of millions of tokens, one by one, is wrong by
    # thousandths, and a count that grows by 1 stops at 2^24.
    per_row = jax.vmap(lambda row, ids: jnp.zeros(NUM_SOURCES, jnp.float32).at[ids].add(row))
    return jnp.sum(per_row(x.astype(jnp.float32), source_ids), axis=0)


def _count(x: Bool[Array, "B L"]) -> Float[Array, ""]:
    return jnp.sum(x, dtype=jnp.float32)


def _split_rows(tree, parts: int):
    """[B, ...] -> [parts, B / parts, ...]. Part m has rows m, m + parts, ...: each device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree)


def _join_rows(x: Float[Array, "M R L"]) -> Float[Array, "B L"]:
    """The inverse of `_split_rows`."""
    x = jnp.moveaxis(x, 0, 1)  # [M, R, L] -> [R, M, L]
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
