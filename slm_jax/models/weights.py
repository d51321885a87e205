"""Weights from elsewhere to our parameters on their devices, one tensor in host memory at a time."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slm_jax import mesh as mesh_lib
from slm_jax.errors import UserError
from slm_jax.mesh import path_name
from slm_jax.models.forward import Params, param_shapes
from slm_jax.models.huggingface import BUFFERS, Tensor, tensors, to_ours
from slm_jax.models.huggingface_config import read_config
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.tensor_files import Entry, dtype_of, open_tensors, read_tensor, some


@runtime_checkable
class Weights(Protocol):
    """What a format gives: the model, and its parameters in our layout."""

    config: ModelConfig

    def files(self) -> list[Path]: ...

    def dtype(self, path: str) -> np.dtype:
        """In which type the parameter `path` is kept."""
        ...

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The parameter `path`, of one layer where there are layers; its vocabulary not padded."""
        ...


class HuggingFaceWeights:
    """The weights of a Hugging Face model directory.

    Raises:
      UserError: config.json says what a ModelConfig cannot; tensors are missing, left over or of another shape.
    """

    def __init__(self, directory: Path):
        self.config = read_config(read_settings(directory / "config.json"), str(directory / "config.json"))
        self._shapes = _layer_shapes(self.config)
        expected = tensors(self.config)
        self._entries = _checked(open_tensors(directory), expected, self.config, directory)
        self._of: dict[tuple[str, int | None], Tensor] = {
            (path, tensor.layer): tensor for tensor in expected for path in tensor.paths
        }

    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self._entries.values()})

    def dtype(self, path: str) -> np.dtype:
        found = {dtype_of(self._entries[tensor.name]) for (ours, _), tensor in self._of.items() if ours == path}
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        tensor = self._of[path, layer]
        return to_ours(read_tensor(self._entries[tensor.name]), tensor, path, self._shapes[path])


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a model directory of Hugging Face") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged (not JSON): download it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged (not an object): download it again")
    return settings


def load_params(weights: Weights, model: ModelConfig, mesh: Mesh, done: Callable[[int], Any]) -> Params:
    """All parameters, sharded over the mesh by the table of slm_jax.mesh, each in the dtype in which it is kept.

    Host memory holds one tensor of one layer at a time; every process reads all of them and keeps its shards.

    Args:
      weights: where they come from.
      model: theirs, with or without a vocabulary padded to a multiple (with zeros).
      mesh: the devices.
      done: told of the bytes of every tensor.

    Raises:
      UserError: the mesh does not divide a shape.
    """

    def load(key_path: tuple[Any, ...], leaf: Any) -> jax.Array:
        path, dtype, sharding = path_name(key_path), weights.dtype(path_name(key_path)), leaf.sharding

        def read(layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
            array = weights.read(path, layer).astype(dtype, copy=False)
            done(array.nbytes)
            missing = [(0, want - has) for want, has in zip(shape, array.shape, strict=True)]
            return np.pad(array, missing) if array.shape != shape else array

        if not path.startswith("layers/"):
            return _put(read(None, leaf.shape), sharding)
        one = NamedSharding(mesh, mesh_lib.P(*sharding.spec[1:]))
        stacked = jax.jit(lambda: jnp.zeros(leaf.shape, dtype), out_shardings=sharding)()
        fill = jax.jit(jax.lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0, out_shardings=sharding)
        for layer in range(model.num_layers):
            stacked = fill(stacked, _put(read(layer, leaf.shape[1:]), one), layer, 0)
            stacked.block_until_ready()  # or the next layers would wait in host memory
        return stacked

    return jax.tree_util.tree_map_with_path(load, param_shapes(model, mesh))


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters, of one layer where there are layers."""
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(dataclasses.replace(model, vocab_multiple=1)))
    named = {path_name(path): leaf.shape for path, leaf in leaves}
    return {path: shape[1:] if path.startswith("layers/") else shape for path, shape in named.items()}


def _checked(there: dict[str, Entry], expected: list[Tensor], model: ModelConfig, directory: Path) -> dict[str, Entry]:
    """Those of the tensors there that are expected; constants are left out, and so is a head that is the embedding."""
    names = {tensor.name for tensor in expected}
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"{directory} lacks the tensors {some(sorted(missing))} of the model that config.json describes"
        )
    left = sorted(name for name in there if name not in names and not re.search(BUFFERS, name))
    if model.tied_head and left in (["lm_head.weight"], ["embed_out.weight"]):
        embedding = next(tensor.name for tensor in expected if tensor.paths == ("embed/embedding",))
        head, embedded = (read_tensor(there[name]) for name in (left[0], embedding))
        if head.shape != embedded.shape or not np.array_equal(head, embedded):
            raise UserError(
                f"{directory}: tie_word_embeddings is true, but {left[0]} is not {embedding}: correct config.json"
            )
        left = []
    if left:
        raise UserError(f"{directory} holds tensors of which this model has none: {some(left)}")
    for tensor in expected:
        dtype_of(there[tensor.name])
        if there[tensor.name].shape != tensor.shape:
            raise UserError(
                f"{directory}: {tensor.name} has shape {there[tensor.name].shape}, config.json makes it {tensor.shape}"
            )
    return {name: there[name] for name in names}
