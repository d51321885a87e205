"""The positions that take part in a filtered backward pass, and attention for their queries over whole rows.

Everything moves by gathers, in the backward pass too: scatters are slow on every platform.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import Keys, Segments, attend_in_block, attention

QUARTERS = 4  # of a row, whose length they divide: xla_attention splits its queries in the same way


def take(x: Array, index: Int[Array, "S C"]) -> Array:
    """x[s, index[s, i]] of x [S, N, ...]; 0 where the index is N or more."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def take_and_back(x: Array, index: Int[Array, "S C"], inverse: Int[Array, "S N"]) -> Array:
    """`take(x, index)`, with the gradient `take(dy, inverse)` where inverse[s, index[s, i]] = i: no scatter."""
    return take(x, index)


take_and_back.defvjp(
    lambda x, index, inverse: (take(x, index), inverse),
    lambda inverse, d_out: (take(d_out, inverse), None, None),
)


class PositionSubset(NamedTuple):
    """Which of the N = B L / S positions on each of S devices take part in a filtered backward pass.

    A device has C slots for them, filled in ascending order of position; slots that are left over are empty.
    """

    position: Int[Array, "S C"]  # the position in each slot; N in an empty slot
    slot: Int[Array, "S N"]  # the slot of each position; C for a position outside the subset

    @classmethod
    def from_mask(cls, mask: Bool[Array, "B L"], capacity: int) -> "PositionSubset":
        """The positions where the mask is True; of those beyond a device's capacity, the last are left out."""
        mask = mesh.by_shard(mask)  # [B, L] -> [S, N]
        num_positions = mask.shape[1]
        order = jnp.argsort(~mask, axis=1, stable=True)[:, :capacity]
        count = jnp.sum(mask, axis=1, keepdims=True)
        rank = jnp.cumsum(mask, axis=1) - 1
        return cls(
            jnp.where(jnp.arange(capacity) < count, order, num_positions),
            jnp.where(mask & (rank < capacity), rank, capacity),
        )

    @property
    def filled(self) -> Bool[Array, "S C"]:
        """Which slots hold a position."""
        return self.position < self.slot.shape[1]

    def gather(self, x: Array) -> Array:
        """The values at the subset, [B, L, ...] -> [S, C, ...]; 0 in empty slots."""
        return take_and_back(mesh.by_shard(x), self.position, self.slot)

    def replace(self, x: Array, values: Array) -> Array:
        """x [B, L, ...] with the values [S, C, ...] at the subset."""
        inside = (self.slot < self.position.shape[1]).reshape(*self.slot.shape, *(1,) * (values.ndim - 2))
        replaced = jnp.where(inside, take_and_back(values, self.slot, self.position), mesh.by_shard(x))
        return mesh.to_rows(replaced, x.shape[1])


# ---- Attention


def query_subset_attention(
    query: Float[Array, "S C H K"],
    subset: PositionSubset,
    key: Keys,
    value: Keys,
    segment_ids: Segments,
    *,
    window: int | None,
    backend: str,
    by_quarter: bool = False,
) -> Float[Array, "S C H K"]:
    """What `attention` gives at the positions of the subset, for their queries; 0 in empty slots.

    The kernels compute whole rows, so the other queries are zeros. XLA's attention pays for each query: `by_quarter`
    leaves the others out, and may be set where `fits_quarters` is True.
    """
    if not by_quarter:
        zeros = jnp.zeros((*segment_ids.shape, *query.shape[2:]), query.dtype)
        whole = attention(subset.replace(zeros, query), key, value, segment_ids, window=window, backend=backend)
        return subset.gather(whole)

    # ---- Queries grouped by quarter, with T places for each: [S, C, ...] -> [B, quarter, T, ...]
    num_rows, length = segment_ids.shape
    size = length // QUARTERS
    quarters = _Quarters.of(subset, num_rows, length)
    shards, _, places = quarters.slot.shape
    slot = quarters.slot.reshape(shards, -1)  # [S, Z, T] -> [S, Z T]

    def grouped(x: Array) -> Array:
        return take_and_back(x, slot, quarters.place).reshape(num_rows, QUARTERS, places, *x.shape[2:])

    queries, position = grouped(query), grouped(subset.position % length)
    segment = grouped(take(mesh.by_shard(segment_ids), subset.position))

    # ---- Each quarter over the keys up to its end
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, G, L, K]
    queries = queries.reshape(*queries.shape[:3], key.shape[1], -1, query.shape[3])  # [B, quarter, T, G, R, K]
    attended = []
    for number in range(QUARTERS):
        block = slice(number * size, (number + 1) * size)
        of_quarter = queries[:, number].transpose(0, 2, 3, 1, 4)  # [B, T, G, R, K] -> [B, G, R, T, K]
        where = (position[:, number], segment[:, number])
        out = attend_in_block(of_quarter, *where, block, key, value, segment_ids, window)
        attended.append(out.transpose(0, 3, 1, 2, 4).reshape(num_rows, places, *query.shape[2:]))  # [B, T, H, K]
    back = jnp.stack(attended, axis=1).reshape(shards, -1, *query.shape[2:])  # [B, quarter, T, ...] -> [S, Z T, ...]
    return take_and_back(back, quarters.place, slot)


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
