"""Attention at some rows of a batch: queries of selected positions over the keys of whole sequences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import attention
from slm_jax.models.rows import Rows, move, take


def attention_at(
    query: Float[Array, "S C H K"],
    rows: Rows,
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    *,
    window: int | None,
    backend: str,
) -> Float[Array, "S C H K"]:
    """What `attention` gives at the rows, for their queries; 0 in empty places.

    A flash kernel computes whole sequences, with zeros for the queries nobody asked for: it skips the upper triangle,
    which weighs more. XLA's attention pays for each query, so there only the rows' own are computed.
    """
    if backend not in ("auto", "xla"):
        nobody = jnp.zeros((*segment_ids.shape, *query.shape[2:]), query.dtype)
        whole = attention(rows.put(nobody, query), key, value, segment_ids, window=window, backend=backend)
        return rows.take(whole)
    blocks = _Blocks.of(rows, *segment_ids.shape)
    readable = blocks.readable(rows, segment_ids, window)
    return blocks.to_rows(
        _attend(blocks.of_rows(query), blocks.of_sequences(key), blocks.of_sequences(value), readable)
    )


class _Blocks(NamedTuple):
    """Rows in Q blocks of W, each block within one of the device's sequences, so that it reads one set of keys."""

    row: Int[Array, "S Q W"]  # which of the C rows; C where the place is empty
    place: Int[Array, "S C"]  # the place of a row among the Q W
    sequence: Int[Array, "S Q"]

    @classmethod
    def of(cls, rows: Rows, num_sequences: int, length: int) -> "_Blocks":
        width = min(128, max(8, length // 16))  # narrow blocks waste few places, wide ones fill the processor
        capacity, sequences = rows.index.shape[1], num_sequences // rows.index.shape[0]
        number = capacity // width + sequences  # enough however the rows are spread
        sequence_of_row = rows.index // length
        counts = jnp.sum(sequence_of_row[..., None] == jnp.arange(sequences), axis=1)
        blocks = -(-counts // width)
        first_row, first_block = jnp.cumsum(counts, axis=1) - counts, jnp.cumsum(blocks, axis=1) - blocks

        rank = jnp.arange(capacity) - take(first_row, sequence_of_row)
        place = jnp.where(rows.filled, take(first_block, sequence_of_row) * width + rank, number * width)
        block = jnp.arange(number)
        sequence = jnp.sum(first_block[:, None, 1:] <= block[:, None], axis=2)
        rank = (block - take(first_block, sequence))[..., None] * width + jnp.arange(width)
        there = rank < take(counts, sequence)[..., None]
        return cls(jnp.where(there, take(first_row, sequence)[..., None] + rank, capacity), place, sequence)

    def of_rows(self, x: Array) -> Array:
        """[S, C, ...] -> [S, Q, W, ...]."""
        moved = move(x, self.row.reshape(len(x), -1), self.place)
        return moved.reshape(*self.row.shape, *x.shape[2:])

    def to_rows(self, x: Array) -> Array:
        """The inverse of `of_rows`."""
        flat = x.reshape(len(x), -1, *x.shape[3:])
        return move(flat, self.place, self.row.reshape(len(x), -1))

    def of_sequences(self, x: Array) -> Array:
        """[B, L, ...] -> [S, Q, L, ...]: the sequence of each block."""
        return take(x.reshape(len(self.sequence), -1, *x.shape[1:]), self.sequence)

    def readable(self, rows: Rows, segment_ids: Int[Array, "B L"], window: int | None) -> Bool[Array, "S Q W L"]:
        """Whether a block's query reads a key: same segment, not later, within the window."""
        length = segment_ids.shape[1]
        query = self.of_rows(rows.index % length)[..., None]
        key = jnp.arange(length)
        same = self.of_rows(take(mesh.by_shard(segment_ids), rows.index))[..., None]
        readable = (key <= query) & (same == self.of_sequences(segment_ids)[:, :, None])
        return readable if window is None else readable & (key > query - window)


def _attend(
    query: Float[Array, "S Q W H K"],
    key: Float[Array, "S Q L G K"],
    value: Float[Array, "S Q L G K"],
    readable: Bool[Array, "S Q W L"],
) -> Float[Array, "S Q W H K"]:
    heads, groups = query.shape[3], key.shape[3]
    grouped = query.reshape(*query.shape[:3], groups, heads // groups, -1) * query.shape[-1] ** -0.5
    logits = jnp.einsum("sqwgrk,sqlgk->sqgrwl", grouped, key, preferred_element_type=jnp.float32)
    # Finite, so that an empty place, which reads nothing, gives numbers that nobody takes rather than NaN.
    weights = jax.nn.softmax(jnp.where(readable[:, :, None, None], logits, -1e30), axis=-1).astype(value.dtype)
    out = jnp.einsum("sqgrwl,sqlgk->sqwgrk", weights, value, preferred_element_type=jnp.float32)
    return out.reshape(query.shape).astype(query.dtype)
