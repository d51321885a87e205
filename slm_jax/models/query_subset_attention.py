"""Attention at some rows of a batch: queries of selected positions over the keys of whole sequences."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import attention, read
from slm_jax.models.position_subset import Rows, move, take

QUARTERS = 4  # of a sequence, whose length they divide: as xla_attention splits its queries


def query_subset_attention(
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

    Computed for whole sequences, with zeros for the queries that nobody asked for. XLA's attention pays for each query:
    where `spread_evenly` says that it may, `evenly` leaves the others out.
    """
    if evenly:
        return _evenly(query, rows, key, value, segment_ids, window)
    nobody = jnp.zeros((*segment_ids.shape, *query.shape[2:]), query.dtype)
    whole = attention(rows.put(nobody, query), key, value, segment_ids, window=window, backend=backend)
    return rows.take(whole)


def spread_evenly(rows: Rows, num_sequences: int, length: int) -> Bool[Array, ""]:
    """Whether `query_subset_attention` may be told `evenly`: no quarter of a sequence has more rows than it has
    places."""
    quarters = _Quarters.of(rows, num_sequences, length)
    return jnp.all(quarters.count <= quarters.row.shape[2])


class _Quarters(NamedTuple):
    """Rows by the quarter of a sequence that they stand in, T places for each of the Z quarters on a device."""

    count: Int[Array, "S Z"]
    row: Int[Array, "S Z T"]  # which of the C rows; C where the place is empty
    place: Int[Array, "S C"]  # the place of a row among the Z T

    @classmethod
    def of(cls, rows: Rows, num_sequences: int, length: int) -> "_Quarters":
        shards, capacity = rows.index.shape
        number, size = num_sequences // shards * QUARTERS, length // QUARTERS
        # Room for what chance gives the fullest of so many quarters: so many standard deviations above the mean.
        mean = capacity / number
        deviations = 1 + math.sqrt(2 * math.log(number))
        places = min(size, math.ceil(mean + deviations * math.sqrt(mean * (1 - mean / size))))

        count = jnp.sum((rows.place < capacity).reshape(shards, number, size), axis=2)
        first = jnp.cumsum(count, axis=1) - count  # rows are in order: those of a quarter follow each other
        rank = jnp.arange(places)
        row = jnp.where(rank < count[..., None], first[..., None] + rank, capacity)
        quarter = rows.index // size
        place = quarter * places + jnp.arange(capacity) - take(first, quarter)
        return cls(count, row, jnp.where(rows.filled, place, number * places))

    def of_rows(self, x: Array) -> Array:
        """[S, C, ...] -> [B, quarter, T, ...]."""
        shards, _, places = self.row.shape
        moved = move(x, self.row.reshape(shards, -1), self.place)
        return moved.reshape(-1, QUARTERS, places, *x.shape[2:])

    def to_rows(self, x: Array) -> Array:
        """The inverse of `of_rows`."""
        shards = len(self.row)
        flat = x.reshape(shards, self.row[0].size, *x.shape[3:])
        return move(flat, self.place, self.row.reshape(shards, -1))


def _evenly(
    query: Float[Array, "S C H K"],
    rows: Rows,
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    window: int | None,
) -> Float[Array, "S C H K"]:
    """A quarter's rows over the keys up to its end."""
    num_sequences, length = segment_ids.shape
    size = length // QUARTERS
    quarters = _Quarters.of(rows, num_sequences, length)
    queries, position = quarters.of_rows(query), quarters.of_rows(rows.index % length)
    segment = quarters.of_rows(take(mesh.by_shard(segment_ids), rows.index))
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    queries = queries.reshape(*queries.shape[:3], key.shape[1], -1, query.shape[3])

    def quarter(number: int) -> Float[Array, "B T H K"]:
        first = 0 if window is None else max(0, number * size - window + 1)
        keys = slice(first, (number + 1) * size)
        distance = position[:, number, :, None] - jnp.arange(length)[keys]
        reach = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        mask = (segment[:, number, :, None] == segment_ids[:, None, keys]) & reach
        out = read(queries[:, number].transpose(0, 2, 3, 1, 4), key[:, :, keys], value[:, :, keys], mask)
        return out.transpose(0, 3, 1, 2, 4).reshape(num_sequences, -1, *query.shape[2:])

    return quarters.to_rows(jnp.stack([quarter(number) for number in range(QUARTERS)], axis=1))
