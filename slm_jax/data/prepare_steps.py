"""The steps of `prepare`, from files to a complete corpus: makes the tasks and adds up their counts."""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from slm_jax.data import prepare_tasks as tasks
from slm_jax.data.corpus import Corpus, Fingerprint, complete, create_columns
from slm_jax.data.prepare_tasks import Job, Piece
from slm_jax.data.readers import Part
from slm_jax.data.sources import Tally, check_bad_lines, check_tally
from slm_jax.data.store import SHARD_ROWS, Store
from slm_jax.data.vocabularies import VocabularyConfig, load_vocabulary
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.data.workers import Function, Task, Workers, publish, read_marker, this_process
from slm_jax.errors import UserError

# Bytes of input per task: enough tasks for many workers, each long enough to be worth starting.
MIN_PART_BYTES, MAX_PART_BYTES, PARTS = 4 << 20, 256 << 20, 256
TASK_PIECES = 2000  # maximum number of small files per task
MAX_RUNS = 512  # maximum number of runs that a task reads at a time
SHORT_DOCUMENT = 500  # characters; for a first guess of how many documents to sample for a vocabulary


def part_bytes(job: Job) -> int:
    """Bytes of input per task; depends on the inputs only."""
    total = sum(os.path.getsize(path) for source in job.sources for path in source.paths())
    return min(MAX_PART_BYTES, max(MIN_PART_BYTES, total // PARTS))


def scan_files(work: pathlib.Path, job: Job, workers: Workers) -> list[list[dict[str, Any]]]:
    """The files of each source: identity, parts, and where to read them."""
    size, found = part_bytes(job), []
    for number, source in enumerate(job.sources):
        if not source.has_files:
            task = Task(f"spool-{number}", source.origin, (job, number, size))
            results = this_process().run(work, tasks.spool, [task], f"reading {source.name}", 1, " source")
        else:
            scans = []
            for paths in _groups(source.paths(), os.path.getsize, size):
                # A file that has changed since counts as a new one.
                stats = json.dumps([(path, tasks.stat_of(path)) for path in paths]) + str(size)
                key = f"scan-{hashlib.sha256(stats.encode('utf-8')).hexdigest()[:24]}"
                amount = sum(map(os.path.getsize, paths))
                scans.append(Task(key, _and_more(paths), (paths, size, source.max_line_bytes), amount))
            total = sum(task.size for task in scans)
            results = workers.run(work, tasks.scan, scans, f"counting {source.name}", total, "B")
        found.append([file for result in results for file in result["files"]])
    return found


def _groups(items: Iterable[Any], size_of: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Groups consecutive items of about `limit` bytes in total."""
    group, size = [], 0
    for item in items:
        if group and (size + size_of(item) > limit or len(group) == TASK_PIECES):
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group


def _and_more(paths: Sequence[str]) -> str:
    return paths[0] + (f" to {paths[-1]}" if len(paths) > 1 else "")


class Steps:
    """The steps from scanned files to a complete corpus.

    Attributes:
        speed: of tokenizing, in words.
    """

    def __init__(self, work: pathlib.Path, job: Job, workers: Workers, files: list[list[dict[str, Any]]]):
        self.work, self.job, self.workers = work, job, workers
        self.pieces = list(itertools.chain.from_iterable(self._pieces(n, of) for n, of in enumerate(files)))
        self.groups = list(_groups(self.pieces, lambda piece: piece.part.size, part_bytes(job)))
        self.speed = ""

    def _pieces(self, number: int, files: list[dict[str, Any]]) -> list[Piece]:
        """The parts of all files of a source, up to its limits."""
        source, pieces, index = self.job.sources[number], [], 0
        for file, about in enumerate(files):
            parts = [Part(*part) for part in about["parts"]]
            stat = tuple(about["stat"])
            for part in parts:
                piece = Piece(number, file, about["path"], stat, part, index + part.first, origin=about["origin"])
                pieces.append(piece)
            index += sum(part.records for part in parts)
        if source.max_documents is None and source.max_characters is None:
            return pieces

        # Find the piece in which the limit is reached: count a few pieces at a time.
        tally, kept = Tally(""), list[Piece]()
        for begin in range(0, len(pieces), 32):
            some = pieces[begin : begin + 32]
            counts = [
                Task(f"count-{number}-{begin + i}", _name(piece), (self.job, piece)) for i, piece in enumerate(some)
            ]
            for piece, found in zip(some, self._run(tasks.count, counts, f"limits of {source.name}"), strict=True):
                kept.append(piece._replace(taken=tally.taken, characters=tally.characters))
                tally.taken += found["taken"]
                tally.characters += found["characters"]
                limit = source.max_documents
                if tally.reached(source) or (limit is not None and tally.taken >= limit):
                    return kept
        return kept

    def _run(self, function: Function, found: Sequence[Task], say: str, unit: str = " tasks") -> list[dict[str, Any]]:
        return self.workers.run(self.work, function, found, say, sum(task.size for task in found), unit)

    def _read(self, function: Function, name: str, say: str, *arguments: Any) -> list[dict[str, Any]]:
        """Runs a function over all documents, and refuses unusable sources."""
        found = [
            Task(
                f"{name}-{number:06}",
                _name(group[0]) + (f" to {_name(group[-1])}" if len(group) > 1 else ""),
                (self.job, group, *arguments),
                sum(piece.part.size for piece in group),
            )
            for number, group in enumerate(self.groups)
        ]
        results = self._run(function, found, say, "B")
        self.tallies = [Tally(**tally) for result in results for tally in result["tallies"]]
        for number, source in enumerate(self.job.sources):
            bad: list[str] = []
            for tally in self._files(number):
                bad += tally.bad
                check_bad_lines(source, bad)
                if not tally.reached(source):
                    check_tally(source, tally)
        return results

    def _files(self, number: int) -> list[Tally]:
        """One tally for each file of a source."""
        found: dict[int, Tally] = {}
        for piece, tally in zip(self.pieces, self.tallies, strict=True):
            if piece.source == number:
                found.setdefault(piece.file, Tally(tally.file)).join(tally)
        return list(found.values())

    def run(self, known: Vocabulary | None, config: VocabularyConfig, settings: dict[str, Any]) -> Corpus:
        """known: the vocabulary, or None to train one by `config`. settings: everything that determines the corpus."""
        names = ", ".join(source.name for source in self.job.sources)
        self._survey(known, config, names)
        vocabulary = load_vocabulary(self.work / "vocabulary")

        # Documents become sorted runs, which are merged if there are too many.
        begin = time.monotonic()
        made = self._read(tasks.tokenize, "tokenize", "tokenizing")
        reused, seconds = self.workers.reused["tokenize"], time.monotonic() - begin
        num_tokens = sum(result["tokens"] for result in made)
        documents_of = sum((Counter(result["sources"]) for result in made), Counter())
        if not documents_of:
            raise UserError(
                "prepare-no-documents", f"no documents of {names} fall into this corpus: change part or plain_share"
            )
        noisy = {name for result in made for name in result["noisy"]}
        source_names = self._source_names(documents_of, noisy)
        runs = self._merged([run for result in made for run in result["runs"]])

        # Places of the documents, then rows.
        plan = Task("plan", "all documents", (self.job, runs, documents_of.total(), num_tokens))
        num_rows = self._run(tasks.plan, [plan], "planning rows")[0]["rows"]
        store, length = Store(self.job.corpus), self.job.sequence_length
        if read_marker(self.work, "columns") is None:
            create_columns(store, num_rows, length, vocabulary)
            publish(self.work / "done" / "columns.json", b"{}")
        step = max(1, tasks.WRITE_TOKENS // (SHARD_ROWS * length)) * SHARD_ROWS
        ranges = [(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]
        writes = [
            Task(f"write-{a:010}", f"rows {a} to {b}", (self.job, runs, source_names, (a, b)), b - a) for a, b in ranges
        ]
        written = self._run(tasks.write, writes, "writing", " rows")
        join = Task("join", "documents", (self.job, [task.key for task in writes]))
        [joined] = self._run(tasks.join_documents, [join], "documents")

        # The manifest.
        tokens_of = np.sum([result["tokens"] for result in written], axis=0)
        loss_tokens = sum(result["loss_tokens"] for result in written)
        fingerprint = Fingerprint()
        for task in writes:
            fingerprint.add((self.work / f"{task.key}.digests").read_bytes())
        skipped: dict[str, dict[str, Counter[str]]] = {}
        for name, file, reason, count, _ in self.skipped():
            skipped.setdefault(name, {}).setdefault(file, Counter())[reason] += count
        more = {
            "settings": settings,
            "num_documents": documents_of.total(),
            "documents_crc32": joined["documents_crc32"],
            "num_tokens": int(tokens_of.sum()),
            "num_loss_tokens": loss_tokens,
            "num_discarded_tokens": num_tokens - int(tokens_of.sum()),
            "skipped": skipped,
            "sources": {
                name: {"documents": documents_of[name], "tokens": int(count)}
                for name, count in zip(source_names, tokens_of, strict=True)
            },
        }
        assert sum(result["documents"] for result in written) == more["num_documents"]
        if unspelled := sum((Counter(result["unspelled"]) for result in made), Counter()):
            more["unspelled"] = {f"U+{ord(character):04X}": count for character, count in unspelled.most_common()}
        if self.job.metadata:
            more["metadata"] = {
                # All tokens without loss, except one BOS per document.
                "tokens": more["num_tokens"] - loss_tokens - more["num_documents"],
                "values": self._num_values(len(made)),
                "without": dict(sum((Counter(result["without"]) for result in made), Counter())),
            }
        corpus = complete(store, fingerprint, (num_rows, length), vocabulary, source_names, more)
        self.speed = f"tokenized {num_tokens / max(seconds, 1e-9):,.0f} tokens/s"
        if reused:
            self.speed = f"{reused} parts were tokenized before"
        return corpus

    def _survey(self, known: Vocabulary | None, config: VocabularyConfig, names: str) -> None:
        """Finds the most frequent metadata, and trains a vocabulary unless one is known."""
        top = self.job.metadata.top if self.job.metadata else None
        if known is not None:
            known.save(self.work / "vocabulary")
        if known is not None and top is None:
            return
        records = sum(piece.part.records for piece in self.pieces)
        share = min(1.0, config.train_characters / SHORT_DOCUMENT / max(records, 1))
        for attempt in itertools.count():
            below = None if known is not None else int(share * (1 << 64))
            counts_values = top is not None and attempt == 0
            found = self._read(tasks.survey, f"survey-{attempt}", "reading", below, counts_values)
            keys = [f"survey-{attempt}-{number:06}" for number in range(len(found))]
            if counts_values:
                self._run(tasks.top_values, [Task("top", "counts of metadata", (keys, top))], "counting metadata")
            characters = sum(result["characters"] for result in found)
            if known is not None or characters >= config.train_characters or share == 1.0:
                break
            share = min(1.0, share * max(2.0, 1.5 * config.train_characters / max(characters, 1)))
        if known is None:
            if not characters:
                raise UserError("prepare-no-documents", f"no documents to train a vocabulary on in {names}")
            self._run(tasks.train, [Task("train", "the vocabulary", (keys, config))], "vocabulary")

    def _source_names(self, documents_of: Counter[str], noisy: set[str]) -> list[str]:
        """Names that occur, in the order of the sources; NAME/noise if a document has marked spans."""
        names = [source.name for source in self.job.sources]
        found = set(documents_of) | {f"{name}/noise" for name in noisy}
        if len(found) > 255:
            raise UserError(
                "prepare-too-many-sources",
                f"the documents have {len(found)} source names, at most 255 are possible: set no source_field",
            )
        return sorted(found, key=lambda name: (names.index(name.partition("/")[0]), name))

    def _merged(self, runs: list[str]) -> list[str]:
        """Merges runs until a task can read a slice of each."""
        for level in itertools.count():
            if len(runs) <= MAX_RUNS:
                return runs
            size = min(MAX_RUNS, -(-len(runs) // MAX_RUNS))
            groups = [runs[begin : begin + size] for begin in range(0, len(runs), size)]
            found = [Task(f"merge-{level}-{n:06}", f"{group[0]} and more", (group,)) for n, group in enumerate(groups)]
            merged = self._run(tasks.merge, found, "merging")
            for run in runs:
                shutil.rmtree(self.work / run, ignore_errors=True)
            runs = [result["run"] for result in merged]
        raise AssertionError

    def _num_values(self, parts: int) -> int:
        """The number of different metadata values; each range of their hashes is counted separately."""
        keys = [f"tokenize-{number:06}" for number in range(parts)]
        total = sum((self.work / f"{key}.values.npy").stat().st_size for key in keys) // 8
        ranges = 1 + total // tasks.WRITE_TOKENS
        borders = [number * (1 << 64) // ranges for number in range(ranges + 1)]
        found = [Task(f"values-{a}", "metadata", (keys, a, b)) for a, b in itertools.pairwise(borders)]
        return sum(result["values"] for result in self._run(tasks.count_values, found, "counting metadata"))

    def skipped(self) -> Iterator[tuple[str, str, str, int, str]]:
        """(source, file, reason, number, first) of the records that gave no document."""
        for number, source in enumerate(self.job.sources):
            for tally in self._files(number):
                for reason, (count, first) in tally.skipped.items():
                    yield source.name, os.path.basename(tally.file), reason, count, first


def _name(piece: Piece) -> str:
    first = piece.part.first
    return f"records {first:,} to {first + piece.part.records - 1:,} of {piece.origin or piece.path}"
