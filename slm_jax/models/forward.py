"""The only door to the model: plain dicts of arrays in, arrays out.

Parameters are `{"embed", "layers", "final_norm", "head"}` (no head when tied); every array under "layers" has the layer
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
from slm_jax.models import cache, query_subset_attention
from slm_jax.models.attention import chosen_backend
from slm_jax.models.cache import Cache
from slm_jax.models.layers import NORMS, PROJECTION, dropout, rotary_angles
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import Rows
from slm_jax.models.transformer import Block, Embedding, Head

Params = dict[str, Any]
Module = TypeVar("Module", bound=nnx.Module)


def init_params(config: ModelConfig, key: PRNGKeyArray | Int[Array, "2"]) -> Params:
    """Random float32 parameters; the same for the same key on any mesh."""
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
    """A module with the given parameters: its structure is built abstractly, its own values never exist."""
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
    """All blocks, scanned, each rematerialised as `config.remat` says; with a key, with the dropout of training."""
    angles = rotary_angles(positions, config)
    keys = None if dropout_key is None or not config.dropout else jax.random.split(dropout_key, config.num_layers)

    def block(x: jax.Array, layer_and_key: tuple[Params, jax.Array | None]) -> tuple[jax.Array, None]:
        layer, key = layer_and_key
        return _block(layer, config)(mesh.constrain(x, mesh.BATCH), angles, segment_ids, key), None

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
    """`layers`, and the input of each of them: what a backward pass layer by layer starts from."""
    angles = rotary_angles(positions, config)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, jax.Array]:
        x = mesh.constrain(x, mesh.BATCH)
        return _block(layer, config)(x, angles, segment_ids), x

    return jax.lax.scan(block, x, params["layers"])


def layer_at(
    layer: Params,
    config: ModelConfig,
    z: Float[Array, "S C D"],
    rows: Rows,
    x: Float[Array, "B L D"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    evenly: bool = False,
) -> Float[Array, "S C D"]:
    """One block at some rows of its input x, whose values are z; no gradient reaches the other positions.

    Equal in value to the whole block; its gradient holds the keys and values of the other positions constant.
    `evenly`: as `spread_evenly` found; where it said nothing, False.
    """
    angles = rotary_angles(positions, config)
    others = _block(layer, config).keys_values(x, angles)
    return _block(layer, config).at_rows(z, rows, jax.lax.stop_gradient(others), angles, segment_ids, evenly)


def spread_evenly(config: ModelConfig, rows: Rows, num_sequences: int, length: int) -> Bool[Array, ""] | None:
    """Whether the rows lie along the sequences such that `layer_at` may leave out queries; None where nothing depends
    on it: for flash kernels, and for rows so short that the second program is not worth its compilation."""
    backend = chosen_backend(config.attention, length, config.head_dim, config.compute_dtype)
    if backend != "xla" or length < 512 or length % query_subset_attention.QUARTERS:
        return None
    return query_subset_attention.spread_evenly(rows, num_sequences, length)


def _block(layer: Params, config: ModelConfig) -> Block:
    return _module(lambda rngs: Block(config, rngs), layer)


def final_norm(params: Params, config: ModelConfig, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """What the head reads, from the last block's output."""
    return _module(lambda _: NORMS[config.norm](config.embed_dim, config.norm_eps), params["final_norm"])(x)


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B L D"]:
    """The normed last hidden state of each token: what the head reads to predict the token after it.

    A key, one for each step, turns on dropout at the rate of the config; without one there is none.
    """
    x = embed(params, config, tokens)
    if dropout_key is not None:
        dropout_key, embed_key = jax.random.split(dropout_key)
        x = dropout(x, config.dropout, embed_key)
    return final_norm(params, config, layers(params, config, x, positions, segment_ids, dropout_key))


def prefill(
    params: Params, config: ModelConfig, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], slots: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads prompts, padded on the right, and keeps what later tokens read of them.

    Args:
        params: parameters.
        config: of the model.
        tokens: ids; behind the first `lengths` of a row, anything.
        lengths: tokens of each row, at least 1.
        slots: how many tokens a row of the cache holds, prompt and new ones; at least L.

    Returns:
        The normed last hidden state of each row's last token, and the cache.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    angles = rotary_angles(positions, config)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return _block(layer, config).and_keys_values(mesh.constrain(x, mesh.BATCH), angles, segment_ids)

    x, keys_values = jax.lax.scan(block, embed(params, config, tokens), params["layers"])
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
    return final_norm(params, config, last)[:, 0], cache.of_prompts(*keys_values, slots)


def decode(
    params: Params, config: ModelConfig, tokens: Int[Array, "B"], positions: Int[Array, "B"], known: Cache
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads one more token of each row, at its position; those before it are in the cache.

    Returns:
        The normed last hidden state of each token, and the cache with these tokens in it.
    """
    angles = rotary_angles(positions[:, None], config)

    # Carried, not scanned over: the scan would copy every layer's part of it for the sake of one token.
    def block(carry: tuple[jax.Array, Cache], numbered: tuple[jax.Array, Params]) -> tuple[Any, None]:
        (x, known), (number, layer) = carry, numbered
        return _block(layer, config).over_cache(mesh.constrain(x, mesh.BATCH), angles, known, number, positions), None

    numbers = jnp.arange(config.num_layers)
    (x, known), _ = jax.lax.scan(block, (embed(params, config, tokens[:, None]), known), (numbers, params["layers"]))
    return final_norm(params, config, x)[:, 0], known


def in_compute_dtype(params: Params, config: ModelConfig) -> Params:
    """The parameters with their matrices in the dtype that products take them in, which changes no result: a new token
    reads each of them whole, and needs no more bytes of it. Norms and biases are added in float32 and stay."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_matrix = mesh.path_name(path).endswith(("/kernel", "/embedding"))
        return leaf.astype(config.compute_dtype) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def head_matrix(params: Params, config: ModelConfig) -> Float[Array, "D V"]:
    """The float32 matrix from hidden states to logits."""
    return params["embed"]["embedding"].T if config.tied_head else params["head"]["kernel"]


def logits(params: Params, config: ModelConfig, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """All logits at once: for generation and tests; losses go through score.token_loss."""
    head = head_matrix(params, config)[:, : config.vocab_size]
    return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
