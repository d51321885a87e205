"""safetensors files, read and written one tensor at a time, so that no more than one lies in memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, and where its bytes
begin and end), and the bytes. Several files of one model have an index beside them: name -> file. None of it is code.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slm_jax.errors import UserError
from slm_jax.files import write_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # as the library has it
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def open_tensors(directory: Path) -> dict[str, Entry]:
    """Name -> where it lies, of all tensors of a directory; reads the headers only.

    Raises:
      UserError: no safetensors file, one that is missing or damaged, pickled weights.
    """
    index = directory / INDEX
    if index.exists():
        files = _indexed(index)
    elif (directory / SINGLE).exists():
        files = [directory / SINGLE]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(_why_none(directory))
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _header(file):
            if name in entries:
                raise UserError(f"tensor {name} lies in both {entries[name].file} and {file}: remove one of the files")
            entries[name] = entry
    return entries


def dtype_of(entry: Entry) -> np.dtype:
    """In which type a tensor is kept.

    Raises:
      UserError: it is quantized or of whole numbers.
    """
    if entry.dtype not in DTYPES:
        raise UserError(f"{entry.file} holds {entry.dtype}: weights are read as {', '.join(DTYPES)}, not quantized")
    return DTYPES[entry.dtype]


def read_tensor(entry: Entry) -> np.ndarray:
    """The tensor, in the type in which it is kept; UserError as `dtype_of`."""
    return np.fromfile(entry.file, dtype_of(entry), math.prod(entry.shape), offset=entry.begin).reshape(entry.shape)


def write_tensors(
    directory: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    dtype: str,
    max_bytes: int,
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes tensors as one file, or as several with an index.

    Args:
      shapes: name and shape of each.
      dtype: float32, float16 or bfloat16.
      max_bytes: a file holds as much at most, unless one tensor is larger.
      arrays: the tensors, in that order and of that dtype; each is asked for when the one before is written.
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
    text += b" " * (-len(text) % 8)  # so that tensors lie at multiples of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(held, arrays, strict=False):
            assert array.shape == shape and array.dtype == kept, f"{name}: {array.shape} {array.dtype}"
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _indexed(index: Path) -> list[Path]:
    places = _json(index.read_bytes(), index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} is damaged (no weight_map): download it again")
    files = [index.with_name(Path(name).name) for name in sorted(set(places.values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{index.parent} lacks {some(missing)}, which its index names: download them too")
    return files


def _header(file: Path) -> Iterator[tuple[str, Entry]]:
    """Checks that the file is whole, so that reading cannot go wrong later."""
    damaged = f"{file} is damaged or half downloaded"
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise UserError(f"{damaged} (no header of safetensors): download it again")
        header = _json(content.read(length), file)
    for name, about in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = about["dtype"], tuple(map(int, about["shape"])), about["data_offsets"]
            known = DTYPES.get(dtype)
            fits = known is None or end - begin == math.prod(shape) * known.itemsize
            fits = fits and 0 <= begin <= end and min(shape, default=0) >= 0
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{damaged} (what it says of {name}): download it again") from error
        if not fits or 8 + length + end > size:
            raise UserError(f"{damaged} ({name} lies beyond its {size:,} bytes): download it again")
        yield name, Entry(file, dtype, shape, 8 + length + begin, 8 + length + end)


def _json(content: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file} is damaged (not JSON): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged (not an object): download it again")
    return value


def _why_none(directory: Path) -> str:
    pickled = sorted(file.name for file in directory.glob("*") if file.suffix in PICKLED)
    if not pickled:
        return f"{directory} holds no *.safetensors: give a directory of Hugging Face, or the .bin file of llama2.c"
    return (
        f"{directory} holds its weights as {some(pickled)}, and reading a pickle can run what it likes: where you "
        'trust them, convert them with transformers: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}-converted')" + '", and copy the tokenizer there'
    )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
