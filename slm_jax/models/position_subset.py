"""The positions that take part in a filtered backward pass.

Everything moves by gathers, in the backward pass too: scatters are slow on every platform.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from slm_jax import mesh


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
