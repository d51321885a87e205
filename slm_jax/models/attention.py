"""Attention over packed rows: causal, within a segment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(segment_ids: Int[Array, "B L"], window: int | None = None) -> Bool[Array, "B 1 L L"]:
    """True where query t (third axis) may read key s: same segment, s <= t, and t - window < s.

    Padding (0) reads padding only.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    mask = jnp.tril(same)
    return mask if window is None else jnp.triu(mask, 1 - window)


def attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"] | Bool[Array, "B 1 L L"],  # the mask itself: until the model hands segment ids over
    *,
    window: int | None = None,
    backend: str = "xla",
) -> Float[Array, "B L H K"]:
    """Softmax attention with G key-value heads, each read by H / G query heads; logits in float32."""
    assert backend in ("auto", "xla"), backend
    mask = segment_ids if segment_ids.ndim == 4 else attention_mask(segment_ids, window)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
