"""Some positions of a batch, as rows of their own: what a backward pass over selected tokens works on.

Everything moves by gathers, backward too: scatters are slow on every platform.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from slm_jax import mesh


def take(x: Array, index: Int[Array, "S C"]) -> Array:
    """x[s, index[s, i]] of [S, N, ...]; 0 where the index is N or more."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def move(x: Array, there: Int[Array, "S C"], back: Int[Array, "S N"]) -> Array:
    """`take(x, there)`, where `back` undoes it: back[s, there[s, i]] = i. Its gradient is `take(dy, back)`."""
    return take(x, there)


move.defvjp(
    lambda x, there, back: (take(x, there), back),
    lambda back, cotangent: (take(cotangent, back), None, None),
)


class Rows(NamedTuple):
    """Up to C of the N positions that each of S devices holds, in ascending order."""

    index: Int[Array, "S C"]  # position among the device's N; N where the place is empty
    place: Int[Array, "S N"]  # where a position stands in `index`; C where it does not

    @classmethod
    def of(cls, chosen: Bool[Array, "B L"], capacity: int) -> "Rows":
        """The chosen positions; those beyond a device's capacity are left out."""
        chosen = mesh.by_shard(chosen)
        positions = chosen.shape[1]
        order = jnp.argsort(~chosen, axis=1, stable=True)[:, :capacity]
        count = jnp.sum(chosen, axis=1, keepdims=True)
        rank = jnp.cumsum(chosen, axis=1) - 1
        return cls(
            jnp.where(jnp.arange(capacity) < count, order, positions),
            jnp.where(chosen & (rank < capacity), rank, capacity),
        )

    @property
    def filled(self) -> Bool[Array, "S C"]:
        return self.index < self.place.shape[1]

    def take(self, x: Array) -> Array:
        """[B, L, ...] -> [S, C, ...]."""
        return move(mesh.by_shard(x), self.index, self.place)

    def put(self, x: Array, values: Array) -> Array:
        """[B, L, ...] with the values, [S, C, ...], in their places."""
        there = (self.place < self.index.shape[1]).reshape(*self.place.shape, *(1,) * (values.ndim - 2))
        moved = jnp.where(there, move(values, self.place, self.index), mesh.by_shard(x))
        return mesh.to_rows(moved, x.shape[1])
