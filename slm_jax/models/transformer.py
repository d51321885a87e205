"""The decoder: Embedding, Block, final norm and Head, as NNX modules used functionally (see forward.py)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from slm_jax.models.attention import attention
from slm_jax.models.cache import Cache, cached_attention, write
from slm_jax.models.layers import NORMS, Projection, dropout, lookup, rotate
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import Rows
from slm_jax.models.query_subset_attention import query_subset_attention


class Embedding(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.padded_vocab_size, config.embed_dim)
        self.embedding = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.dtype = config.compute_dtype

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return lookup(self.embedding[...], tokens, self.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dim, heads, kv_heads, width = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        std, bias = config.init_std, config.attention_bias
        self.query = Projection((dim, heads, width), 1, std, rngs, bias)
        self.key = Projection((dim, kv_heads, width), 1, std, rngs, bias)
        self.value = Projection((dim, kv_heads, width), 1, std, rngs, bias)
        self.out = Projection((heads, width, dim), 2, output_std(config), rngs, config.output_bias)
        self.query_norm = NORMS[config.norm](width, config.norm_eps) if config.query_key_norm else None
        self.key_norm = NORMS[config.norm](width, config.norm_eps) if config.query_key_norm else None
        self.window, self.backend = config.sliding_window, config.attention

    def queries(self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"]) -> Float[Array, "B L H K"]:
        query = self.query(x)
        return rotate(query if self.query_norm is None else self.query_norm(query), angles)

    def keys_values(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"]
    ) -> tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]:
        key = self.key(x)
        return rotate(key if self.key_norm is None else self.key_norm(key), angles), self.value(x)

    def __call__(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        return self.and_keys_values(x, angles, segment_ids)[0]

    def and_keys_values(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"], segment_ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]]:
        """The output, and what later tokens read of these."""
        query, (key, value) = self.queries(x, angles), self.keys_values(x, angles)
        attended = attention(query, key, value, segment_ids, window=self.window, backend=self.backend)
        return self.out(attended), (key, value)

    def over_cache(
        self,
        x: Float[Array, "B 1 D"],
        angles: Float[Array, "B 1 R2"],
        cache: Cache,
        layer: Int[Array, ""],
        positions: Int[Array, "B"],
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """The output at one more token of each row, and the cache with that token in it."""
        cache = write(cache, layer, *self.keys_values(x, angles), positions)
        return self.out(cached_attention(self.queries(x, angles), cache, layer, positions, self.window)), cache

    def at_rows(
        self,
        z: Float[Array, "S C D"],
        rows: Rows,
        others: tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]],
        angles: Float[Array, "B L R2"],
        segment_ids: Int[Array, "B L"],
        evenly: bool,
    ) -> Float[Array, "S C D"]:
        """The output at the rows, whose inputs are z; keys and values of all other positions are given."""
        turned = rows.take(angles)
        key, value = (rows.put(x, own) for x, own in zip(others, self.keys_values(z, turned), strict=True))
        query = self.queries(z, turned)
        settings = {"window": self.window, "backend": self.backend, "evenly": evenly}
        return self.out(query_subset_attention(query, rows, key, value, segment_ids, **settings))


class MLP(nnx.Module):
    """swiglu: down(silu(gate(x)) * up(x)). gelu: down(gelu(up(x))), with the error function, not tanh."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        into, back = (config.embed_dim, config.mlp_dim), (config.mlp_dim, config.embed_dim)
        std, bias = config.init_std, config.mlp_bias
        self.gate = Projection(into, 1, std, rngs, bias) if config.mlp == "swiglu" else None
        self.up = Projection(into, 1, std, rngs, bias)
        self.down = Projection(back, 1, output_std(config), rngs, bias)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with a parallel residual, x + attention(norm(x)) + mlp(norm(x)).

    The two norms are apart in either case.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = NORMS[config.norm](config.embed_dim, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = NORMS[config.norm](config.embed_dim, config.norm_eps)
        self.mlp = MLP(config, rngs)
        self.parallel, self.dropout = config.parallel_residual, config.dropout

    def __call__(
        self,
        x: Float[Array, "B L D"],
        angles: Float[Array, "B L R2"],
        segment_ids: Int[Array, "B L"],
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B L D"]:
        attended = self.attention(self.attention_norm(x), angles, segment_ids)
        return self._join(x, attended, dropout_key)

    def _join(
        self, x: Float[Array, "B L D"], attended: Float[Array, "B L D"], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B L D"]:
        """The stream x with what attention adds to it and what the MLP then adds."""
        attention_key, mlp_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        joined = x + dropout(attended, self.dropout, attention_key)
        added = self.mlp(self.mlp_norm(x if self.parallel else joined))
        return joined + dropout(added, self.dropout, mlp_key)

    def keys_values(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"]
    ) -> tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]:
        return self.attention.keys_values(self.attention_norm(x), angles)

    def and_keys_values(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"], segment_ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]]:
        """The block's output, and the keys and values that later tokens read of these."""
        attended, keys_values = self.attention.and_keys_values(self.attention_norm(x), angles, segment_ids)
        return self._join(x, attended), keys_values

    def over_cache(
        self,
        x: Float[Array, "B 1 D"],
        angles: Float[Array, "B 1 R2"],
        cache: Cache,
        layer: Int[Array, ""],
        positions: Int[Array, "B"],
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """The block's output at one more token of each row, and the cache with that token in it."""
        attended, cache = self.attention.over_cache(self.attention_norm(x), angles, cache, layer, positions)
        return self._join(x, attended), cache

    def at_rows(
        self,
        z: Float[Array, "S C D"],
        rows: Rows,
        others: tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]],
        angles: Float[Array, "B L R2"],
        segment_ids: Int[Array, "B L"],
        evenly: bool,
    ) -> Float[Array, "S C D"]:
        """The block's output at the rows, given their inputs z and the keys and values of the other positions."""
        attended = self.attention.at_rows(self.attention_norm(z), rows, others, angles, segment_ids, evenly)
        return self._join(z, attended)


class Head(nnx.Module):
    """The matrix from hidden states to vocabulary logits; token_loss applies it in chunks."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.padded_vocab_size)
        self.kernel = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32))


def output_std(config: ModelConfig) -> float:
    """Projections back into the residual stream start smaller, so that its variance does not grow with depth."""
    return config.output_init_std or config.init_std / (2 * config.num_layers) ** 0.5
