"""Tokenized documents on disk, in shards that worker processes write; a finished shard survives a kill.

A shard holds up to 1,000 documents in the order of the input, tokenized, as a directory `shard-NUMBER`: tokens.npy,
loss_mask.npy and noise.npy (all documents, concatenated) and documents.json. A directory is renamed into place when it
is complete, so there are no partial shards.
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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from slm_jax.data.preprocess import tokenize_document
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError

SHARD_DOCUMENTS = 1000
SHARD_CHARACTERS = 2_000_000  # of books: a shard must fit in memory many times, and workers need many of them
ARRAYS = ("tokens", "loss_mask", "noise")

Shard = list[dict[str, Any]]  # rows of `slm_jax.data.metadata.with_metadata`


def shard_path(work: pathlib.Path, number: int) -> pathlib.Path:
    return work / f"shard-{number:07d}"


def shards_of(rows: Iterable[dict[str, Any]]) -> Iterator[Shard]:
    """Groups rows into shards. The groups depend on the rows alone, so that a restarted run finds its shards again."""
    shard, characters = [], 0
    for row in rows:
        shard.append(row)
        characters += len(row["text"])
        if len(shard) == SHARD_DOCUMENTS or characters >= SHARD_CHARACTERS:
            yield shard
            shard, characters = [], 0
    if shard:
        yield shard


def write_shard(work: pathlib.Path, number: int, shard: Shard, vocabulary: Vocabulary) -> None:
    """Tokenizes one shard and writes it."""
    tokenized = [
        tokenize_document(row["text"], row["spans"], vocabulary, row["prefix"], row["loss_spans"]) for row in shard
    ]
    unfinished = shard_path(work, number).with_suffix(f".{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in ARRAYS:
        content = io.BytesIO()  # np.save into a file does not report a full disk
        np.save(content, np.concatenate([getattr(document, name) for document in tokenized]))
        (unfinished / f"{name}.npy").write_bytes(content.getbuffer())
    index = {
        "id": [f"{row['source'].partition('/')[0]}:{row['index']}" for row in shard],
        "index": [row["index"] for row in shard],
        "source": [row["source"] for row in shard],
        "url": [row["url"] for row in shard],
        "metadata": [row["metadata"] for row in shard],
        "bytes": [len(row["text"].encode("utf-8")) for row in shard],
        "length": [len(document.tokens) for document in tokenized],
        "noisy": [bool(document.noise.any()) for document in tokenized],
        "unspelled": [vocabulary.unspelled(row["prefix"] + row["text"]) for row in shard],
    }
    (unfinished / "documents.json").write_text(json.dumps(index), encoding="utf-8")
    os.rename(unfinished, shard_path(work, number))


def tokenize_shards(
    shards: Iterable[Shard], work: pathlib.Path, vocabulary_path: pathlib.Path, processes: int
) -> Iterator[Shard]:
    """Writes every missing shard; yields each shard once it is on disk, in any order."""
    if processes == 1:
        vocabulary = load_vocabulary(vocabulary_path)
        for number, shard in enumerate(shards):
            if not shard_path(work, number).exists():
                write_shard(work, number, shard, vocabulary)
            yield shard
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of libraries in an undefined state
    with (
        _workers_import_no_main(),
        ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(work, vocabulary_path)) as pool,
    ):
        running = {}

        def finished() -> Iterator[Shard]:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                shard = running.pop(future)
                future.result()
                yield shard

        try:
            for number, shard in enumerate(shards):
                if shard_path(work, number).exists():
                    yield shard
                    continue
                while len(running) >= 2 * processes:  # bounds the memory of waiting shards
                    yield from finished()
                running[pool.submit(_work, number, shard)] = shard
            while running:
                yield from finished()
        except BrokenProcessPool as error:
            raise UserError(
                "prepare-worker-killed",
                "a worker process was killed, most likely for lack of memory: run the same command again with fewer "
                "processes; finished shards are kept",
            ) from error
        finally:
            for future in running:
                future.cancel()


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def die_with_parent() -> None:  # a killed parent cannot tell its workers, which would wait forever
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    global _worker_state
    _worker_state = (work, load_vocabulary(vocabulary_path))


def _work(number: int, shard: Shard) -> None:
    work, vocabulary = _worker_state
    write_shard(work, number, shard, vocabulary)


class Documents:
    """All documents of finished shards, in the order of the input.

    Attributes:
        id: identifiers.
        source: source names.
        url: URLs, as the records give them.
        metadata: metadata, None for a document without.
        index: number of each document in the input, [D].
        bytes: length in bytes, [D].
        length: length in tokens, [D].
        noisy: whether it has tokens in noise spans, [D].
        unspelled: counts of the characters that the vocabulary cannot spell.
    """

    def __init__(self, work: pathlib.Path, num_shards: int):
        self._work = work
        parts = [json.loads((shard_path(work, n) / "documents.json").read_bytes()) for n in range(num_shards)]
        columns = {key: [value for part in parts for value in part[key]] for key in (parts[0] if parts else ())}
        self.id: list[str] = columns["id"]
        self.source: list[str] = columns["source"]
        self.url: list[str] = columns["url"]
        self.metadata: list[str | None] = columns["metadata"]
        self.index = np.array(columns["index"], np.int64)
        self.bytes = np.array(columns["bytes"], np.int64)
        self.length = np.array(columns["length"], np.int64)
        self.noisy = np.array(columns["noisy"], bool)
        self.unspelled = Counter("".join(columns["unspelled"]))
        # Where each document begins: in which shard, and at which of its tokens.
        self._shard = np.repeat(np.arange(num_shards), [len(part["id"]) for part in parts])
        lengths = [np.array(part["length"], np.int64) for part in parts]
        self._begin = np.concatenate([np.cumsum(length) - length for length in lengths])

    def piece(self, document: int, start: int, length: int) -> Sequence[np.ndarray]:
        """tokens, loss_mask and noise, each [length], of one document from its token `start` on."""
        begin = int(self._begin[document]) + start
        return [array[begin : begin + length] for array in self._arrays(int(self._shard[document]))]

    # Every mapped file holds a file descriptor, of which a process may have 1024.
    @functools.lru_cache(maxsize=200)  # noqa: B019
    def _arrays(self, shard: int) -> Sequence[np.ndarray]:
        mapped = [np.load(shard_path(self._work, shard) / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        return [np.asarray(array) for array in mapped]  # slices of a memmap are slow to make
