"""Removes metadata from rows, for a reference that was trained on plain documents, and maps its scores back."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slm_jax.data.batches import Batch, make_batch
from slm_jax.data.metadata import prefix_tokens


def remove_prefix(batch: Batch) -> tuple[Batch, Int[np.ndarray, "B L"]]:
    """Removes the metadata from rows on the host.

    Returns:
        The rows, as long as before: the remaining tokens move to the left within their row, padding follows. And the
        new place of each token of the given rows, -1 for a removed one.
    """
    kept = (batch.segment_ids > 0) & ~prefix_tokens(batch.segment_ids, batch.loss_mask)
    order = np.argsort(~kept, axis=1, kind="stable")
    padding = np.arange(kept.shape[1]) >= kept.sum(axis=1, keepdims=True)

    def moved(x: np.ndarray) -> np.ndarray:
        return np.where(padding, x.dtype.type(0), np.take_along_axis(x, order, axis=1))

    rows = make_batch(moved(batch.tokens), moved(batch.segment_ids), moved(batch.loss_mask), moved(batch.source_ids))
    return rows, np.where(kept, np.cumsum(kept, axis=1) - 1, -1).astype(np.int32)


def put_back(values: Float[Array, "B L"], place: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """Values of the rows from `remove_prefix`, back at the tokens they belong to; 0 at removed tokens."""
    return jnp.where(place < 0, 0.0, jnp.take_along_axis(values, jnp.maximum(place, 0), axis=1))
