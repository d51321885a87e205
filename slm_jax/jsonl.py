"""Results as JSON lines that a command continues after it was killed."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slm_jax import processes
from slm_jax.errors import UserError
from slm_jax.files import (
    json_line,
    move_aside,
    parse_json_lines,
    read_json,
    to_json,
    write_json,
    write_json_lines,
)


class ResumableJsonl:
    """A file of JSON objects, one a line, that is appended to. Of several processes only the first writes it.

    Without `total` it is a log: lines are appended to `path`, also by several commands at once, and damaged lines are
    skipped.

    With `total` it is a result of that many rows, in order, made with the settings `about`, which are written beside it
    (NAME.about.json for NAME.jsonl). Rows collect in `<path>.partial` until the last one is there. With the same
    `about`, the command continues after the `done` rows that exist. With another one, a finished result is kept as
    NAME.before1.jsonl, before2 and so on, and an unfinished one is deleted. Open it with `open_result`, which keeps
    other commands out.

    Raises:
      UserError: `jsonl-foreign-file`: `path` exists without the file that says what it was made with.
    """

    def __init__(self, path: str | os.PathLike, about: dict[str, Any] | None = None, total: int | None = None):
        self.path, self._total = Path(path), total
        self._written = self.path if total is None else self.path.with_name(self.path.name + ".partial")
        self.done: int = 0 if total is None else processes.on_first(lambda: self._resume(to_json(about), total))

    def rows(self) -> list[dict[str, Any]]:
        """The intact rows, the same in every process; none at all where some process does not see the first's file."""
        content = self.path.read_bytes() if self.path.exists() else b""
        size = processes.on_first(lambda: len(content))
        digest = processes.on_first(lambda: hashlib.sha256(content).hexdigest())
        if not processes.everywhere(hashlib.sha256(content[:size]).hexdigest() == digest):
            return []
        return [row for _, row in parse_json_lines(content[:size]) if row is not None]

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows; the last of `total` completes the file."""
        self.done += len(rows)
        if not rows or not processes.first():
            return
        self._written.parent.mkdir(parents=True, exist_ok=True)
        with self._written.open("a+b", buffering=0) as file:
            # A line that a kill cut short must not swallow the next. One write: lines of two commands do not mix.
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            cut = "\n" if end and file.read(1) != b"\n" else ""
            content = (cut + "".join(map(json_line, rows))).encode("utf-8", errors="backslashreplace")
            while content:  # less than all is written when the disk is full
                content = content[file.write(content) :]
        self._finish()

    def _finish(self) -> None:
        if self.done == self._total:
            os.replace(self._written, self.path)

    def _resume(self, about: Any, total: int) -> int:
        """How many rows exist that were made with the same settings."""
        name = str(self.path).removesuffix(".jsonl")
        about_path = Path(name + ".about.json")
        if self.path.exists() and not about_path.exists():
            raise UserError(
                "jsonl-foreign-file", f"{self.path} is a file of another kind: choose another output, or move it away"
            )
        try:
            same = read_json(about_path) == about
        except (OSError, UserError):
            same = False
        if not same:
            if self.path.exists():
                move_aside(name, ".jsonl", ".about.json")
            self._written.unlink(missing_ok=True)
            write_json(about_path, about)
        if self.path.exists():
            return total
        # Rows have no name but their place: after a damaged one they are made again.
        content = self._written.read_bytes() if self._written.exists() else b""
        kept = [row for _, row in itertools.takewhile(lambda line: line[1] is not None, parse_json_lines(content))]
        write_json_lines(self._written, kept)
        self.done = len(kept)
        self._finish()
        return len(kept)


@contextlib.contextmanager
def open_result(path: str | os.PathLike, about: dict[str, Any], total: int) -> Iterator[ResumableJsonl]:
    """Opens a result of `total` rows made with the settings `about`, and keeps other commands out meanwhile.

    Raises:
      UserError: `jsonl-ending`: the path does not end in .jsonl; `in-use`: another command writes it; those of
        ResumableJsonl.
    """
    path = os.fspath(path)
    if not path.endswith(".jsonl"):
        raise UserError("jsonl-ending", f"{path} would hold one JSON object a line: give it the ending .jsonl")
    with processes.lock(Path(path + ".lock"), f"another command writes {path}: wait for it to finish, or stop it"):
        yield ResumableJsonl(path, about, total)
