"""Names and layouts of a model's tensors in Hugging Face's files and in our parameter tree, both ways; reads no files.

Families: Llama 2 and 3, Mistral, Qwen2 and 2.5, Qwen3, all with the same names, and GPT-NeoX (Pythia). A matrix of
theirs is [out, in]; ours is [in, out] with separate axes for heads, and layers are stacked.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from slm_jax.mesh import path_name
from slm_jax.models.forward import param_shapes
from slm_jax.models.model_config import ModelConfig

# Our module -> theirs; {} is the number of the layer.
_LLAMA = {
    "embed": "model.embed_tokens",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/attention/query": "model.layers.{}.self_attn.q_proj",
    "layers/attention/key": "model.layers.{}.self_attn.k_proj",
    "layers/attention/value": "model.layers.{}.self_attn.v_proj",
    "layers/attention/query_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attention/key_norm": "model.layers.{}.self_attn.k_norm",
    "layers/attention/out": "model.layers.{}.self_attn.o_proj",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
# Query, key and value are one tensor, those of the first head before those of the second.
_GPT_NEOX = {
    "embed": "gpt_neox.embed_in",
    "layers/attention_norm": "gpt_neox.layers.{}.input_layernorm",
    "layers/attention/query": "gpt_neox.layers.{}.attention.query_key_value",
    "layers/attention/key": "gpt_neox.layers.{}.attention.query_key_value",
    "layers/attention/value": "gpt_neox.layers.{}.attention.query_key_value",
    "layers/attention/out": "gpt_neox.layers.{}.attention.dense",
    "layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "layers/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "layers/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
_TOGETHER = ("query", "key", "value")

# Constants that older versions of transformers saved among the weights, as a regular expression of their names.
BUFFERS = r"\.rotary_emb\.inv_freq$|\.attention\.(bias|masked_bias)$"


class Tensor(NamedTuple):
    """A tensor of theirs, with the parameters of ours that it holds (one; or query, key and value) and their layer."""

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    layer: int | None


def layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of our parameters, of one layer if it has layers, without padding of the vocabulary."""
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(dataclasses.replace(model, vocab_multiple=1)))
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    return {path: shape[1:] if path.startswith("layers/") else shape for path, shape in shapes.items()}


def tensors(model: ModelConfig) -> list[Tensor]:
    """All tensors of a model by their names, without the padding of our vocabulary to `vocab_multiple`."""
    table = _GPT_NEOX if model.norm == "layer" else _LLAMA
    held: dict[str, dict[str, tuple[int, ...]]] = {}  # their name -> our path -> the shape of its part
    for path, shape in layer_shapes(model).items():
        module, _, kind = path.rpartition("/")
        if kind == "kernel":
            num_in = _num_in(path)
            shape = (math.prod(shape[num_in:]), math.prod(shape[:num_in]))  # [in, heads, width] -> [out, in]
        elif path != "embed/embedding":
            shape = (math.prod(shape),)
        held.setdefault(f"{table[module]}.{'bias' if kind == 'bias' else 'weight'}", {})[path] = shape
    found = []
    for name, shapes in held.items():
        paths = tuple(sorted(shapes, key=lambda path: [part in path for part in reversed(_TOGETHER)]))
        out, *inner = shapes[paths[0]]
        for layer in range(model.num_layers) if "{}" in name else (None,):
            found.append(Tensor(name.format(layer), (len(paths) * out, *inner), paths, layer))
    return sorted(found, key=lambda tensor: (tensor.layer is not None, tensor.layer or 0))


def to_ours(array: np.ndarray, tensor: Tensor, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Our parameter `path` for one layer, of the given shape, from a tensor of theirs; a view if possible."""
    if len(tensor.paths) > 1:
        apart = array.reshape(shape[-2], len(tensor.paths), -1, *array.shape[1:])
        array = apart[:, tensor.paths.index(path)]
    return in_first(array, path, shape)


def in_first(array: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of our shape from an array whose matrix is [out, in]."""
    if not path.endswith("kernel"):
        return array.reshape(shape)
    num_in = _num_in(path)
    return np.moveaxis(array.reshape(*shape[num_in:], *shape[:num_in]), range(-num_in, 0), range(num_in))


def to_theirs(arrays: Sequence[np.ndarray], tensor: Tensor) -> np.ndarray:
    """A tensor of theirs from our arrays, the ones of `tensor.paths` at its layer."""
    parts = []
    for path, array in zip(tensor.paths, arrays, strict=True):
        num_in = _num_in(path)
        parts.append(np.moveaxis(array, range(num_in), range(-num_in, 0)) if path.endswith("kernel") else array)
    whole = np.stack(parts, axis=1) if len(parts) > 1 else parts[0]
    if tensor.layer is None:
        whole = whole[: tensor.shape[0]]
    return np.ascontiguousarray(whole.reshape(tensor.shape))


def _num_in(path: str) -> int:
    """The number of input axes of a kernel of ours."""
    return 2 if path.endswith("attention/out/kernel") else 1
