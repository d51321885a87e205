"""Files and arrays in a local directory, gs:// or s3://, through TensorStore, with the same code for all three."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np
import tensorstore as ts

from slm_jax.errors import UserError
from slm_jax.files import parse_object

SHARD_ROWS = 256  # rows in one file of a column; one row is the unit of reading
SHARD_VALUES = 1 << 20  # of a column of single values

# Shard indices stay in memory: random rows are read about twice as fast.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
_UNCACHED = ts.Context({"cache_pool": {"total_bytes_limit": 0}})  # for arrays that are written once
# Failures of reading that say nothing about the content.
_ELSEWHERE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")
_COMPLETE = "slm_jax_complete"  # attribute of an array of which every row was written
_mentioned: set[str] = set()  # stores already reported by this process to have columns without checksums


class Store:
    """Files and arrays below one path. Every file is replaced whole or not at all.

    Args:
        path: a local directory, or a gs:// or s3:// URL.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path).rstrip("/") or "/"
        self.remote = self.path.startswith(("gs://", "s3://"))
        if not self.remote:
            if "://" in self.path:
                raise UserError("path-unsupported", f"{self.path}: only local paths, gs:// and s3:// are supported")
            self.path = os.path.abspath(os.path.expanduser(self.path))

    def local(self) -> pathlib.Path | None:
        return None if self.remote else pathlib.Path(self.path)

    def read(self, key: str) -> bytes | None:
        """The content of one file; None if it does not exist.

        Raises:
            UserError: `file-unreadable`: it exists but cannot be read, or is not a regular file: a pipe would
                never end.
        """
        if not self.remote and os.path.exists(path := os.path.join(self.path, key)) and not os.path.isfile(path):
            raise UserError("file-unreadable", f"{path} is not a regular file: make it a readable file")
        try:
            result = self._files().read(key).result()
        except ValueError as error:
            if any(code in str(error) for code in _ELSEWHERE if code != "PERMISSION_DENIED"):
                raise
            reason = str(error).splitlines()[0]
            raise UserError("file-unreadable", f"{self.path}/{key}: {reason}: make it a readable file") from error
        return result.value if result.state == "value" else None

    def write(self, key: str, content: bytes) -> None:
        self._files().write(key, content).result()

    def move_in(self, key: str, path: pathlib.Path) -> None:
        """Moves a local file into the store."""
        if (local := self.local()) is None:
            self.write(key, path.read_bytes())
        else:
            shutil.move(path, local / key)

    def read_json(self, key: str) -> dict | None:
        """One JSON object; UserError where the file is damaged."""
        content = self.read(key)
        if content is None:
            return None
        return parse_object(content, f"{self.path}/{key}", "restore it or make it again")

    def write_json(self, key: str, value: Mapping) -> None:
        self.write(key, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8"))

    def keys(self, prefix: str = "") -> list[str]:
        """All files whose name starts with `prefix`, sorted."""
        if not self.remote and not os.path.isdir(self.path):
            return []
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""  # the first name after all of them
        return sorted(name.decode("utf-8") for name in self._files().list(ts.KvStore.KeyRange(prefix, after)).result())

    def create_array(self, key: str, dtype: str, shape: tuple[int, ...], complete: bool = False) -> ts.TensorStore:
        """A new zarr3 array, replacing what is there: one compressed chunk per row, `SHARD_ROWS` rows per file; of
        single values, `SHARD_VALUES` per chunk and file.

        `complete`: every row will be written, so a row that is missing later was lost. Otherwise missing rows are
        zeros, and rows of zeros take no space.
        """
        fill = "NaN" if dtype.startswith("float") else False if dtype == "bool" else 0
        row, rows = (1, SHARD_ROWS) if len(shape) > 1 else (SHARD_VALUES, SHARD_VALUES)
        inner = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 1}},
            {"name": "crc32c"},
        ]
        codecs = [{"name": "sharding_indexed", "configuration": {"chunk_shape": [row, *shape[1:]], "codecs": inner}}]
        metadata = {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}},
            "codecs": codecs,
            "fill_value": fill,
            "attributes": {_COMPLETE: True} if complete else {},
        }
        spec = {"driver": "zarr3", "kvstore": self._kvstore(key), "metadata": metadata}
        spec["store_data_equal_to_fill_value"] = complete
        return ts.open(spec, create=True, delete_existing=True, context=_CONTEXT).result()

    def open_array(self, key: str, immutable: bool = False, cached: bool = True) -> ts.TensorStore | None:
        """An existing array or None. `immutable`: once read, it is not checked again for changes. `cached`: parts of it
        stay in memory."""
        spec = {"driver": "zarr3", "kvstore": self._kvstore(key)}
        recheck, context = "open" if immutable else True, _CONTEXT if cached else _UNCACHED
        try:
            array = ts.open(spec, open=True, context=context, recheck_cached_data=recheck).result()
            if array.spec().to_json()["metadata"].get("attributes", {}).get(_COMPLETE):
                spec |= {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
                array = ts.open(spec, open=True, context=context, recheck_cached_data=recheck).result()
            return array
        except ValueError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise UserError("file-damaged", f"{self.path}/{key} is damaged: restore it or make it again") from error

    def say_if_unchecked(self, array: ts.TensorStore) -> None:
        """Prints, once per store, that `array` was written without checksums."""
        (sharding,) = array.spec().to_json()["metadata"]["codecs"]
        inner = sharding.get("configuration", {}).get("codecs", [])
        if not any(codec["name"] == "crc32c" for codec in inner) and self.path not in _mentioned:
            _mentioned.add(self.path)
            print(f"{self.path} has columns without checksums, from an earlier version: damage may go unnoticed")

    def _kvstore(self, key: str) -> dict | str:
        path = f"{self.path}/{key}".rstrip("/") + "/"
        return path if self.remote else {"driver": "file", "path": path}

    def _files(self) -> ts.KvStore:
        return ts.KvStore.open(self._kvstore(""), context=_CONTEXT).result()


def read_result(reading: ts.Future, where: str, remedy: str) -> np.ndarray:
    """What a started read of an array found.

    Args:
      reading: the result of `array.read()`.
      where: the column and its rows, for a message.
      remedy: likewise, what to do about damage.

    Raises:
      UserError: `column-damaged`: a checksum does not fit, or a chunk cannot be decoded.
    """
    try:
        return np.asarray(reading.result())
    except ValueError as error:
        if any(code in str(error) for code in _ELSEWHERE):
            raise
        raise UserError("column-damaged", f"{where} is damaged: {remedy}") from error


@contextlib.contextmanager
def disk_full_is_an_answer(what: str, remedy: str) -> Iterator[None]:
    """Turns 'no space left', from the system or from TensorStore, into one line with the remedy."""
    try:
        yield
    except (OSError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left" not in str(error) and "quota exceeded" not in str(error):
            raise
        raise UserError("disk-full", f"disk full while writing {what}: {remedy}") from error
