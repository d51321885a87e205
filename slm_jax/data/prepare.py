"""Stage `prepare`: documents -> corpus.

Killed at any instant and started again with the same settings, it continues, and the corpus is the same to the byte;
nor does it depend on the number of processes.
"""

import contextlib
import fcntl
import hashlib
import heapq
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import gin
import numpy as np
from tqdm import tqdm

from slm_jax.data.corpus import MANIFEST, Corpus
from slm_jax.data.hashing import mix, salt
from slm_jax.data.packing import PACKINGS
from slm_jax.data.rows import write_rows
from slm_jax.data.store import Store, disk_full_is_an_answer
from slm_jax.data.tasks import Source, documents, register_task
from slm_jax.data.units import Documents, tokenize_units, unit_path, units_of
from slm_jax.data.vocabularies import (
    ByteVocabulary,
    Vocabulary,
    VocabularyConfig,
    load_vocabulary,
    train_sentencepiece,
)
from slm_jax.errors import UserError


@gin.configurable
def prepare(
    corpus: str | os.PathLike,
    sources: Sequence[Source] = (),
    vocabulary: VocabularyConfig | None = None,
    row_length: int = 1024,
    packing: str = "split",
    seed: int = 0,
    processes: int = 0,
) -> Corpus:
    """Reads documents, tokenises, shuffles and packs them, and writes a corpus.

    Args:
        corpus: where to write it: a directory, a gs:// or s3:// URL.
        sources: where the documents come from; one Source by default.
        vocabulary: which vocabulary to use or train; None for the defaults of VocabularyConfig.
        row_length: tokens of a row.
        packing: 'split' cuts documents at the end of a row and loses no token; 'complete' begins every row with the
            begin of a document and discards what hangs over (MeCo).
        seed: of the order of the documents.
        processes: that tokenise; 0 for one per core. The corpus does not depend on it.

    Raises:
        UserError: settings, files or records that cannot be used; a corpus made with other settings; a full disk.
    """
    # Made here, not in the signature: gin binds them when they are called.
    sources, vocabulary = sources or [Source()], vocabulary or VocabularyConfig()  # pyright: ignore[reportCallIssue]
    _check(sources, vocabulary, row_length, packing, processes)
    store = Store(corpus)
    known = load_vocabulary(vocabulary.path) if vocabulary.path else None
    known = ByteVocabulary() if known is None and vocabulary.kind == "bytes" else known
    settings = _settings(sources, vocabulary, known, row_length, packing, seed)
    if existing := _existing(store, settings):
        print(f"prepare: {store.path} is there already, made with the same settings from the same inputs")
        shutil.rmtree(_work_directory(store), ignore_errors=True)  # a kill right after the manifest left it
        return existing
    processes = processes or os.cpu_count() or 1
    work = _work_directory(store)
    _announce(store, sources, settings, known, processes)
    remedy = f"free space and run the same command again; the finished units in {work} are kept"
    with disk_full_is_an_answer(str(store.path), remedy), _begun(work, store, settings):
        if known is None:
            known = _trained(work, sources, vocabulary)
        known.save(work / "vocabulary")
        reused = len(list(work.glob("unit-???????")))
        skipped, num_units, seconds = _tokenize(work, sources, known, processes)
        table = Documents(work, num_units)
        result = write_rows(store, table, known, settings, skipped)
        _report(result, reused, int(table.length.sum()) / max(seconds, 1e-9))
    shutil.rmtree(work)
    return result


def _check(sources, vocabulary: VocabularyConfig, row_length: int, packing: str, processes: int) -> None:
    if not isinstance(sources, Sequence) or not sources or not all(isinstance(source, Source) for source in sources):
        raise UserError("prepare: sources must be a list of Source, with at least one")
    if row_length < 2 or row_length > 1 << 17:
        raise UserError(f"prepare: row_length is {row_length}, must be between 2 and {1 << 17}")
    if packing not in PACKINGS:
        raise UserError(f"prepare: packing is {packing!r}, must be one of {', '.join(PACKINGS)}")
    if processes < 0:
        raise UserError(f"prepare: processes is {processes}, must be 0 (one per core) or more")
    if vocabulary.kind not in ("sentencepiece", "bytes"):
        raise UserError(f"VocabularyConfig: kind is {vocabulary.kind!r}, must be 'sentencepiece' or 'bytes'")
    if vocabulary.train_characters < 1:
        raise UserError(f"VocabularyConfig: train_characters is {vocabulary.train_characters}, must be positive")
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"prepare: two sources are called {twice[0]!r}; give each its own name")
    for source in sources:
        source.check()


def _settings(sources, config: VocabularyConfig, known: Vocabulary | None, row_length, packing, seed) -> dict[str, Any]:
    """Everything that determines the content of the corpus, as JSON; files by content, so that they may move."""
    described = []
    for source in sources:
        inputs = [_identity(path) for path in source.paths()] or list(source.files)
        described.append({**asdict(source), "files": inputs, "directory": None})
    wanted = {"train": config.size, "train_characters": config.train_characters}
    return {
        "sources": described,
        "vocabulary": {"content_hash": known.content_hash} if known else wanted,
        "row_length": row_length,
        "packing": packing,
        "seed": seed,
    }


def _identity(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": digest}


def _existing(store: Store, settings: dict[str, Any]) -> Corpus | None:
    if store.read(MANIFEST) is None:
        return None
    existing = Corpus.open(store.path)
    if changed := _changed(existing.manifest.get("settings", {}), settings):
        raise UserError(
            f"a corpus made with other settings lies at {store.path} ({changed}): "
            "choose another directory, or delete it"
        )
    return existing


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting that differs, in words; '' for none."""
    for key in new:
        if old.get(key) == new[key]:
            continue
        if key == "sources":
            return _changed_source(old.get(key) or [], new[key])
        return f"{key} was {old.get(key)}, now {new[key]}"
    return ""


def _changed_source(old: list[dict], new: list[dict]) -> str:
    names = [[source["name"] for source in sources] for sources in (old, new)]
    if names[0] != names[1]:
        return f"sources were {', '.join(names[0])}, now {', '.join(names[1])}"
    for before, now in zip(old, new, strict=True):
        for key in now:
            if before.get(key) == now[key]:
                continue
            if key == "files":
                return f"the input files of source {now['name']!r} changed"
            return f"{key} of source {now['name']!r} was {before.get(key)}, now {now[key]}"
    return ""


def _work_directory(store: Store) -> pathlib.Path:
    """Beside the columns, or local where the corpus is remote."""
    if (local := store.local()) is not None:
        return local / "work"
    digest = hashlib.sha256(store.path.encode("utf-8")).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir()) / f"slm_jax-prepare-{digest}"


@contextlib.contextmanager
def _begun(work: pathlib.Path, store: Store, settings: dict[str, Any]) -> Iterator[None]:
    """Makes the work directory ours: refuses one begun with other settings, or in use by another process."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"cannot write to {work}: {error.strerror}; choose another directory for the corpus") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another `prepare` is writing {store.path}: wait for it, or end it") from error
        path, text = work / "settings.json", json.dumps(settings, indent=2, sort_keys=True)
        if path.exists():
            changed = _changed(json.loads(path.read_text("utf-8")), settings)
            if changed:
                raise UserError(
                    f"{store.path} was half prepared with other settings ({changed}): run with those again, "
                    f"or delete {work} to start anew"
                )
        else:
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(text, "utf-8")
            unfinished.replace(path)
        yield


def _trained(work: pathlib.Path, sources: Sequence[Source], config: VocabularyConfig) -> Vocabulary:
    """Trains a vocabulary on the first `train_characters` of the shuffled documents, once per work directory."""
    if (work / "vocabulary" / "vocabulary.json").exists():
        return load_vocabulary(work / "vocabulary")
    # Keeps the documents with the smallest keys among those read so far, never more text than is needed.
    chosen, characters = [], 0
    for ordinal, source in enumerate(sources):
        source_salt = salt("vocabulary", source.name)
        for row in tqdm(_rows(source, ByteVocabulary(), Counter()), f"reading {source.name}", unit=" documents"):
            key = int(mix(np.array([row["index"]], np.uint64) ^ source_salt)[0])
            heapq.heappush(chosen, (-key, -ordinal, -row["index"], row["text"]))
            characters += len(row["text"])
            while characters - len(chosen[0][-1]) >= config.train_characters:
                characters -= len(heapq.heappop(chosen)[-1])
    texts = [text for *_, text in sorted(chosen, reverse=True)]
    if not texts:
        raise UserError(f"no documents to train a vocabulary on in {', '.join(source.name for source in sources)}")
    print(f"prepare: training a vocabulary of {config.size:,} on {characters:,} characters")
    return train_sentencepiece(texts, config.size)


def _rows(source: Source, vocabulary: Vocabulary, skipped: Counter) -> Iterator[dict[str, Any]]:
    """The documents of a source; what is skipped is counted by source and reason."""
    for row in documents(register_task(source, vocabulary)):
        if row["skipped"]:
            skipped[f"{source.name}: {row['skipped']}"] += 1
        else:
            yield row


def _tokenize(
    work: pathlib.Path, sources: Sequence[Source], vocabulary: Vocabulary, processes: int
) -> tuple[Counter, int, float]:
    """Tokenises all documents into units; returns what was skipped, the number of units, and seconds."""
    skipped, begin = Counter(), time.monotonic()
    sizes = [sum(os.path.getsize(path) for path in source.paths()) for source in sources]

    def rows() -> Iterator[dict[str, Any]]:
        done = 0
        for source, size in zip(sources, sizes, strict=True):
            for row in _rows(source, vocabulary, skipped):
                yield row | {"done": done + row["bytes_read"]}
            done += size

    count = 0
    with tqdm(desc="tokenizing", total=sum(sizes), unit="B", unit_scale=True) as bar:
        for unit in tokenize_units(units_of(rows()), work, work / "vocabulary", processes):
            bar.update(max(0, unit[-1]["done"] - bar.n))
            count += 1
        bar.update(bar.total - bar.n)
    if not count:
        raise UserError(f"no documents in {', '.join(source.name for source in sources)}: all records were skipped")
    # Units beyond the last can only be there if the reading changed under us.
    assert not unit_path(work, count).exists()
    return skipped, count, time.monotonic() - begin


def _announce(store: Store, sources, settings: dict[str, Any], known: Vocabulary | None, processes: int) -> None:
    print(f"prepare: corpus {store.path}")
    for source, described in zip(sources, settings["sources"], strict=True):
        if source.tfds:
            print(f"  source {source.name}: {source.files[0]}")
        else:
            size = sum(file["bytes"] for file in described["files"])
            print(f"  source {source.name}: {len(described['files'])} files, {size / 1e6:,.1f} MB")
    train = settings["vocabulary"]
    print(
        f"  vocabulary: {known.kind} of {known.size:,}"
        if known
        else f"  vocabulary: SentencePiece of {train['train']:,}"
        f", to be trained on up to {train['train_characters']:,} characters"
    )
    print(f"  rows of {settings['row_length']:,} tokens, packing {settings['packing']}, {processes} processes")


def _report(corpus: Corpus, reused: int, speed: float) -> None:
    counts = corpus.manifest
    work = f"{reused} units were tokenized before" if reused else f"tokenized {speed:,.0f} tokens/s"
    print(
        f"prepare: {counts['num_documents']:,} documents, {counts['num_tokens']:,} tokens in {corpus.num_rows:,} rows; "
        f"{work}"
    )
    if counts["num_discarded_tokens"]:
        print(f"  discarded by packing: {counts['num_discarded_tokens']:,} tokens")
    for reason, count in sorted(counts["skipped"].items()):
        print(f"  skipped, {reason}: {count:,}")
    print(f"  at {corpus.path}, fingerprint {corpus.fingerprint[:12]}")
