"""Norms, rotary embedding, projections, dropout. Pure modules: a Variable is never written after construction."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from slm_jax.models.config import ModelConfig, RopeScaling


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * rms * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias, computed in float32."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        std = jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + self.eps)
        return (centered * std * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Projection(nnx.Module):
    """A matrix between named groups of axes; contracts the last `num_in` axes of the input. A bias starts at 0."""

    def __init__(self, shape: tuple[int, ...], num_in: int, std: float, rngs: nnx.Rngs, bias: bool = False):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape[num_in:], jnp.float32)) if bias else None
        self.num_in = num_in

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        # Asking for float32 out of the product doubles bfloat16's speed on CPU and is what accelerators do anyway.
        out = jnp.tensordot(x, kernel, axes=self.num_in, preferred_element_type=jnp.float32)
        return (out if self.bias is None else out + self.bias[...]).astype(x.dtype)


def rotary_angles(positions: Int[Array, "B L"], config: ModelConfig) -> Float[Array, "B L R2"]:
    """Angle of each pair of features that turns: position / rope_theta^(2i / rotary_dim), scaled if so configured."""
    exponents = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = scaled_frequencies(frequencies, config.rope_scaling)
    return positions[..., None].astype(jnp.float32) * frequencies


def scaled_frequencies(frequencies: Float[Array, "R2"], scaling: RopeScaling) -> Float[Array, "R2"]:
    """Frequencies in radians per token after Llama 3.1's scaling, see RopeScaling."""
    turns = frequencies * scaling.original_max_length / (2 * math.pi)
    between = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(between, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Float[Array, "B L H K"], angles: Float[Array, "B L R2"]) -> Float[Array, "B L H K"]:
    """Rotary embedding of the first 2 R2 features, half-split as in the Llama checkpoints: i turns with i + R2."""
    half = angles.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """x with a share of `rate` of its entries set to 0 and the others scaled up to keep the mean; x without a key.

    The mask depends on key and shape alone, not on how x is split over devices.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    # bfloat16 knows 1 / (1 - rate) to three digits only: the mean of every layer would be off by as much.
    return jnp.where(kept, x.astype(jnp.float32) / (1 - rate), 0.0).astype(x.dtype)
