"""Keys and values of the tokens a row has read, so that its next token costs one token and not the whole row.

The token at position p of a row lies in slot p: prompts of several lengths are padded on their right. Slot and position
are then one number, so that reading the prompts is the forward pass of training over rows of one segment, whatever its
attention kernel, and no row has an offset. New tokens overwrite the padding behind their prompt, which no query reads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import read

SHARDING = mesh.P(None, *mesh.BATCH, "model")


class Cache(NamedTuple):
    """Of all layers, in the compute dtype; rows are split as a batch is, heads as the projections that make them."""

    key: Float[Array, "layer B G S K"]
    value: Float[Array, "layer B G S K"]


def of_prompts(key: Float[Array, "layer B L G K"], value: Float[Array, "layer B L G K"], slots: int) -> Cache:
    """The cache of prompts that were read at positions 0 to L - 1; there are `slots` (at least L) for each row."""

    wider = ((0, 0), (0, 0), (0, 0), (0, slots - key.shape[2]), (0, 0))
    return place(Cache(*(jnp.pad(x.swapaxes(2, 3), wider) for x in (key, value))))


def place(cache: Cache) -> Cache:
    """Pins where the cache lies."""
    return Cache(*(mesh.constrain(x, SHARDING) for x in cache))


def write(
    cache: Cache,
    layer: Int[Array, ""],
    key: Float[Array, "B 1 G K"],
    value: Float[Array, "B 1 G K"],
    positions: Int[Array, "B"],
) -> Cache:
    """The cache with one more token in each row, at its own position."""

    def put(slots: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(slots, new.swapaxes(0, 1)[None], (layer, 0, position, 0))

    put_all = jax.vmap(put, in_axes=(1, 0, 0), out_axes=1)
    return place(Cache(put_all(cache.key, key, positions), put_all(cache.value, value, positions)))


def cached_attention(
    query: Float[Array, "B 1 H K"],
    cache: Cache,
    layer: Int[Array, ""],
    positions: Int[Array, "B"],
    window: int | None,
) -> Float[Array, "B 1 H K"]:
    """What `attention` gives the token at each row's position over the tokens before it and itself."""
    key, value = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)
    distance = positions[:, None] - jnp.arange(key.shape[2])
    readable = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    batch, _, heads, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], 1, width)
    return read(grouped, key, value, readable[:, None]).reshape(query.shape)
