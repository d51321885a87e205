"""Results as JSON lines, and beside them what they are: written so that a command that was killed goes on."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slm_jax import processes
from slm_jax.errors import UserError
from slm_jax.files import to_json, write_json


@contextlib.contextmanager
def open_lines(path: str, about: dict[str, Any], total: int) -> Iterator["Lines"]:
    """The file `path` of `total` lines, and `about` beside it, with the ending .about.json in place of .jsonl.

    Until all lines are there, they stand in `<path>.partial`: a command that comes with the same `about` adds what is
    missing. Of other settings, finished results are moved aside (`move_aside`), unfinished ones are replaced. Of
    several processes only the first writes; a second command is kept out by `<path>.lock`.

    Raises:
      UserError: another ending, a file there that is not of this kind, or another command that writes it.
    """
    if not path.endswith(".jsonl"):
        raise UserError(f"{path} would hold one JSON object a line: give it the ending .jsonl")
    with processes.lock(Path(path + ".lock"), f"another command writes {path}: wait for it, or end it"):
        yield Lines(path, about, total)


def move_aside(name: str, *endings: str) -> None:
    """Renames NAME and its endings, results of other settings, to NAME.before1, or the first number that is free."""
    number = next(n for n in itertools.count(1) if not Path(f"{name}.before{n}{endings[0]}").exists())
    print(f"{name}{endings[0]} was made with other settings: it is now {name}.before{number}{endings[0]}")
    for ending in endings:
        os.replace(name + ending, f"{name}.before{number}{ending}")


class Lines:
    """What `open_lines` opens."""

    def __init__(self, path: str, about: dict[str, Any], total: int):
        self.path, self._partial = Path(path), Path(path + ".partial")
        self._about_path = Path(path.removesuffix(".jsonl") + ".about.json")
        self._about, self._total = to_json(about), total
        self.done: int = processes.on_first(self._resume)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """The next lines; after the last of them the file is whole."""
        self.done += len(lines)
        if not processes.first():
            return
        with self._partial.open("a", encoding="utf-8") as file:
            file.writelines(_line(line) for line in lines)
        self._finish(self.done)

    def _finish(self, done: int) -> None:
        if done == self._total:
            os.replace(self._partial, self.path)

    def _resume(self) -> int:
        """How many lines there are already, made with the same settings."""
        if self.path.exists() and not self._about_path.exists():
            raise UserError(f"{self.path} is a file of another kind: choose another output, or move it away")
        if not self._is_same():
            if self.path.exists():
                move_aside(str(self.path).removesuffix(".jsonl"), ".jsonl", ".about.json")
            self._partial.unlink(missing_ok=True)
            write_json(self._about_path, self._about)
        if self.path.exists():
            return self._total
        kept = _whole_lines(self._partial)
        replacement = self._partial.with_name(self._partial.name + ".partial")
        replacement.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(replacement, self._partial)
        self._finish(len(kept))
        return len(kept)

    def _is_same(self) -> bool:
        try:
            return json.loads(self._about_path.read_text(encoding="utf-8")) == self._about
        except (OSError, ValueError):
            return False


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Without a last one that a kill cut in the middle."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            kept.append(json.loads(line))
        except ValueError:
            break
    return kept
