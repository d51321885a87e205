"""The `.bin` files of llama2.c: a Llama in float32, one kind of matrix after the other, each for all layers.

Version 0 begins with seven 32-bit numbers: width, width of the MLP, layers, heads, key-value heads, vocabulary, longest
row; a vocabulary below 0 says that the head is not the embedding. Version 1 begins with a magic number, the version,
the same seven, and one byte that says whether the head is the embedding, and is filled up to 256 bytes. The kinds have
no names and stand in another order in either version.

Features of a head that turn together are neighbours there; here, as in Hugging Face's files, they are half a head
apart.
"""

import math
import os
import struct
from pathlib import Path

import numpy as np

from slm_jax.errors import UserError
from slm_jax.models.model_config import ModelConfig

MAGIC = 0x616B3432
_HEADER = struct.Struct("<7i")
_HEADER_BYTES = 256  # of version 1
_ATTENTION = tuple(f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out"))
_MLP = tuple(f"layers/mlp/{name}/kernel" for name in ("gate", "down", "up"))
_NORMS = ("layers/attention_norm/scale", "layers/mlp_norm/scale")
_TABLES = "cosines and sines"  # of version 0, by position; not read
_ORDER = {
    0: ("embed/embedding", _NORMS[0], *_ATTENTION, _NORMS[1], *_MLP, "final_norm/scale", _TABLES, "head/kernel"),
    1: (*_NORMS, "final_norm/scale", "embed/embedding", *_ATTENTION, *_MLP, "head/kernel"),
}


class Llama2cFile:
    """The weights of a file of llama2.c, version 0 or 1 (see slm_jax.models.weights.Weights).

    Raises:
      UserError: another version (2 is quantized), or the file is not as long as its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
        version, numbers, shared, begin = _read_header(head, path)
        dim, mlp_dim, num_layers, num_heads, num_kv_heads, vocab_size, max_length = numbers
        if min(numbers) < 1 or dim % num_heads or num_heads % num_kv_heads:
            raise UserError(f"{path} is no model of llama2.c: its header says {', '.join(map(str, numbers))}")
        self.config = ModelConfig(
            vocab_size,
            num_layers=num_layers,
            embed_dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim // num_heads,
            mlp_dim=mlp_dim,
            max_length=max_length,
            tied_head=shared,
        )
        self._shapes = _their_shapes(self.config)
        self._begins: dict[str, int] = {}
        for name in _ORDER[version]:
            if name in self._shapes:
                self._begins[name] = begin
                layers = num_layers if name.startswith("layers/") else 1
                begin += 4 * layers * math.prod(self._shapes[name])
        if begin != os.path.getsize(path):
            raise UserError(
                f"{path} has {os.path.getsize(path):,} bytes, as a model of llama2.c (version {version}) its header "
                f"asks for {begin:,}: it is something else, or half downloaded"
            )

    def files(self) -> list[Path]:
        return [self.path]

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        shape = self._shapes[path]
        offset = self._begins[path] + 4 * (layer or 0) * math.prod(shape)
        array = np.fromfile(self.path, "<f4", math.prod(shape), offset=offset).reshape(shape)
        model, parts = self.config, path.split("/")
        if parts[-1] != "kernel":
            return array
        if parts[-2] == "out":
            return array.T.reshape(model.num_heads, model.head_dim, model.embed_dim)
        if parts[-2] in ("query", "key"):  # neighbours to half a head apart
            array = array.reshape(-1, model.head_dim // 2, 2, model.embed_dim).swapaxes(1, 2)
        if parts[1] == "attention":
            return np.moveaxis(array.reshape(-1, model.head_dim, model.embed_dim), -1, 0)
        return array.T


def _read_header(head: bytes, path: Path) -> tuple[int, tuple[int, ...], bool, int]:
    """Version, the seven numbers, whether the head is the embedding, and where the matrices begin."""
    head = head.ljust(_HEADER_BYTES, b"\0")
    magic, version = struct.unpack_from("<Ii", head)
    if magic != MAGIC:
        *numbers, vocab_size, max_length = _HEADER.unpack_from(head)
        return 0, (*numbers, abs(vocab_size), max_length), vocab_size > 0, _HEADER.size
    if version != 1:
        raise UserError(f"{path} has version {version} of llama2.c's format: 0 and 1 are read; 2 is quantized")
    return version, _HEADER.unpack_from(head, 8), bool(head[8 + _HEADER.size]), _HEADER_BYTES


def _their_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of each kind, of one layer."""
    dim, width = model.embed_dim, model.head_dim
    heads, kv_heads = model.num_heads * width, model.num_kv_heads * width
    assert model.vocab_size is not None
    shapes = {
        "embed/embedding": (model.vocab_size, dim),
        "layers/attention/query/kernel": (heads, dim),
        "layers/attention/key/kernel": (kv_heads, dim),
        "layers/attention/value/kernel": (kv_heads, dim),
        "layers/attention/out/kernel": (dim, heads),
        "layers/mlp/gate/kernel": (model.mlp_dim, dim),
        "layers/mlp/down/kernel": (dim, model.mlp_dim),
        "layers/mlp/up/kernel": (model.mlp_dim, dim),
        "final_norm/scale": (dim,),
        _TABLES: (2 * model.max_length, width // 2),
        **dict.fromkeys(_NORMS, (dim,)),
    }
    if not model.tied_head:
        shapes["head/kernel"] = (model.vocab_size, dim)
    return shapes
