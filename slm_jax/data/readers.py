"""Records out of files: JSON lines, Parquet and text, compressed or not, one at a time."""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

from slm_jax.errors import UserError

ENDINGS = (".jsonl", ".json", ".parquet", ".txt")


class BadRecord(Exception):
    """A record that cannot be a document; the message says why."""


class Record(NamedTuple):
    """One record of a file, or why it is none.

    Attributes:
        place: 'file:line' for messages.
        fields: the record; None where it cannot be read.
        problem: why it cannot be read.
        bytes_read: bytes of the file consumed so far, compressed, for progress.
    """

    place: str
    fields: dict[str, Any] | None
    problem: str
    bytes_read: int


def resolve(files: Sequence[str], owner: str) -> list[str]:
    """The existing files that paths and globs name, in the order given, each glob sorted.

    Raises:
        UserError: no match, an empty file, or an ending that is not read; `owner` is named in the message.
    """
    paths: list[str] = []
    for pattern in files:
        found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not found:
            what = "no file matches" if glob.has_magic(pattern) else "no such file:"
            raise UserError(f"{owner}: {what} {pattern}; check the path (now in {os.getcwd()})")
        paths += found
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{owner}: {path} is not a file; name the files in it, such as {path}/*.jsonl.gz")
        if os.path.getsize(path) == 0:
            raise UserError(f"{owner}: {path} is empty; remove it from the source or make it again")
        if not _plain_name(path).endswith(ENDINGS):
            raise UserError(f"{owner}: {path} has an ending that is not read; use {', '.join(ENDINGS)} (or .gz, .zst)")
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise UserError(f"{owner}: {min(repeated)} is named twice; name each file once")
    return paths


def records(path: str, columns: Sequence[str]) -> Iterator[Record]:
    """All records of one file.

    Args:
        path: its ending says the format.
        columns: the top-level fields that are needed; Parquet reads no others.

    Raises:
        UserError: the file as a whole cannot be read (cut off, not what its ending says).
    """
    name = _plain_name(path)
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path, columns)
        elif name.endswith(".txt"):
            yield _text(path)
        else:
            yield from _json_lines(path)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): copy or download it again") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: copy or download it again") from error


def _plain_name(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".zst")


def _open(path: str) -> tuple[io.BufferedIOBase, io.BufferedReader]:
    """The decompressed stream and the file below it."""
    file = open(path, "rb")  # noqa: SIM115
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20), file
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(file), 1 << 20), file
    return file, file


class _ZstdStream(io.RawIOBase):
    """Several zstd frames as one stream. zstandard's own reader takes a file that is cut off for one that ends."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self._rest = b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside_frame = zstandard.ZstdDecompressor().decompressobj(), False
            compressed = compressed or self._file.read(1 << 18)
            if not compressed:
                if self._inside_frame:
                    raise EOFError("a zstd frame does not end")
                return 0
            self._inside_frame = True
            self._rest = self._frame.decompress(compressed)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _json_lines(path: str) -> Iterator[Record]:
    stream, file = _open(path)
    with file, stream:
        for number, line in enumerate(stream, 1):
            fields, problem = None, ""
            try:
                fields = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                problem = "not UTF-8"
            except (ValueError, RecursionError) as error:
                if not line.strip():
                    continue  # an empty line between records is no mistake
                problem = f"not JSON ({error})"
            if fields is not None and not isinstance(fields, dict):
                fields, problem = None, "not a JSON object"
            elif fields is None and not problem:
                problem = "not a JSON object"
            yield Record(f"{path}:{number}", fields, problem, file.tell())


def _parquet(path: str, columns: Sequence[str]) -> Iterator[Record]:
    size = os.path.getsize(path)
    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in columns]
        number, rows = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=1000, columns=wanted or None):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path}:row {number}", fields, "", size * number // rows)


def _text(path: str) -> Record:
    stream, file = _open(path)
    with file, stream:
        content = stream.read()
    try:
        return Record(path, {"text": content.decode("utf-8")}, "", os.path.getsize(path))
    except UnicodeDecodeError:
        return Record(path, None, "not UTF-8", os.path.getsize(path))
