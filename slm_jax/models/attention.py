"""Attention over packed rows: causal, within a segment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B 1 L L"]:
    """True where query t (third axis) may read key s: same segment, s <= t. Padding (0) reads padding only."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jnp.tril(same)


def attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    mask: Bool[Array, "B 1 L L"],
) -> Float[Array, "B L H K"]:
    """Softmax attention with G key-value heads, each read by H / G query heads; logits in float32."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
