"""Records from files: JSON lines, Parquet and text, compressed or not, one at a time."""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
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
MAX_LINE_BYTES = 64 << 20
MAX_COMPRESSED_PARTS = 8  # of a file: each part decompresses what comes before it

# First bytes of content that is not UTF-8 text -> its kind, and the remedy. UTF-32 begins like UTF-16: it comes first.
_OTHER_FORMATS = {
    b"version https://git-lfs": ("a Git LFS pointer", "download the file itself with `git lfs pull`"),
    b"\x1f\x8b": ("gzip data", "end its name in .gz, or decompress it once more"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "end its name in .zst, or decompress it once more"),
    b"PAR1": ("Parquet data", "end its name in .parquet"),
    codecs.BOM_UTF32_LE: ("UTF-32 text", "convert it with `iconv -f UTF-32 -t UTF-8`"),
    codecs.BOM_UTF32_BE: ("UTF-32 text", "convert it with `iconv -f UTF-32 -t UTF-8`"),
    codecs.BOM_UTF16_LE: ("UTF-16 text", "convert it with `iconv -f UTF-16 -t UTF-8`"),
    codecs.BOM_UTF16_BE: ("UTF-16 text", "convert it with `iconv -f UTF-16 -t UTF-8`"),
}
_NOT_UTF8 = "not UTF-8 (convert the file, for example with `iconv -f LATIN1 -t UTF-8`)"


class BadRecord(Exception):
    """A record that cannot be a document; the message says why, with details in parentheses at its end."""


class Record(NamedTuple):
    """One record of a file, or the reason why it cannot be read.

    Attributes:
        place: 'file:line' for messages.
        fields: the record; None where it cannot be read.
        problem: why it cannot be read, as in BadRecord.
        bytes_read: bytes of the file consumed so far, compressed, for progress.
    """

    place: str
    fields: dict[str, Any] | None
    problem: str
    bytes_read: int


class Part(NamedTuple):
    """A range of one file: decompressed bytes [begin, end) of lines, row groups [begin, end) of Parquet, or a text.

    Attributes:
        begin: where it begins.
        end: where it ends.
        lines: number of lines or rows of the file before it.
        first: number of its first record in the file.
        records: number of its records.
        size: its bytes in the file, as compressed.
    """

    begin: int
    end: int
    lines: int
    first: int
    records: int
    size: int


def resolve(files: Sequence[str], owner: str) -> list[str]:
    """The existing files that paths and globs name, in the order given, each glob sorted.

    A path that exists is taken literally, and so are the directories at the begin of a glob that exist, even with
    brackets in their names.

    Raises:
        UserError: no match, an empty file, or an unknown ending; the message names `owner`.
    """
    paths: list[str] = []
    for file in files:
        pattern = os.path.expanduser(file)
        directory, rest = pattern, ""
        while directory and not os.path.exists(directory):
            directory, name = os.path.split(directory)
            rest = os.path.join(name, rest) if rest else name
        found = sorted(glob.glob(os.path.join(glob.escape(directory), rest), recursive=True)) if rest else [pattern]
        if not found:
            what = "no file matches" if glob.has_magic(rest) else "no such file:"
            raise UserError("file-not-found", f"{owner}: {what} {file}; check the path (now in {os.getcwd()})")
        paths += found
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(
                "file-is-directory", f"{owner}: {path} is not a file; name the files in it, such as {path}/*.jsonl.gz"
            )
        if os.path.getsize(path) == 0:
            raise UserError("file-empty", f"{owner}: {path} is empty; remove it from the source or make it again")
        if not (plain := _plain_name(path)).endswith(ENDINGS) or (plain != path and plain.endswith(".parquet")):
            raise UserError(
                "file-unknown-ending",
                f"{owner}: {path} has an ending that is not read; use {', '.join(ENDINGS)} (or .gz, .zst, except of "
                "Parquet, which is compressed inside)",
            )
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise UserError("file-named-twice", f"{owner}: {min(repeated)} is named twice; name each file once")
    return paths


def records(
    path: str, columns: Sequence[str], max_line_bytes: int = MAX_LINE_BYTES, part: Part | None = None
) -> Iterator[Record]:
    """The records of one file, or of a part of it.

    Args:
        path: its ending determines the format.
        columns: the top-level fields that are needed; Parquet reads no others.
        max_line_bytes: maximum decompressed size of a line of JSON, or of a text file.
        part: one part from `split_file`; None reads the whole file.

    Raises:
        UserError: the file as a whole cannot be read: cut off, not what its ending says, not UTF-8, a line too long.
    """
    name = _plain_name(path)
    with _damage_is_an_answer(path):
        if name.endswith(".parquet"):
            yield from _parquet(path, columns, part)
        elif name.endswith(".txt"):
            yield _text(path, max_line_bytes)
        else:
            yield from _json_lines(path, max_line_bytes, part)


def split_file(path: str, part_bytes: int, max_line_bytes: int = MAX_LINE_BYTES) -> list[Part]:
    """Cuts a file into parts of about `part_bytes` bytes on disk, and counts their records.

    Arguments and errors as in `records`. A compressed file has at most `MAX_COMPRESSED_PARTS`.
    """
    name, size = _plain_name(path), os.path.getsize(path)
    if name.endswith(".txt"):
        return [Part(0, size, 0, 0, 1, size)]
    if name != path:
        part_bytes = max(part_bytes, -(-size // MAX_COMPRESSED_PARTS))
    place = number = found = consumed = 0
    borders = [(place, number, found, consumed)]  # of the parts: counts of what comes before
    with _damage_is_an_answer(path):
        if name.endswith(".parquet"):
            with pyarrow.parquet.ParquetFile(path) as table:
                for place in range(1, table.num_row_groups + 1):
                    group = table.metadata.row_group(place - 1)
                    found += group.num_rows
                    consumed += sum(group.column(i).total_compressed_size for i in range(group.num_columns))
                    if consumed - borders[-1][-1] >= part_bytes:
                        borders.append((place, found, found, consumed))
                number = found
        else:
            stream, file = _open(path)
            with file, stream:
                while line := _limited(f"{path}:{number + 1}", stream.readline(max_line_bytes + 1), max_line_bytes):
                    place, number, found = place + len(line), number + 1, found + (not line.isspace())
                    consumed = place if stream is file else file.tell()
                    if consumed - borders[-1][-1] >= part_bytes:
                        borders.append((place, number, found, consumed))
    if place > borders[-1][0] or len(borders) == 1:
        borders.append((place, number, found, size))
    return [
        Part(begin, end, lines, first, records - first, after - before)
        for (begin, lines, first, before), (end, _, records, after) in itertools.pairwise(borders)
    ]


def identity(path: str) -> dict[str, Any]:
    """Name, size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": digest}


@contextlib.contextmanager
def _damage_is_an_answer(path: str) -> Iterator[None]:
    with open(path, "rb") as file:
        if (first := file.read(32)).startswith(b"version https://git-lfs"):
            _refuse_other_formats(path, first)
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        if "too much memory" in str(error):
            raise UserError(
                "file-window",
                f"{path} was compressed with a window of over 128 MB (`zstd --long`): compress it again",
            ) from error
        raise UserError("file-damaged", f"{path} is cut off or damaged ({error}): copy or download it again") from error
    except (pyarrow.ArrowException, OSError) as error:  # of a damaged page pyarrow raises an OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError("file-damaged", f"{path} is not a readable Parquet file: copy or download it again") from error


def _plain_name(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".zst")


def _refuse_other_formats(path: str, first: bytes) -> None:
    for begin, (what, remedy) in _OTHER_FORMATS.items():
        if first.startswith(begin):
            raise UserError("file-wrong-format", f"{path} holds {what}: {remedy}")


def _open(path: str) -> tuple[Any, io.BufferedReader]:
    """The decompressed stream and the file below it."""
    file = open(path, "rb")  # noqa: SIM115
    stream: Any = file  # BufferedReader of one of three kinds
    if path.endswith(".gz"):
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)
    elif path.endswith(".zst"):
        stream = io.BufferedReader(_ZstdStream(file), 1 << 20)
    _refuse_other_formats(path, stream.peek(32))
    return stream, file


class _ZstdStream(io.RawIOBase):
    """Several zstd frames as one stream. zstandard's own reader takes a truncated file for a complete one."""

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


def _limited(place: str, content: bytes, max_line_bytes: int) -> bytes:
    if len(content) > max_line_bytes:
        raise UserError(
            "file-line-too-long",
            f"{place}: more than max_line_bytes = {max_line_bytes:,} decompressed bytes: split the document, or raise "
            "Source.max_line_bytes",
        )
    return content


def _json_lines(path: str, max_line_bytes: int, part: Part | None) -> Iterator[Record]:
    stream, file = _open(path)
    place, number = (part.begin, part.lines) if part else (0, 0)
    with file, stream:
        if stream is file:
            file.seek(place)
        else:  # a compressed stream has to be read up to there
            for skipped in range(0, place, 1 << 20):
                stream.read(min(1 << 20, place - skipped))
        while part is None or place < part.end:
            number += 1
            # Never reads much more than the limit: a small file may hold a line of many gigabytes, compressed.
            if not (line := _limited(f"{path}:{number}", stream.readline(max_line_bytes + 1), max_line_bytes)):
                return
            place += len(line)
            fields, problem = None, ""
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if isinstance(value, dict):
                    fields = value
                else:
                    hint = " (an array: write one object per line)" if isinstance(value, list) else ""
                    problem = f"not a JSON object{hint}"
            except UnicodeDecodeError:
                problem = _NOT_UTF8
            except (ValueError, RecursionError) as error:
                if not line.strip():
                    continue  # empty lines between records are harmless
                problem = f"not JSON ({error})"
                if b"\r" in line.rstrip():
                    problem = r"not JSON (its lines end with CR alone: convert it with `tr '\r' '\n'`)"
            yield Record(f"{path}:{number}", fields, problem, place if stream is file else file.tell())


def _parquet(path: str, columns: Sequence[str], part: Part | None) -> Iterator[Record]:
    size = os.path.getsize(path)
    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in columns]
        number, rows = part.lines if part else 0, max(file.metadata.num_rows, 1)
        groups = list(range(*(part[:2] if part else (0, file.num_row_groups))))
        for batch in file.iter_batches(batch_size=1000, columns=wanted or None, row_groups=groups):
            # Text that is not UTF-8 is found here: its row is skipped, not the others.
            try:
                found = [(fields, "") for fields in batch.to_pylist()]
            except UnicodeDecodeError:
                found = [_parquet_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
            for fields, problem in found:
                number += 1
                yield Record(f"{path}:row {number}", fields, problem, size * number // rows)


def _parquet_row(row: pyarrow.RecordBatch) -> tuple[dict[str, Any] | None, str]:
    try:
        return row.to_pylist()[0], ""
    except UnicodeDecodeError:
        return None, "not UTF-8 (write the file again with its text in UTF-8)"


def _text(path: str, max_line_bytes: int) -> Record:
    stream, file = _open(path)
    with file, stream:
        content = _limited(path, stream.read(max_line_bytes + 1), max_line_bytes)
    try:
        return Record(path, {"text": content.decode("utf-8-sig")}, "", os.path.getsize(path))
    except UnicodeDecodeError:
        return Record(path, None, _NOT_UTF8, os.path.getsize(path))
