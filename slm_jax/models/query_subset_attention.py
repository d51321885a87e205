"""Attention for the queries of a subset of positions, over the keys and values of whole rows."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import attend, attention, may_read
from slm_jax.models.position_subset import PositionSubset, take, take_and_back

QUARTERS = 4  # of a row, whose length they divide: xla_attention splits its queries in the same way


def query_subset_attention(
    query: Float[Array, "S C H K"],
    subset: PositionSubset,
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    *,
    window: int | None,
    backend: str,
    by_quarter: bool = False,
) -> Float[Array, "S C H K"]:
    """What `attention` gives at the positions of the subset, for their queries; 0 in empty slots.

    The kernels compute whole rows, so the other queries are zeros. XLA's attention pays for each query: `by_quarter`
    leaves the others out, and may be set where `fits_quarters` is True.
    """
    if by_quarter:
        return _attention_by_quarter(query, subset, key, value, segment_ids, window)
    zeros = jnp.zeros((*segment_ids.shape, *query.shape[2:]), query.dtype)
    whole = attention(subset.replace(zeros, query), key, value, segment_ids, window=window, backend=backend)
    return subset.gather(whole)


def fits_quarters(subset: PositionSubset, num_rows: int, length: int) -> Bool[Array, ""]:
    """Whether no quarter of a row has more positions of the subset than `by_quarter` has room for."""
    quarters = _Quarters.of(subset, num_rows, length)
    return jnp.all(quarters.count <= quarters.slot.shape[2])


class _Quarters(NamedTuple):
    """A subset grouped by the quarter of a row that a position is in: T places for each of a device's Z quarters."""

    count: Int[Array, "S Z"]
    slot: Int[Array, "S Z T"]  # which of the subset's C slots; C where the place is empty
    place: Int[Array, "S C"]  # the place of a slot among the Z T; Z T for an empty slot

    @classmethod
    def of(cls, subset: PositionSubset, num_rows: int, length: int) -> "_Quarters":
        shards, capacity = subset.position.shape
        number, size = num_rows // shards * QUARTERS, length // QUARTERS
        # Places for the fullest of `number` quarters if chance spreads the positions: the mean of a binomial
        # distribution and this many standard deviations.
        mean = capacity / number
        deviations = 1 + math.sqrt(2 * math.log(number))
        places = min(size, math.ceil(mean + deviations * math.sqrt(mean * (1 - mean / size))))

        count = jnp.sum((subset.slot < capacity).reshape(shards, number, size), axis=2)
        first = jnp.cumsum(count, axis=1) - count  # slots are in order of position: those of a quarter are neighbours
        rank = jnp.arange(places)
        slot = jnp.where(rank < count[..., None], first[..., None] + rank, capacity)
        quarter = subset.position // size
        place = quarter * places + jnp.arange(capacity) - take(first, quarter)
        return cls(count, slot, jnp.where(subset.filled, place, number * places))

    def group(self, x: Array) -> Array:
        """[S, C, ...] -> [B, quarter, T, ...]."""
        shards, _, places = self.slot.shape
        grouped = take_and_back(x, self.slot.reshape(shards, -1), self.place)
        return grouped.reshape(-1, QUARTERS, places, *x.shape[2:])

    def ungroup(self, x: Array) -> Array:
        """[B, quarter, T, ...] -> [S, C, ...]."""
        shards = len(self.slot)
        flat = x.reshape(shards, self.slot[0].size, *x.shape[3:])
        return take_and_back(flat, self.place, self.slot.reshape(shards, -1))


def _attention_by_quarter(
    query: Float[Array, "S C H K"],
    subset: PositionSubset,
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    window: int | None,
) -> Float[Array, "S C H K"]:
    """The queries of each quarter over the keys up to its end."""
    num_rows, length = segment_ids.shape
    size = length // QUARTERS
    quarters = _Quarters.of(subset, num_rows, length)
    # [S, C, ...] -> [B, quarter, T, ...]
    queries, position = quarters.group(query), quarters.group(subset.position % length)
    segment = quarters.group(take(mesh.by_shard(segment_ids), subset.position))
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, G, L, K]
    queries = queries.reshape(*queries.shape[:3], key.shape[1], -1, query.shape[3])  # [B, quarter, T, G, R, K]

    def quarter(number: int) -> Float[Array, "B T H K"]:
        first = 0 if window is None else max(0, number * size - window + 1)
        keys = slice(first, (number + 1) * size)
        at_keys = jnp.arange(length)[keys]
        mask = may_read(position[:, number], segment[:, number], at_keys, segment_ids[:, keys], window)
        out = attend(queries[:, number].transpose(0, 2, 3, 1, 4), key[:, :, keys], value[:, :, keys], mask)
        return out.transpose(0, 3, 1, 2, 4).reshape(num_rows, -1, *query.shape[2:])  # [B, G, R, T, K] -> [B, T, H, K]

    return quarters.ungroup(jnp.stack([quarter(number) for number in range(QUARTERS)], axis=1))
