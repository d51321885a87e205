"""Writing files so that no reader ever sees half of one, reading JSON, and a lock on a file. Imports no JAX."""

import codecs
import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax import messages
from slm_jax.errors import UserError
from slm_jax.renamed import with_new_keys


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, whose folders are made, and moves it to `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    # What UTF-8 cannot hold (half a surrogate pair) becomes an escape, as in JSON.
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes an .npy file."""
    content = io.BytesIO()  # np.save to a path does not report a full disk
    np.save(content, array)
    write_bytes(path, content.getvalue())


def write_json(path: str | os.PathLike, value: Any) -> None:
    write_text(path, json.dumps(to_json(value), indent=2) + "\n")


def write_json_lines(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: Any) -> str:
    return json.dumps(to_json(row), ensure_ascii=False) + "\n"


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and paths as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file that any version of slm_jax wrote, with the keys of this version.

    Raises:
      UserError: `file-damaged`. A missing file is an OSError.
    """
    return with_new_keys(parse_object(Path(path).read_bytes(), path, "restore it, or delete it and make it again"))


def parse_json(content: bytes, name: str | os.PathLike, remedy: str) -> Any:
    """The value of JSON in UTF-8, with or without a byte order mark.

    Raises:
      UserError: `file-damaged`: not JSON, nested too deeply, or in another encoding; `name` is what messages call it.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        remedy = f"convert it, `iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8`, or {remedy}"
        raise UserError("file-damaged", f"{name} is damaged (not UTF-8): {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError("file-damaged", f"{name} is damaged (not JSON): {remedy}") from error


def parse_object(content: bytes, name: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """As `parse_json`, but the value must be an object."""
    value = parse_json(content, name, remedy)
    if not isinstance(value, dict):
        raise UserError("file-damaged", f"{name} is damaged (not an object): {remedy}")
    return value


def parse_json_lines(content: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (line number from 1, object) for each line that is not empty, with None for a damaged line. A last line
    that a kill cut short is left out."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield number, value
        elif line.strip() and number < len(lines):
            yield number, None


def move_aside(name: str | os.PathLike, *endings: str) -> None:
    """Renames results of other settings, the files NAME + ending, to NAME.before1 + ending, or the next free number."""
    number = next(n for n in itertools.count(1) if not Path(f"{name}.before{n}{endings[0]}").exists())
    print(f"{name}{endings[0]} was made with other settings: it is now {name}.before{number}{endings[0]}")
    for ending in endings:
        os.replace(f"{name}{ending}", f"{name}.before{number}{ending}")


@contextlib.contextmanager
def lock(path: str | os.PathLike, busy: str) -> Iterator[None]:
    """Holds a lock on the file while the block runs. The lock ends with the process, however that ends.

    Raises:
      UserError: `in-use`, with the text `busy`: another process holds the lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("in-use", busy) from error
        messages.keep_log_beside(path)
        yield
