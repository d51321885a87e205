"""Tokenising documents unit by unit in worker processes; a finished unit survives a kill.

A unit is up to 1,000 documents in the order of the input, tokenised, as a directory `unit-NUMBER`: tokens.npy,
loss_mask.npy and noise.npy (all documents after one another) and documents.json. A directory is renamed into place when
it is complete, so a unit is there or not there.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from slm_jax.data.preprocess import tokenize_document
from slm_jax.data.vocabularies import Vocabulary, load_vocabulary
from slm_jax.errors import UserError

UNIT_DOCUMENTS = 1000
UNIT_CHARACTERS = 2_000_000  # books: a unit must be small in memory, and there must be enough of them to share

Unit = list[dict[str, Any]]  # rows of `slm_jax.data.metadata.with_metadata`


def unit_path(work: pathlib.Path, number: int) -> pathlib.Path:
    return work / f"unit-{number:07d}"


def units_of(rows: Iterable[dict[str, Any]]) -> Iterator[Unit]:
    """Groups rows into units; depends on nothing but the rows, so a restarted run finds its units again."""
    unit, characters = [], 0
    for row in rows:
        unit.append(row)
        characters += len(row["text"])
        if len(unit) == UNIT_DOCUMENTS or characters >= UNIT_CHARACTERS:
            yield unit
            unit, characters = [], 0
    if unit:
        yield unit


def write_unit(work: pathlib.Path, number: int, unit: Unit, vocabulary: Vocabulary) -> None:
    """Tokenises one unit and writes it."""
    tokenized = []
    for row in unit:
        loss_spans = json.loads(row["loss_spans"]) if row["loss_spans"] else None
        given = (row["text"], json.loads(row["spans"]), vocabulary, row["prefix"], loss_spans)
        tokenized.append(tokenize_document(*given))
    unfinished = unit_path(work, number).with_suffix(f".{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in ("tokens", "loss_mask", "noise"):
        content = io.BytesIO()  # numpy, writing to a file itself, does not say that the disk is full
        np.save(content, np.concatenate([getattr(document, name) for document in tokenized]))
        (unfinished / f"{name}.npy").write_bytes(content.getbuffer())
    index = {
        "id": [f"{row['source'].partition('/')[0]}:{row['index']}" for row in unit],
        "index": [row["index"] for row in unit],
        "source": [row["source"] for row in unit],
        "url": [row["url"] for row in unit],
        "metadata": [row["metadata"] for row in unit],
        "bytes": [len(row["text"].encode("utf-8")) for row in unit],
        "length": [len(document.tokens) for document in tokenized],
        "noisy": [bool(document.noise.any()) for document in tokenized],
    }
    (unfinished / "documents.json").write_text(json.dumps(index), encoding="utf-8")
    os.rename(unfinished, unit_path(work, number))


def tokenize_units(
    units: Iterable[Unit], work: pathlib.Path, vocabulary_path: pathlib.Path, processes: int
) -> Iterator[Unit]:
    """Writes every unit that is not there yet; yields each unit when it is on disk (in any order)."""
    if processes == 1:
        vocabulary = load_vocabulary(vocabulary_path)
        for number, unit in enumerate(units):
            if not unit_path(work, number).exists():
                write_unit(work, number, unit, vocabulary)
            yield unit
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy TensorFlow's threads in an undefined state
    with (
        _workers_import_no_main(),
        ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(work, vocabulary_path)) as pool,
    ):
        running = {}
        try:
            for number, unit in enumerate(units):
                if unit_path(work, number).exists():
                    yield unit
                    continue
                while len(running) >= 2 * processes:  # bounds the memory that waiting units take
                    yield from _finished(running)
                running[pool.submit(_work, number, unit)] = unit
            while running:
                yield from _finished(running)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for lack of memory: run the same command again with fewer "
                "processes; finished units are kept"
            ) from error
        finally:
            for future in running:
                future.cancel()


def _finished(running: dict) -> Iterator[Unit]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        unit = running.pop(future)
        future.result()
        yield unit


@contextlib.contextmanager
def _workers_import_no_main() -> Iterator[None]:
    """Spawned workers would import the caller's main module again: slow (jax) and, in a script without a main guard,
    endless. Ours need nothing from it."""
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__[name] for name in ("__spec__", "__file__") if name in main.__dict__}
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        main.__dict__.update(hidden)


def _start_worker(work: pathlib.Path, vocabulary_path: pathlib.Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers to Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()
    global _worker_state
    _worker_state = (work, load_vocabulary(vocabulary_path))


def _die_with_parent() -> None:
    """A killed parent cannot tell its workers; without this they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, unit: Unit) -> None:
    work, vocabulary = _worker_state
    write_unit(work, number, unit, vocabulary)


class Documents:
    """All documents of finished units, in the order of the input.

    Attributes:
        id, source, url: lists of strings.
        metadata: list of strings, None where a document carries none.
        index, bytes, length, noisy: arrays [D].
    """

    def __init__(self, work: pathlib.Path, num_units: int):
        self._work = work
        parts = [json.loads((unit_path(work, n) / "documents.json").read_bytes()) for n in range(num_units)]
        columns = {key: [value for part in parts for value in part[key]] for key in (parts[0] if parts else ())}
        self.id: list[str] = columns["id"]
        self.source: list[str] = columns["source"]
        self.url: list[str] = columns["url"]
        self.metadata: list[str | None] = columns["metadata"]
        self.index = np.array(columns["index"], np.int64)
        self.bytes = np.array(columns["bytes"], np.int64)
        self.length = np.array(columns["length"], np.int64)
        self.noisy = np.array(columns["noisy"], bool)
        self._unit = np.repeat(np.arange(num_units), [len(part["id"]) for part in parts])
        lengths = [np.array(part["length"], np.int64) for part in parts]
        self._begin = np.concatenate([np.cumsum(length) - length for length in lengths])

    def piece(self, document: int, start: int, length: int) -> Sequence[np.ndarray]:
        """tokens, loss_mask and noise, each [length], of one document from its token `start` on."""
        begin = int(self._begin[document]) + start
        return [array[begin : begin + length] for array in self._arrays(int(self._unit[document]))]

    # Every mapped file holds a file descriptor, of which a process may have 1024.
    @functools.lru_cache(maxsize=200)  # noqa: B019
    def _arrays(self, unit: int) -> Sequence[np.ndarray]:
        path = unit_path(self._work, unit)
        mapped = [np.load(path / f"{name}.npy", mmap_mode="r") for name in ("tokens", "loss_mask", "noise")]
        return [np.asarray(array) for array in mapped]  # slices of a memmap are slow to make
