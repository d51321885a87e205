"""Norms, rotary embedding, projections. Pure modules: a Variable is never written after construction."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * rms * self.scale[...]).astype(x.dtype)


class Projection(nnx.Module):
    """A matrix between named groups of axes, without bias; contracts the last `num_in` axes of the input."""

    def __init__(self, shape: tuple[int, ...], num_in: int, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.num_in = num_in

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        # Asking for float32 out of the product doubles bfloat16's speed on CPU and is what accelerators do anyway.
        return jnp.tensordot(x, kernel, axes=self.num_in, preferred_element_type=jnp.float32).astype(x.dtype)


def rotary_angles(positions: Int[Array, "B L"], head_dim: int, theta: float) -> Float[Array, "B L K2"]:
    """Angle of each pair of features: position / theta^(2i / head_dim)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x: Float[Array, "B L H K"], angles: Float[Array, "B L K2"]) -> Float[Array, "B L H K"]:
    """Rotary embedding in the half-split layout of the Llama checkpoints: feature i turns with i + head_dim / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
