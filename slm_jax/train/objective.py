"""Causal and selective objective: per-token losses -> which tokens train, and the sums that metrics are made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slm_jax.data.batches import Batch
from slm_jax.score.selection import CombinedSelection, Selection, choose, within_capacity
from slm_jax.score.token_loss import predicted

Sums = dict[str, jax.Array]


def valid_tokens(batch: Batch) -> Bool[Array, "B L"]:
    """True where a token may train: its loss counts and it has a predecessor in its segment."""
    return batch.loss_mask & predicted(batch.segment_ids)


def trained_tokens(
    selection: Selection | CombinedSelection | None,
    loss: Float[Array, "B L"],
    batch: Batch,
    key: jax.Array,
    gradient_accumulation_steps: int = 1,
    ratio: Float[Array, ""] | None = None,
) -> tuple[Bool[Array, "B L"], Sums]:
    """True for the tokens whose loss is trained on, and the metrics that follow from the choice.

    For a selection the score of a valid token must be finite too. A non-finite loss of the model itself is not hidden
    here: it stops the run. `gradient_accumulation_steps` is the number of pieces the gradient of this batch will be
      made in; `ratio`
    stands in for selection.ratio.
    """
    valid = valid_tokens(batch)
    if selection is None:
        return valid, _sums(loss, valid, valid, batch.source_ids)
    chosen, usable, scores = choose(selection, loss, batch.scores, valid, key, ratio)
    trained = (
        within_capacity(selection, scores, chosen, gradient_accumulation_steps)
        if selection.gradient == "filtered"
        else chosen
    )
    sums = _sums(loss, valid, trained, batch.source_ids)
    sums |= {"nonfinite_scores": _count(valid & ~usable), "dropped_tokens": _count(chosen & ~trained)}
    return trained, sums


NUM_SOURCES = 256  # source_ids are uint8


def _count(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.float32)


def _sums(loss: jax.Array, valid: jax.Array, trained: jax.Array, source_ids: jax.Array) -> Sums:
    """Sums and counts, never means: they add up over devices and micro-batches."""
    untrained = valid & ~trained

    def by_source(x: jax.Array) -> jax.Array:
        # Row by row: millions added one by one cost thousandths of the mean, and a count in float32 ends at 2^24.
        of_row = jax.vmap(lambda row, ids: jnp.zeros(NUM_SOURCES, jnp.float32).at[ids].add(row))
        return jnp.sum(of_row(x.astype(jnp.float32), source_ids), axis=0)

    return {
        "positions": jnp.asarray(loss.size, jnp.float32),
        "valid_tokens": _count(valid),
        "trained_tokens": _count(trained),
        "loss_sum": jnp.sum(jnp.where(valid, loss, 0.0)),
        "trained_loss_sum": jnp.sum(jnp.where(trained, loss, 0.0)),
        "untrained_loss_sum": jnp.sum(jnp.where(untrained, loss, 0.0)),
        "nonfinite_scores": jnp.zeros(()),
        "dropped_tokens": jnp.zeros(()),
        "source_valid": by_source(valid),
        "source_trained": by_source(trained),
        "source_loss": by_source(jnp.where(valid, loss, 0.0)),
        "source_not_finite": by_source(valid & ~jnp.isfinite(loss)),
    }
