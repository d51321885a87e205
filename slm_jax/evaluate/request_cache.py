"""Answers to requests, kept as lines of JSON, so that an evaluation that was killed goes on where it was.

lm-evaluation-harness keeps its own in a database of pickles, which run code when they are read.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm_jax import processes


class RequestCache:
    """Key -> JSON value. Lines are appended as answers come; one that a kill cut in the middle is left out.

    All processes hold what the first one read; where they cannot see its file they begin with nothing. Only the first
    one writes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size, digest = processes.on_first(lambda: _described(_content(self.path)))
        content = _content(self.path)[:size]
        self._values: dict[str, Any] = {}
        if processes.everywhere(_described(content)[1] == digest):
            self._values = _parsed(content)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any | None:
        return self._values.get(key)

    def add(self, values: Mapping[str, Any]) -> None:
        """Keeps the values, in memory and in the file: one write, so that the lines of two commands do not mix."""
        self._values |= values
        if not values or not processes.first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in values.items())
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, f"\n{lines}".encode())  # the empty line ends one that a kill cut
        finally:
            os.close(file)


def request_key(*parts: Any) -> str:
    """A hash of JSON values: the same for the same question to the same model, on any machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _described(content: bytes) -> list[Any]:
    return [len(content), hashlib.sha256(content).hexdigest()]


def _parsed(content: bytes) -> dict[str, Any]:
    found = {}
    for line in content.splitlines():
        try:
            row = json.loads(line)
            found[row["key"]] = row["value"]
        except (ValueError, TypeError, KeyError):  # cut, or written by something else
            continue
    return found
