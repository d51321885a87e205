"""The decoder: Embedding, Block, final norm and Head, as NNX modules used functionally (see forward.py)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slm_jax import mesh
from slm_jax.models.attention import attention
from slm_jax.models.attention_at import attention_at
from slm_jax.models.config import ModelConfig
from slm_jax.models.layers import Projection, RMSNorm, rotate
from slm_jax.models.rows import Rows


class Embedding(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.padded_vocab_size, config.embed_dim)
        self.embedding = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.dtype = config.compute_dtype

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        # Gathered over fsdp, not over model: each part of the vocabulary looks up its own; the sum of all is the row.
        table = mesh.constrain(self.embedding[...].astype(self.dtype), mesh.P("model"))
        return mesh.constrain(table[tokens], mesh.BATCH)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dim, heads, kv_heads, width = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        std = config.init_std
        self.query = Projection((dim, heads, width), 1, std, rngs)
        self.key = Projection((dim, kv_heads, width), 1, std, rngs)
        self.value = Projection((dim, kv_heads, width), 1, std, rngs)
        self.out = Projection((heads, width, dim), 2, output_std(config), rngs)
        self.window, self.backend = config.sliding_window, config.attention

    def keys_values(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L K2"]
    ) -> tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]:
        return rotate(self.key(x), angles), self.value(x)

    def __call__(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L K2"], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        query, (key, value) = rotate(self.query(x), angles), self.keys_values(x, angles)
        return self.out(attention(query, key, value, segment_ids, window=self.window, backend=self.backend))

    def at_rows(
        self,
        z: Float[Array, "S C D"],
        rows: Rows,
        others: tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]],
        angles: Float[Array, "B L K2"],
        segment_ids: Int[Array, "B L"],
        evenly: bool,
    ) -> Float[Array, "S C D"]:
        """The output at the rows, whose inputs are z; keys and values of all other positions are given."""
        turned = rows.take(angles)
        key, value = (rows.put(x, own) for x, own in zip(others, self.keys_values(z, turned), strict=True))
        query = rotate(self.query(z), turned)
        settings = {"window": self.window, "backend": self.backend, "evenly": evenly}
        return self.out(attention_at(query, rows, key, value, segment_ids, **settings))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.gate = Projection((config.embed_dim, config.mlp_dim), 1, config.init_std, rngs)
        self.up = Projection((config.embed_dim, config.mlp_dim), 1, config.init_std, rngs)
        self.down = Projection((config.mlp_dim, config.embed_dim), 1, output_std(config), rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L K2"], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        x = x + self.attention(self.attention_norm(x), angles, segment_ids)
        return x + self.mlp(self.mlp_norm(x))

    def keys_values(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L K2"]
    ) -> tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]:
        return self.attention.keys_values(self.attention_norm(x), angles)

    def at_rows(
        self,
        z: Float[Array, "S C D"],
        rows: Rows,
        others: tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]],
        angles: Float[Array, "B L K2"],
        segment_ids: Int[Array, "B L"],
        evenly: bool,
    ) -> Float[Array, "S C D"]:
        """The block's output at the rows, given their inputs z and the keys and values of the other positions."""
        z = z + self.attention.at_rows(self.attention_norm(z), rows, others, angles, segment_ids, evenly)
        return z + self.mlp(self.mlp_norm(z))


class Head(nnx.Module):
    """The matrix from hidden states to vocabulary logits; token_loss applies it in chunks."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.padded_vocab_size)
        self.kernel = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32))


def output_std(config: ModelConfig) -> float:
    """Projections back into the residual stream start smaller, so that its variance does not grow with depth."""
    return config.init_std / (2 * config.num_layers) ** 0.5
