"""The `.bin` files of llama2.c: a Llama in float32, one kind of matrix after the other, each for all layers.

Version 0 begins with seven 32-bit numbers: width, width of the MLP, layers, heads, key-value heads, vocabulary, longest
row; a negative vocabulary means that the head is not the embedding. Version 1 begins with a magic number, the version,
the same seven numbers and one byte that says whether the head is the embedding, filled up to 256 bytes. The matrices
have no names; their order depends on the version.

The two features of a head that turn together are neighbours there; here, as in Hugging Face's files, they are half a
head apart.
"""

import math
import os
import struct
from pathlib import Path

import numpy as np

from slm_jax.errors import UserError
from slm_jax.models.huggingface import in_first, layer_shapes
from slm_jax.models.model_config import decoder

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
      UserError: the file has another version (2 is quantized), or another length than its header describes.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES).ljust(_HEADER_BYTES, b"\0")
        magic, version = struct.unpack_from("<Ii", head)
        if magic != MAGIC:
            *sizes, vocab_size, max_length = _HEADER.unpack_from(head)
            version, numbers, shared = 0, (*sizes, abs(vocab_size), max_length), vocab_size > 0
        elif version == 1:
            numbers, shared = _HEADER.unpack_from(head, 8), bool(head[8 + _HEADER.size])
        else:
            raise UserError(
                "llama2c-version",
                f"{path} has version {version} of llama2.c's format: take 0 or 1 (2 is quantized)",
            )
        begin = _HEADER_BYTES if version else _HEADER.size  # of the matrices
        dim, mlp_dim, num_layers, num_heads, num_kv_heads, vocab_size, max_length = numbers
        if min(numbers) < 1 or dim % num_heads or num_heads % num_kv_heads or dim // num_heads % 2:
            said = ", ".join(map(str, numbers))
            raise UserError("llama2c-header", f"{path} is no model of llama2.c: the numbers in its header are {said}")
        heads = (num_heads, num_kv_heads)
        self.config = model = decoder(
            num_layers, dim, mlp_dim, heads, vocab_size, max_length=max_length, tied_head=shared
        )

        # ---- Where each kind of matrix begins
        table_size = max_length * model.head_dim if version == 0 else 0
        size, described = os.path.getsize(path), begin + 4 * (model.parameter_count() + table_size)
        if size != described:
            raise UserError(
                "llama2c-header",
                f"{path} has {size:,} bytes, but the header of a llama2.c model (version {version}) describes "
                f"{described:,}: it is something else, or half downloaded",
            )
        self._shapes, self._begins = layer_shapes(model), {}
        for name in _ORDER[version]:
            self._begins[name] = begin
            layers = num_layers if name.startswith("layers/") else 1
            begin += 4 * (table_size if name == _TABLES else layers * math.prod(self._shapes.get(name, (0,))))

    def files(self) -> list[Path]:
        return [self.path]

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        shape, model = self._shapes[path], self.config
        offset = self._begins[path] + 4 * (layer or 0) * math.prod(shape)
        array = np.fromfile(self.path, "<f4", math.prod(shape), offset=offset)
        if path.endswith(("query/kernel", "key/kernel")):  # neighbours to half a head apart
            array = array.reshape(-1, model.head_dim // 2, 2, model.embed_dim).swapaxes(1, 2)
        return in_first(array, path, shape)
