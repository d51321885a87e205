"""Norms, lookup, projections, rotary embedding, dropout. Pure modules: no Variable is written after construction."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from slm_jax import mesh
from slm_jax.models.model_config import ModelConfig, RopeScaling


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
PROJECTION = "projection"  # the name by which rematerialization may keep an activation


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*BX"], kernel: Float[Array, "*XY"], num_in: int) -> Float[Array, "*BY"]:
    """x times a kernel over the last `num_in` axes of x: operands in the dtype of x, sums in float32.

    The gradient is written out (reverse mode only): that of the kernel is one product over all tokens in float32, never
    rounded to bfloat16, and in the layout of the kernel. JAX would transpose it by a copy, a tenth of a step on CPU.
    """
    # A float32 result doubles the speed of bfloat16 products on CPU; accelerators compute it anyway.
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=num_in, preferred_element_type=jnp.float32)


def _product_backward(num_in: int, saved: tuple[Array, Array], d_out: Float[Array, "*BY"]) -> tuple[Array, Array]:
    x, kernel = saved
    d_out, tokens = d_out.astype(x.dtype), tuple(range(x.ndim - num_in))
    into, out = tuple(range(num_in, kernel.ndim)), tuple(range(len(tokens), d_out.ndim))
    d_x = jnp.tensordot(d_out, kernel.astype(x.dtype), axes=(out, into), preferred_element_type=jnp.float32)
    d_kernel = jnp.tensordot(x, d_out, axes=(tokens, tokens), preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


product.defvjp(lambda x, kernel, num_in: (product(x, kernel, num_in), (x, kernel)), _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B L"], dtype: DTypeLike) -> Float[Array, "B L D"]:
    """Rows of a table, in another dtype.

    The gradient is summed in float32: in bfloat16 a sum of ones stops at 256, and frequent tokens occur in a batch far
    more often than that.
    """
    # The table is gathered over fsdp but not over model: each part of the vocabulary looks up its own tokens, and the
    # sum over the parts is the row.
    return mesh.constrain(mesh.constrain(table.astype(dtype), mesh.P("model"))[tokens], mesh.BATCH)


def _lookup_backward(dtype: DTypeLike, saved: tuple[Array, Array], d_rows: Float[Array, "B L D"]) -> tuple[Array, None]:
    table, tokens = saved
    zeros = jnp.zeros(table.shape, jnp.float32)
    add = jax.vmap(lambda tokens, d_rows: zeros.at[tokens].add(d_rows))  # [S, N], [S, N, D] -> [S, V, D]
    parts = add(mesh.by_shard(tokens), mesh.by_shard(d_rows.astype(jnp.float32)))
    return mesh.sum_over_shards(parts, mesh.P("model", "fsdp")).astype(table.dtype), None


lookup.defvjp(lambda table, tokens, dtype: (lookup(table, tokens, dtype), (table, tokens)), _lookup_backward)


class Projection(nnx.Module):
    """A matrix whose first `num_in` axes are contracted with the last ones of the input. A bias starts at 0."""

    def __init__(self, shape: tuple[int, ...], num_in: int, std: float, rngs: nnx.Rngs, bias: bool = False):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape[num_in:], jnp.float32)) if bias else None
        self.num_in = num_in

    def __call__(self, x: jax.Array) -> jax.Array:
        out: jax.Array = product(x, self.kernel[...], self.num_in)
        out = (out if self.bias is None else out + self.bias[...]).astype(x.dtype)
        return checkpoint_name(out, PROJECTION)


def rotary_angles(positions: Int[Array, "B L"], config: ModelConfig) -> Float[Array, "B L R2"]:
    """Angle of each pair of features that turns: position / rope_theta^(2i / rotary_dim); see also RopeScaling."""
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
    """x with a fraction `rate` of its entries set to 0 and the others scaled up to keep the mean; just x without a key.

    The mask depends only on key and shape, not on how x is split over devices.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    # bfloat16 holds 1 / (1 - rate) to three digits only, and the mean of every layer would be off by that much.
    return jnp.where(kept, x.astype(jnp.float32) / (1 - rate), 0.0).astype(x.dtype)
