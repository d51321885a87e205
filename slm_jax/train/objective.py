"""Causal and selective objective: per-token losses -> which tokens train, and the sums that metrics are made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slm_jax.data.batches import Batch
from slm_jax.score.selection import Selection, select, token_scores
from slm_jax.score.token_loss import predicted

Sums = dict[str, jax.Array]


def trained_tokens(
    selection: Selection | None, loss: Float[Array, "B L"], batch: Batch, key: jax.Array, num_devices: int
) -> tuple[Bool[Array, "B L"], Sums]:
    """True for the tokens whose loss is trained on, and the metrics that follow from the choice.

    Valid tokens have `loss_mask` set and a predecessor in their segment; for a selection their score must be finite
    too. A non-finite loss of the model itself is not hidden here: it stops the run.
    """
    valid = batch.loss_mask & predicted(batch.segment_ids)
    if selection is None:
        return valid, _sums(loss, valid, valid, batch.source_ids, jnp.zeros((), jnp.int32))
    scores = token_scores(selection, loss, batch.scores, key)
    unusable = valid & ~jnp.isfinite(scores)
    trained = select(selection, scores, valid & ~unusable, num_devices)
    return trained, _sums(loss, valid, trained, batch.source_ids, jnp.sum(unusable))


NUM_SOURCES = 256  # source_ids are uint8


def _sums(loss: jax.Array, valid: jax.Array, trained: jax.Array, source_ids: jax.Array, unusable: jax.Array) -> Sums:
    """Sums and counts, never means: they add up over devices and micro-batches."""
    untrained = valid & ~trained

    def by_source(x: jax.Array) -> jax.Array:
        return jnp.zeros(NUM_SOURCES, jnp.float32).at[source_ids.reshape(-1)].add(x.reshape(-1).astype(jnp.float32))

    return {
        "positions": jnp.asarray(loss.size, jnp.float32),
        "valid_tokens": jnp.sum(valid, dtype=jnp.float32),
        "trained_tokens": jnp.sum(trained, dtype=jnp.float32),
        "loss_sum": jnp.sum(jnp.where(valid, loss, 0.0)),
        "trained_loss_sum": jnp.sum(jnp.where(trained, loss, 0.0)),
        "untrained_loss_sum": jnp.sum(jnp.where(untrained, loss, 0.0)),
        "unusable_scores": unusable.astype(jnp.float32),
        "source_valid": by_source(valid),
        "source_trained": by_source(trained),
        "source_loss": by_source(jnp.where(valid, loss, 0.0)),
        "source_not_finite": by_source(valid & ~jnp.isfinite(loss)),
    }
