"""Loads the weights of another format as parameters on devices, with one tensor in host memory at a time."""

import math
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
from slm_jax.models.huggingface import BUFFERS, Tensor, layer_shapes, tensors, to_ours
from slm_jax.models.huggingface_config import read_config
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.tensor_files import dtype_of, open_tensors, read_json_object, read_tensor, some


@runtime_checkable
class Weights(Protocol):
    """A model in another format, read parameter by parameter in our layout."""

    config: ModelConfig

    def files(self) -> list[Path]: ...

    def dtype(self, path: str) -> np.dtype:
        """The dtype in which the parameter `path` is stored."""
        ...

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The parameter `path`, of one layer if it has layers, without padding of the vocabulary."""
        ...


class HuggingFaceWeights:
    """The weights of a Hugging Face model directory.

    Raises:
      UserError: config.json describes a model that a ModelConfig cannot express; tensors are missing, left over or of
        another shape.
    """

    def __init__(self, directory: Path):
        where = directory / "config.json"
        self.config = read_config(read_json_object(where), str(where))
        found = open_tensors(directory)
        # Before anything is made of the sizes in config.json: they may be absurd.
        wanted, there = self.config.parameter_count(), sum(math.prod(entry.shape) for entry in found.values())
        if wanted > 10 * there:
            raise UserError(
                "weights-mismatch",
                f"{where} describes a model of {wanted:,} parameters, the files beside it hold {there:,}: correct its "
                "sizes, or download the other files",
            )
        self._shapes = layer_shapes(self.config)
        expected = tensors(self.config)

        # ---- The expected tensors. Only constants, or a head that equals the embedding, may be left over.
        names = {tensor.name for tensor in expected}
        if missing := [name for name in names if name not in found]:
            raise UserError(
                "weights-mismatch",
                f"{directory} lacks the tensors {some(sorted(missing))} of the model that config.json describes: "
                "download its other files",
            )
        left = sorted(name for name in found if name not in names and not re.search(BUFFERS, name))
        if self.config.tied_head and left in (["lm_head.weight"], ["embed_out.weight"]):
            embedding = next(tensor.name for tensor in expected if tensor.paths == ("embed/embedding",))
            head, embedded = (read_tensor(found[name]) for name in (left[0], embedding))
            if head.shape != embedded.shape or not np.array_equal(head, embedded):
                raise UserError(
                    "weights-mismatch",
                    f"{directory}: tie_word_embeddings is true, but {left[0]} is not {embedding}: correct config.json",
                )
            left = []
        if left:
            raise UserError(
                "weights-mismatch",
                f"{directory} has tensors that its config.json does not describe: {some(left)}: correct config.json",
            )
        for tensor in expected:
            dtype_of(found[tensor.name])
            if found[tensor.name].shape != tensor.shape:
                raise UserError(
                    "weights-mismatch",
                    f"{directory}: {tensor.name} has shape {found[tensor.name].shape}, {tensor.shape} by config.json: "
                    "correct it",
                )
        self._entries = {name: found[name] for name in names}
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


def load_params(weights: Weights, model: ModelConfig, mesh: Mesh, done: Callable[[int], Any]) -> Params:
    """Loads all parameters, sharded over the mesh, each in the dtype in which it is stored.

    Host memory holds one tensor of one layer at a time; every process reads all of them and keeps its shards.

    Args:
      weights: where they come from.
      model: their config; its vocab_multiple may differ, and pads the vocabulary with zeros.
      done: called with the number of bytes of each tensor.

    Raises:
      UserError: a value is NaN or infinite, or the mesh does not divide a shape.
    """

    def load(key_path: tuple[Any, ...], leaf: Any) -> jax.Array:
        path, dtype, sharding = path_name(key_path), weights.dtype(path_name(key_path)), leaf.sharding

        def read(layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
            array = weights.read(path, layer).astype(dtype, copy=False)
            if wrong := array.size - int(np.isfinite(array).sum()):
                of_layer = "" if layer is None else f" of layer {layer}"
                raise UserError(
                    "weights-not-finite",
                    f"{weights.files()[0].parent}: {wrong:,} of the {array.size:,} values of {path}{of_layer} are NaN "
                    "or infinite: download the model again, or take another",
                )
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
            stacked.block_until_ready()  # otherwise the next layers would pile up in host memory
        return stacked

    return jax.tree_util.tree_map_with_path(load, param_shapes(model, mesh))


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
