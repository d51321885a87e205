"""safetensors files, read and written one tensor at a time, so that memory holds no more than one.

The library reads them and checks their headers. Writing is ours, since the library would take all tensors of a file at
once. A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, and where its
bytes begin and end), and the bytes; several files of one model have an index beside them: name -> file.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from slm_jax.errors import UserError
from slm_jax.files import parse_object, write_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 100_000_000
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Entry(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def open_tensors(directory: Path) -> dict[str, Entry]:
    """Name -> entry of each tensor in a model directory; reads only the headers.

    Raises:
      UserError: there is no safetensors file, one is missing or damaged, or the weights are pickled.
    """
    index = directory / INDEX
    if index.exists():
        files = _indexed_files(index)
    elif (directory / SINGLE).exists():
        files = [directory / SINGLE]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_weights(directory)
    entries: dict[str, Entry] = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in entries:
                    raise UserError(
                        "weights-twice",
                        f"tensor {name} is in both {entries[name].file} and {file}: remove one of the files",
                    )
                header = tensors.get_slice(name)
                entries[name] = Entry(file, name, header.get_dtype(), tuple(header.get_shape()))
    return entries


def dtype_of(entry: Entry) -> np.dtype:
    """The dtype in which a tensor is stored.

    Raises:
      UserError: it is quantized or an integer.
    """
    if entry.dtype not in DTYPES:
        raise UserError(
            "weights-dtype",
            f"{entry.file} holds {entry.name} as {entry.dtype}: take a model whose weights are {', '.join(DTYPES)}",
        )
    return DTYPES[entry.dtype]


def read_tensor(entry: Entry) -> np.ndarray:
    """The tensor, in the dtype in which it is stored; UserError as `dtype_of`."""
    dtype_of(entry)
    with _opened(entry.file) as tensors:
        return tensors.get_tensor(entry.name)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory; its header is checked to describe exactly the bytes that follow."""
    check_file(file)
    try:
        with safe_open(file, framework="numpy") as tensors:  # bfloat16 as ml_dtypes registers it, which JAX imports
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError("file-damaged", f"{file} is damaged or half downloaded ({error}): download it again") from error


def check_file(path: Path) -> None:
    """Refuses anything but a regular file or a link to one: reading a pipe or a device would never end."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise UserError("model-file", f"{path} {what}: give a model directory of Hugging Face with all of its files")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory.

    Raises:
      UserError: the file is missing, damaged or larger than 100 MB.
    """
    check_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(
            "model-file", f"{path} has {path.stat().st_size:,} bytes, which no settings need: download it again"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError("model-file", f"{path}: {error.strerror}: make it readable") from error
    return parse_object(content, path, "download it again")


def write_tensors(
    directory: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    dtype: str,
    max_bytes: int,
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes tensors to one file, or to several with an index.

    Args:
      directory: where.
      shapes: name and shape of each tensor.
      dtype: float32, float16 or bfloat16.
      max_bytes: maximum size of a file, unless a single tensor is larger.
      arrays: the tensors, in that order and of that dtype; each is taken when the one before it has been written.
    """
    item = DTYPES[NAMES[dtype]].itemsize
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes:
        size += math.prod(shape) * item
        if files[-1] and size > max_bytes:
            files.append([])
            size = math.prod(shape) * item
        files[-1].append((name, shape))
    place: dict[str, str] = {}
    remaining = iter(arrays)
    for number, held in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        place |= {tensor: name for tensor, _ in held}
        _write_file(directory / name, held, dtype, remaining)
    if len(files) > 1:
        total = sum(math.prod(shape) for _, shape in shapes) * item
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": place})


def _write_file(
    path: Path, held: Sequence[tuple[str, tuple[int, ...]]], dtype: str, arrays: Iterator[np.ndarray]
) -> None:
    kept, end = DTYPES[NAMES[dtype]], 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in held:
        begin, end = end, end + math.prod(shape) * kept.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(held, arrays, strict=False):
            assert array.shape == shape and array.dtype == kept, f"{name}: {array.shape} {array.dtype}"
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names, all of them in its own directory."""
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError("file-damaged", f"{index} is damaged (no weight_map): download it again")
    names = sorted(set(places.values()))
    if outside := [name for name in names if name in ("", ".", "..") or Path(name).name != name or "\0" in name]:
        raise UserError(
            "weights-outside", f"{index} names {some(outside)}, which is no file beside it: download it again"
        )
    if missing := [name for name in names if not index.with_name(name).exists()]:
        raise UserError(
            "weights-missing", f"{index.parent} lacks {some(missing)}, which its index names: download them too"
        )
    return [index.with_name(name) for name in names]


def _no_weights(directory: Path) -> UserError:
    pickled = sorted(file.name for file in directory.glob("*") if file.suffix in PICKLED)
    if not pickled:
        return UserError(
            "weights-missing",
            f"{directory} holds no *.safetensors: give a model directory of Hugging Face, or a .bin file of llama2.c",
        )
    return UserError(
        "weights-pickled",
        f"{directory} holds its weights as {some(pickled)}, and reading a pickle can run any code: if you trust them, "
        'convert them with transformers: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}-converted')"
        + '", and copy the tokenizer there',
    )


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
