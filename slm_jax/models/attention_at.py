"""Attention at some rows of a batch: queries of selected positions over the keys of whole sequences."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import attention, chosen_backend, read
from slm_jax.models.rows import Rows, move, take

# Where tokens are chosen all along the sequences, the blocks in order of reach need no more keys than these eighths of
# a sequence, quarter by quarter: more than their place in that order says by up to a block and a little unevenness.
EVEN = (3, 6, 8, 8)


def attention_at(
    query: Float[Array, "S C H K"],
    rows: Rows,
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    *,
    window: int | None,
    backend: str,
    evenly: bool = False,
) -> Float[Array, "S C H K"]:
    """What `attention` gives at the rows, for their queries; 0 in empty places.

    A flash kernel computes whole sequences, with zeros for the queries nobody asked for: it skips the upper triangle,
    which weighs more. XLA's attention pays for each query and key: there only the rows' own queries are computed, and
    `evenly` (see `spread_evenly`) leaves out most of the keys in their future.
    """
    length = segment_ids.shape[1]
    if chosen_backend(backend, length, query.shape[3], query.dtype) != "xla":
        nobody = jnp.zeros((*segment_ids.shape, *query.shape[2:]), query.dtype)
        whole = attention(rows.put(nobody, query), key, value, segment_ids, window=window, backend=backend)
        return rows.take(whole)
    blocks = _Blocks.of(rows, len(segment_ids), length)
    queries, readable = blocks.of_rows(query), blocks.readable(rows, segment_ids, window)
    num_keys = _reach(length) if evenly else [length]
    size, parts = -(-queries.shape[1] // len(num_keys)), []
    for number, keys in enumerate(num_keys):
        part = slice(number * size, (number + 1) * size)
        own_key, own_value = (
            take(_sequences(x[:, :keys], len(queries)), blocks.sequence[:, part]) for x in (key, value)
        )
        parts.append(_attend(queries[:, part], own_key, own_value, readable[:, part, :, :keys]))
    return blocks.to_rows(jnp.concatenate(parts, axis=1))


def spread_evenly(rows: Rows, num_sequences: int, length: int) -> Bool[Array, ""]:
    """Whether `attention_at` may be told `evenly`: on every device."""
    blocks = _Blocks.of(rows, num_sequences, length)
    reach = jnp.max(blocks.last(rows.index % length), axis=0)
    size = -(-len(reach) // len(EVEN))
    return jnp.all(reach <= jnp.repeat(jnp.array(_reach(length)), size)[: len(reach)])


def _reach(length: int) -> list[int]:
    return [-(-length * eighths // 8) for eighths in EVEN]


def _sequences(x: Array, shards: int) -> Array:
    """[B, ...] -> [S, B / S, ...]."""
    return x.reshape(shards, -1, *x.shape[1:])


class _Blocks(NamedTuple):
    """Rows in Q blocks of W, each block within one of the device's sequences, so that it reads one set of keys."""

    row: Int[Array, "S Q W"]  # which of the C rows; C where the place is empty
    place: Int[Array, "S C"]  # the place of a row among the Q W
    sequence: Int[Array, "S Q"]

    @classmethod
    def of(cls, rows: Rows, num_sequences: int, length: int) -> "_Blocks":
        width = min(128, max(16, length // 16))  # narrow blocks waste few places, wide ones fill the processor
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
        row = jnp.where(there, take(first_row, sequence)[..., None] + rank, capacity)
        return cls(row, place, sequence)._by_reach(rows.index % length)

    def _by_reach(self, position: Int[Array, "S C"]) -> "_Blocks":
        """The blocks in order of the last position that one of their queries stands at, empty ones first."""
        width = self.row.shape[2]
        order = jnp.argsort(self.last(position), axis=1)
        new_block = take(jnp.argsort(order, axis=1), self.place // width)
        place = jnp.where(self.place < self.row[0].size, new_block * width + self.place % width, self.place)
        return _Blocks(take(self.row, order), place, take(self.sequence, order))

    def last(self, position: Int[Array, "S C"]) -> Int[Array, "S Q"]:
        """Keys up to the last query of each block; 0 for an empty block."""
        return jnp.max(jnp.where(self.row < position.shape[1], 1 + self.of_rows(position), 0), axis=2)

    def of_rows(self, x: Array) -> Array:
        """[S, C, ...] -> [S, Q, W, ...]."""
        moved = move(x, self.row.reshape(len(x), -1), self.place)
        return moved.reshape(*self.row.shape, *x.shape[2:])

    def to_rows(self, x: Array) -> Array:
        """The inverse of `of_rows`."""
        flat = x.reshape(len(x), -1, *x.shape[3:])
        return move(flat, self.place, self.row.reshape(len(x), -1))

    def readable(self, rows: Rows, segment_ids: Int[Array, "B L"], window: int | None) -> Bool[Array, "S Q W L"]:
        """Whether a block's query reads a key: same segment, not later, within the window."""
        length = segment_ids.shape[1]
        query = self.of_rows(rows.index % length)[..., None]
        key = jnp.arange(length)
        same = self.of_rows(take(mesh.by_shard(segment_ids), rows.index))[..., None]
        segments = take(_sequences(segment_ids, len(self.row)), self.sequence)[:, :, None]
        readable = (self.row < rows.index.shape[1])[..., None] & (key <= query) & (same == segments)
        return readable if window is None else readable & (key > query - window)


def _attend(
    query: Float[Array, "S Q W H K"],
    key: Float[Array, "S Q L G K"],
    value: Float[Array, "S Q L G K"],
    readable: Bool[Array, "S Q W L"],
) -> Float[Array, "S Q W H K"]:
    grouped = query.reshape(*query.shape[:3], key.shape[3], -1, query.shape[4]).transpose(0, 1, 3, 4, 2, 5)
    out = read(grouped, key.swapaxes(2, 3), value.swapaxes(2, 3), readable)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(query.shape)
