"""Tokenized documents on disk in sorted runs, so that any range of the shuffled order is one slice of each run.

Documents are ordered by a random key, then by source and by their number in it. A run is a directory:
documents    DOCUMENT records, sorted
tokens       ids of all documents, one after the other
flags        LOSS and NOISE of each token, only for documents in which other tokens than the first ones lack a loss
strings      source, URL and metadata of each document, as JSON
"""

import contextlib
import json
import pathlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.preprocess import DocumentTokens
from slm_jax.data.workers import publishing

LOSS, NOISE = 1, 2
# begin, flags and strings are positions in the files of the run; without: number of first tokens without loss.
_FIELDS = "ordinal index length without bytes begin flags num_flags strings num_strings".split()
DOCUMENT = np.dtype([("key", "<u8"), *((name, "<i8") for name in _FIELDS)])
# File -> its dtype (None: that of the ids), and the fields with position and size of a document's part of it.
_FILES = {
    "tokens": (None, "begin", "length"),
    "flags": ("u1", "flags", "num_flags"),
    "strings": ("u1", "strings", "num_strings"),
}


class Documents(NamedTuple):
    """Tokenized documents in order, with their content in any order.

    Attributes:
        table: DOCUMENT records [D]; positions are in the arrays below.
        tokens: ids.
        flags: see above.
        strings: bytes of JSON lists [source, url, metadata].
    """

    table: np.ndarray
    tokens: np.ndarray
    flags: np.ndarray
    strings: np.ndarray

    def names(self) -> list[tuple[str, str, str | None]]:
        """Source, URL and metadata of each document."""
        content, table = self.strings.tobytes(), self.table
        places = zip(table["strings"].tolist(), table["num_strings"].tolist(), strict=True)
        return [tuple(json.loads(content[begin : begin + size])) for begin, size in places]


class Collector:
    """Collects the documents of a run."""

    def __init__(self):
        self._rows: list[tuple[int, ...]] = []
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in _FILES}
        self._sizes = dict.fromkeys(_FILES, 0)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_tokens(self) -> int:
        return self._sizes["tokens"]

    def add(self, key: int, ordinal: int, row: dict[str, Any], made: DocumentTokens) -> None:
        """`row`: of `read_records`, with metadata."""
        without = int(made.loss_mask.argmax()) if made.loss_mask.any() else len(made.tokens)
        plain = made.loss_mask[without:].all() and not made.noise.any()
        flags = np.empty(0, np.uint8) if plain else made.loss_mask * np.uint8(LOSS) + made.noise * np.uint8(NOISE)
        strings = json.dumps([row["source"], row["url"], row["metadata"]]).encode("utf-8")
        content = {"tokens": made.tokens, "flags": flags, "strings": np.frombuffer(strings, np.uint8)}
        places = [number for name, part in content.items() for number in (self._sizes[name], len(part))]
        begin, length, *others = places
        size = len(row["text"].encode("utf-8"))
        self._rows.append((key, ordinal, row["index"], length, without, size, begin, *others))
        for name, part in content.items():
            self._parts[name].append(part)
            self._sizes[name] += len(part)

    def documents(self) -> Documents:
        """Everything collected, in order."""
        table = np.array(self._rows, DOCUMENT)
        return Documents(table[_order(table)], **{name: np.concatenate(parts) for name, parts in self._parts.items()})


def _order(table: np.ndarray) -> np.ndarray:
    return np.lexsort([table[name] for name in ("index", "ordinal", "key")])


def write_run(path: pathlib.Path, batches: Iterable[Documents]) -> None:
    """Writes documents in their order, one batch after the other."""
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(stack.enter_context(publishing(path / name)).open("wb"))
            for name in (*_FILES, "documents")
        }
        written = dict.fromkeys(_FILES, 0)
        for batch in batches:
            table = batch.table.copy()
            for name, (_, position, size) in _FILES.items():
                content, sizes = getattr(batch, name), table[size]
                begins = table[position].tolist()
                parts = [content[begin : begin + n] for begin, n in zip(begins, sizes.tolist(), strict=True)]
                joined = np.concatenate(parts) if parts else content[:0]
                files[name].write(joined.data)
                table[position] = written[name] + np.cumsum(sizes) - sizes
                written[name] += len(joined)
            files["documents"].write(table.data)


def read_tables(runs: Sequence[pathlib.Path], first: int, last: int) -> list[np.ndarray]:
    """The DOCUMENT records of each run whose key is in [first, last)."""
    tables = []
    for run in runs:
        whole = (
            np.memmap(run / "documents", DOCUMENT, "r") if (run / "documents").stat().st_size else np.empty(0, DOCUMENT)
        )
        keys = whole["key"]
        tables.append(np.array(whole[bisect_left(keys, first, key=int) : bisect_left(keys, last, key=int)]))
    return tables


def read_lengths(runs: Sequence[pathlib.Path], first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and lengths, in tokens, of the documents whose key is in [first, last), in order."""
    table = np.concatenate(read_tables(runs, first, last))
    table = table[_order(table)]
    return table["key"].copy(), table["length"].copy()


def read_runs(runs: Sequence[pathlib.Path], first: int, last: int, dtype: np.dtype) -> Documents:
    """The documents whose key is in [first, last); `dtype` is that of the ids."""
    tables = read_tables(runs, first, last)
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind or dtype)] for name, (kind, *_) in _FILES.items()}
    for run, table in zip(runs, tables, strict=True):
        if not len(table):
            continue
        for name, (kind, position, size) in _FILES.items():
            before, kind = sum(map(len, parts[name])), np.dtype(kind or dtype)
            begin, end = int(table[position][0]), int(table[position][-1] + table[size][-1])
            parts[name].append(np.fromfile(run / name, kind, end - begin, offset=begin * kind.itemsize))
            table[position] += before - begin
    table = np.concatenate(tables)
    return Documents(table[_order(table)], **{name: np.concatenate(found) for name, found in parts.items()})
