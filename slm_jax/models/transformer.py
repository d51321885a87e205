"""The decoder: Embedding, Block and Head, as NNX modules that forward.py uses as functions of their parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from slm_jax.models.attention import attention
from slm_jax.models.cache import Cache, cached_attention, write
from slm_jax.models.layers import NORMS, Projection, dropout, lookup, rotate
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import PositionSubset, query_subset_attention

KeysValues = tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]


class AroundSubset(NamedTuple):
    """What a block reads at a subset of positions, besides its input there.

    keys_values: of all positions; those of the subset are replaced by the ones computed from its input.
    by_quarter: see `query_subset_attention`.
    """

    subset: PositionSubset
    keys_values: KeysValues
    angles: Float[Array, "B L R2"]
    segment_ids: Int[Array, "B L"]
    by_quarter: bool


class Embedding(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.padded_vocab_size, config.embed_dim)
        self.embedding = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.dtype = config.compute_dtype

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return lookup(self.embedding[...], tokens, self.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding: H query heads share G heads of keys and values."""

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

    def keys_values(self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"]) -> KeysValues:
        key = self.key(x)
        return rotate(key if self.key_norm is None else self.key_norm(key), angles), self.value(x)

    def __call__(
        self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"], segment_ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], KeysValues]:
        """The output, and the keys and values for a cache."""
        query, (key, value) = self.queries(x, angles), self.keys_values(x, angles)
        attended = attention(query, key, value, segment_ids, window=self.window, backend=self.backend)
        return self.out(attended), (key, value)

    def at_next_token(
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

    def at_subset(self, x: Float[Array, "S C D"], around: AroundSubset) -> Float[Array, "S C D"]:
        """The output at a subset of positions with input x."""
        subset, angles = around.subset, around.subset.gather(around.angles)
        key, value = (
            subset.replace(every, own)
            for every, own in zip(around.keys_values, self.keys_values(x, angles), strict=True)
        )
        settings = {"window": self.window, "backend": self.backend, "by_quarter": around.by_quarter}
        query = self.queries(x, angles)
        return self.out(query_subset_attention(query, subset, key, value, around.segment_ids, **settings))


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

    Attention and mlp have separate norms in both cases.
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
    ) -> tuple[Float[Array, "B L D"], KeysValues]:
        """The output, and the keys and values for a cache."""
        attended, keys_values = self.attention(self.attention_norm(x), angles, segment_ids)
        return self._add(x, attended, dropout_key), keys_values

    def _add(
        self, x: Float[Array, "B L D"], attended: Float[Array, "B L D"], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B L D"]:
        """The residual stream x plus attention's output and the MLP's."""
        attention_key, mlp_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        added = x + dropout(attended, self.dropout, attention_key)
        from_mlp = self.mlp(self.mlp_norm(x if self.parallel else added))
        return added + dropout(from_mlp, self.dropout, mlp_key)

    def keys_values(self, x: Float[Array, "B L D"], angles: Float[Array, "B L R2"]) -> KeysValues:
        return self.attention.keys_values(self.attention_norm(x), angles)

    def at_next_token(
        self,
        x: Float[Array, "B 1 D"],
        angles: Float[Array, "B 1 R2"],
        cache: Cache,
        layer: Int[Array, ""],
        positions: Int[Array, "B"],
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """The output at one more token of each row, and the cache with that token in it."""
        attended, cache = self.attention.at_next_token(self.attention_norm(x), angles, cache, layer, positions)
        return self._add(x, attended), cache

    def at_subset(self, x: Float[Array, "S C D"], around: AroundSubset) -> Float[Array, "S C D"]:
        """The output at a subset of positions with input x."""
        return self._add(x, self.attention.at_subset(self.attention_norm(x), around))


class Head(nnx.Module):
    """The matrix from hidden states to logits; score/token_loss.py applies it in chunks."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.padded_vocab_size)
        self.kernel = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32))


def output_std(config: ModelConfig) -> float:
    """Projections back into the residual stream start smaller, so that its variance does not grow with depth."""
    return config.output_init_std or config.init_std / (2 * config.num_layers) ** 0.5
