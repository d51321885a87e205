"""The model as functions: plain dicts of arrays in, arrays out. No other package sees its NNX modules.

Parameters are `{"embed", "layers", "final_norm", "head"}` (no head when tied). Every array under "layers" has the layer
as its first axis, so that one compiled block is scanned over them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slm_jax import mesh
from slm_jax.models import cache, position_subset
from slm_jax.models.attention import chosen_backend
from slm_jax.models.cache import Cache
from slm_jax.models.layers import NORMS, PROJECTION, dropout, rotary_angles
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import PositionSubset
from slm_jax.models.transformer import AroundSubset, Block, Embedding, Head

Params = dict[str, Any]
Module = TypeVar("Module", bound=nnx.Module)


def init_params(config: ModelConfig, key: PRNGKeyArray | Int[Array, "2"]) -> Params:
    """Random float32 parameters; a key gives the same ones on any mesh."""
    embed_key, layers_key, head_key = jax.random.split(key, 3)

    def params_of(module: nnx.Module) -> Params:
        return nnx.to_pure_dict(nnx.state(module))

    layer_keys = jax.random.split(layers_key, config.num_layers)
    params = {
        "embed": params_of(Embedding(config, nnx.Rngs(params=embed_key))),
        "layers": jax.vmap(lambda k: params_of(Block(config, nnx.Rngs(params=k))))(layer_keys),
        "final_norm": params_of(NORMS[config.norm](config.embed_dim, config.norm_eps)),
    }
    if not config.tied_head:
        params["head"] = params_of(Head(config, nnx.Rngs(params=head_key)))
    return params


def param_shapes(config: ModelConfig, devices: Mesh | None = None) -> Params:
    """The tree of `init_params` as ShapeDtypeStructs, with their shardings where a mesh is given; allocates nothing."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return shapes if devices is None else mesh.sharded_shapes(shapes, devices)


def _module(build: Callable[[nnx.Rngs], Module], params: Params) -> Module:
    """A module with the given parameters. `build` is only traced: it allocates nothing."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return nnx.merge(graphdef, params)


def embed(params: Params, config: ModelConfig, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Token embeddings in the compute dtype."""
    return _module(lambda rngs: Embedding(config, rngs), params["embed"])(tokens)


def layers(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B L D"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B L D"]:
    """All blocks, as a scan, rematerialized as `config.remat` says; a key turns on the dropout of training."""
    angles = rotary_angles(positions, config)
    keys = None if dropout_key is None or not config.dropout else jax.random.split(dropout_key, config.num_layers)

    def block(x: jax.Array, layer_and_key: tuple[Params, jax.Array | None]) -> tuple[jax.Array, None]:
        layer, key = layer_and_key
        return _block(layer, config)(mesh.constrain(x, mesh.BATCH), angles, segment_ids, key)[0], None

    if config.remat == "full":
        block = jax.checkpoint(block)
    elif config.remat == "dots":
        block = jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(PROJECTION))
    return jax.lax.scan(block, x, (params["layers"], keys))[0]


def layer_inputs(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B L D"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
) -> tuple[Float[Array, "B L D"], Float[Array, "layer B L D"]]:
    """`layers`, and the input of each layer, from which a backward pass can recompute one layer after the other."""
    angles = rotary_angles(positions, config)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, jax.Array]:
        x = mesh.constrain(x, mesh.BATCH)
        return _block(layer, config)(x, angles, segment_ids)[0], x

    return jax.lax.scan(block, x, params["layers"])


def layer_at_subset(
    layer: Params,
    config: ModelConfig,
    x_subset: Float[Array, "S C D"],
    subset: PositionSubset,
    x: Float[Array, "B L D"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    by_quarter: bool = False,
) -> Float[Array, "S C D"]:
    """One block at a subset of positions, where its input is `x_subset`; elsewhere it is x.

    Equal in value to the whole block at these positions. Its gradient holds the keys and values of all other positions
    constant. `by_quarter`: only where `fits_quarters` is True.
    """
    angles = rotary_angles(positions, config)
    keys_values = jax.lax.stop_gradient(_block(layer, config).keys_values(x, angles))
    around = AroundSubset(subset, keys_values, angles, segment_ids, by_quarter)
    return _block(layer, config).at_subset(x_subset, around)


def fits_quarters(config: ModelConfig, subset: PositionSubset, num_rows: int, length: int) -> Bool[Array, ""] | None:
    """Whether `layer_at_subset` may compute `by_quarter`, which skips queries outside the subset.

    None where it never should: with a flash kernel, and for rows too short to be worth compiling a second program.
    """
    backend = chosen_backend(config.attention, length, config.head_dim, config.compute_dtype)
    if backend != "xla" or length < 512 or length % position_subset.QUARTERS:
        return None
    return position_subset.fits_quarters(subset, num_rows, length)


def _block(layer: Params, config: ModelConfig) -> Block:
    return _module(lambda rngs: Block(config, rngs), layer)


def final_norm(params: Params, config: ModelConfig, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """The hidden states that the head reads, from the last block's output."""
    return _module(lambda _: NORMS[config.norm](config.embed_dim, config.norm_eps), params["final_norm"])(x)


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B L D"]:
    """The last hidden state of each token, normed: the head reads it to predict the next token.

    A key turns on dropout at the rate of the config; take a new one for each step.
    """
    x = embed(params, config, tokens)
    if dropout_key is not None:
        dropout_key, embed_key = jax.random.split(dropout_key)
        x = dropout(x, config.dropout, embed_key)
    return final_norm(params, config, layers(params, config, x, positions, segment_ids, dropout_key))


def prefill(
    params: Params, config: ModelConfig, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], slots: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads prompts, padded on the right, into a cache of keys and values with `slots` (at least L) for each row.

    `lengths` is the number of tokens in each row, at least 1; those after them are ignored.

    Returns:
        The last hidden state of each row's last token, normed, and the cache.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    angles = rotary_angles(positions, config)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return _block(layer, config)(mesh.constrain(x, mesh.BATCH), angles, segment_ids)

    x, keys_values = jax.lax.scan(block, embed(params, config, tokens), params["layers"])
    # [layer, B, L, G, K] -> [layer, B, G, slots, K]: the token at position p is in slot p
    wider = ((0, 0), (0, 0), (0, 0), (0, slots - tokens.shape[1]), (0, 0))
    known = cache.place(Cache(*(jnp.pad(part.swapaxes(2, 3), wider) for part in keys_values)))
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
    return final_norm(params, config, last)[:, 0], known


def decode(
    params: Params, config: ModelConfig, tokens: Int[Array, "B"], positions: Int[Array, "B"], known: Cache
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads one more token of each row, at its position; the tokens before it are in the cache.

    Returns:
        The last hidden state of each token, normed, and the cache with these tokens in it.
    """
    angles = rotary_angles(positions[:, None], config)

    # The cache is carried, not scanned over: a scan would copy each layer's part of it to add one token.
    def block(carry: tuple[jax.Array, Cache], numbered: tuple[jax.Array, Params]) -> tuple[Any, None]:
        (x, known), (number, layer) = carry, numbered
        x = mesh.constrain(x, mesh.BATCH)
        return _block(layer, config).at_next_token(x, angles, known, number, positions), None

    numbers = jnp.arange(config.num_layers)
    (x, known), _ = jax.lax.scan(block, (embed(params, config, tokens[:, None]), known), (numbers, params["layers"]))
    return final_norm(params, config, x)[:, 0], known


def in_compute_dtype(params: Params, config: ModelConfig) -> Params:
    """The parameters with their matrices cast to the compute dtype, as every product casts them: results stay the same.

    For generation, where each new token reads all matrices from memory. Norms and biases are applied in float32 and
    stay as they are.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_matrix = mesh.path_name(path).endswith(("/kernel", "/embedding"))
        return leaf.astype(config.compute_dtype) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def head_matrix(params: Params, config: ModelConfig) -> Float[Array, "D V"]:
    """The float32 matrix from hidden states to logits."""
    return params["embed"]["embedding"].T if config.tied_head else params["head"]["kernel"]


def logits(params: Params, config: ModelConfig, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """All logits at once, for generation and tests; losses are computed in chunks by score/token_loss.py."""
    head = head_matrix(params, config)[:, : config.vocab_size]
    return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
