"""Keys and values of the tokens that a row has read, so that its next token costs one token and not the whole row.

The token at position p of a row is in slot p: prompts of several lengths are padded on the right. As slot and position
are the same number, reading the prompts is the forward pass of training over rows of one segment, with any attention
kernel, and no row has an offset. New tokens overwrite the padding after their prompt, which no query reads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import attend, in_reach

SHARDING = mesh.P(None, *mesh.BATCH, "model")


class Cache(NamedTuple):
    """Keys and values of all layers, in the compute dtype; split over devices by rows as a batch and by heads as the
    projections that make them."""

    key: Float[Array, "layer B G S K"]
    value: Float[Array, "layer B G S K"]


def place(cache: Cache) -> Cache:
    """Pins the sharding of the cache."""
    return Cache(*(mesh.constrain(x, SHARDING) for x in cache))


def write(
    cache: Cache,
    layer: Int[Array, ""],
    key: Float[Array, "B 1 G K"],
    value: Float[Array, "B 1 G K"],
    positions: Int[Array, "B"],
) -> Cache:
    """The cache with one more token in each row, at its own position."""
    # What `vmap` over the rows would compute, with the rows left in place: vmap moves them to the front, which copies
    # the whole cache for each layer. Indexing with arange(B) writes in place too, but sends the tokens to all devices.
    each_row = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2),  # G and K of [B, G, K]
        inserted_window_dims=(0, 3),  # layer and slot, which the indices name
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    indices = jnp.stack([jnp.broadcast_to(layer, positions.shape), positions], axis=-1)

    def put(slots: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.scatter(slots, indices, new[:, 0], each_row, indices_are_sorted=True, unique_indices=True)

    return place(Cache(put(cache.key, key), put(cache.value, value)))


def cached_attention(
    query: Float[Array, "B 1 H K"],
    cache: Cache,
    layer: Int[Array, ""],
    positions: Int[Array, "B"],
    window: int | None,
) -> Float[Array, "B 1 H K"]:
    """What `attention` gives for the token at each row's position over itself and the tokens before it."""
    key, value = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)  # [B, G, S, K]
    mask = in_reach(positions[:, None], jnp.arange(key.shape[2]), window)
    batch, _, heads, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], 1, width)  # [B, 1, H, K] -> [B, G, R, 1, K]
    return attend(grouped, key, value, mask).reshape(query.shape)
