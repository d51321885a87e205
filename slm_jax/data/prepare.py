"""Stage `prepare`: documents -> corpus.

Killed at any instant and started again with the same settings, it continues, and the corpus is the same to the byte;
nor does it depend on the number of processes.
"""

import contextlib
import fcntl
import hashlib
import heapq
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import gin
import numpy as np
from tqdm import tqdm

from slm_jax.data.corpus import MANIFEST, Corpus
from slm_jax.data.hashing import mix, salt
from slm_jax.data.metadata import Metadata, most_frequent, with_metadata
from slm_jax.data.packing import PACKINGS
from slm_jax.data.seqio_tasks import documents, register_task
from slm_jax.data.sources import FIRST_RECORDS, Source, has_field, text_fraction
from slm_jax.data.store import Store, disk_full_is_an_answer
from slm_jax.data.tokenized_shards import Documents, tokenize_units, unit_path, units_of
from slm_jax.data.vocabularies import (
    ByteVocabulary,
    Vocabulary,
    VocabularyConfig,
    load_vocabulary,
    train_sentencepiece,
)
from slm_jax.data.write_corpus import write_rows
from slm_jax.errors import UserError
from slm_jax.files import read_json
from slm_jax.renamed import with_new_keys


@gin.configurable
def prepare(
    corpus: str | os.PathLike,
    sources: Sequence[Source] = (),
    vocabulary: VocabularyConfig | None = None,
    sequence_length: int = 1024,
    packing: str = "split",
    seed: int = 0,
    processes: int = 0,
    metadata: Metadata | None = None,
    plain: str | os.PathLike | None = None,
    plain_share: float = 0.1,
) -> Corpus:
    """Reads documents, tokenizes, shuffles and packs them, and writes one corpus, or two that share no document.

    Args:
      corpus: where to write the corpus: a directory, or a gs:// or s3:// URL.
      sources: where the documents come from; one Source by default.
      vocabulary: the vocabulary to use or train; None uses the defaults of VocabularyConfig.
      sequence_length: tokens per row.
      packing: 'split' cuts documents at the end of a row and loses no token; 'complete' starts every row with the
        beginning of a document and discards what does not fit (MeCo); 'whole' never cuts a document and pads, so that
        no answer loses its question. A document that is cut has its metadata where it begins and not where it
        continues.
      seed: of the order of documents.
      processes: number of tokenizing processes; 0 uses one per core. The corpus does not depend on it.
      metadata: what to place before each document, without loss; None places nothing.
      plain: where to write a second corpus, of documents without metadata that are left out of the first, in the same
        vocabulary: MeCo's cooldown. None writes one corpus only.
      plain_share: fraction of the documents, chosen by a hash of their text, for the second corpus.

    Raises:
      UserError: unusable settings, files or records; a corpus made with other settings; a full disk.
    """
    # Made here, not in the signature: gin binds them when they are called.
    sources, vocabulary = sources or [Source()], vocabulary or VocabularyConfig()  # pyright: ignore[reportCallIssue]
    _check(sources, vocabulary, sequence_length, packing, processes)
    inputs = [[_identity(path) for path in source.paths()] for source in sources]
    whole = _Plan(sources, inputs, vocabulary, sequence_length, packing, seed, metadata)
    if plain is None:
        return _make(Store(corpus), whole, processes)
    if not 0 < plain_share < 1:
        raise UserError(f"prepare: plain_share is {plain_share}, must be above 0 and below 1")
    if Store(plain).path == Store(corpus).path:
        raise UserError(f"prepare: corpus and plain are both {plain}: give each its own directory")
    rest = replace(whole, metadata=None, texts=(0.0, plain_share))
    _refuse_other(Store(plain), rest)
    result = _make(Store(corpus), replace(whole, texts=(plain_share, 1.0)), processes)
    _make(Store(plain), replace(rest, vocabulary=VocabularyConfig(path=str(result.path))), processes)
    return result


@dataclass(frozen=True)
class _Plan:
    """What one corpus is made of; `texts` is the range of `text_fraction` that its documents fall into."""

    sources: Sequence[Source]
    inputs: Sequence[list[dict[str, Any]]]
    vocabulary: VocabularyConfig
    sequence_length: int
    packing: str
    seed: int
    metadata: Metadata | None = None
    texts: tuple[float, float] = (0.0, 1.0)

    @property
    def names(self) -> str:
        return ", ".join(source.name for source in self.sources)

    def settings(self, known: Vocabulary | None) -> dict[str, Any]:
        """Everything that determines the content of the corpus, as JSON; files by content, so that they may move."""
        described = [
            {**asdict(source), "files": inputs or list(source.files), "directory": None}
            for source, inputs in zip(self.sources, self.inputs, strict=True)
        ]
        wanted = {"train": self.vocabulary.size, "train_characters": self.vocabulary.train_characters}
        settings = {
            "sources": described,
            "vocabulary": {"content_hash": known.content_hash} if known else wanted,
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            "seed": self.seed,
        }
        # Named where they say something: a corpus without them has the manifest that it always had.
        if self.metadata is not None:
            settings["metadata"] = asdict(self.metadata)
        if self.texts != (0.0, 1.0):
            settings["texts"] = list(self.texts)
        return settings

    def check_fields(self) -> None:
        """Refuses sources that cannot have the metadata."""
        if self.metadata is None:
            return
        for source in self.sources:
            if source.template:
                raise UserError(
                    f"source {source.name!r} has conversations (template {source.template!r}), before which no "
                    "metadata stands: leave prepare.metadata or the source out"
                )
            path = self.metadata.field or source.fields().url
            if path is None or not has_field(source, path):
                what = f"no field {path!r} in its first {FIRST_RECORDS:,} records" if path else "no URL in its schema"
                remedy = "Metadata.field" if self.metadata.field else f"Source.url_field (schema {source.schema!r})"
                raise UserError(
                    f"source {source.name!r} has {what}, so no metadata: name the field with {remedy}, or leave the "
                    "source out"
                )

    def rows(self, source: Source, vocabulary: Vocabulary, skipped: Counter) -> Iterator[dict[str, Any]]:
        """The documents of a source that belong here; what is skipped is counted by source and reason."""
        begin, end = self.texts
        for row in documents(register_task(source, vocabulary, self.metadata.field if self.metadata else None)):
            if row["skipped"]:
                skipped[f"{source.name}: {row['skipped']}"] += 1
            elif (begin, end) == (0.0, 1.0) or begin <= text_fraction(row["text"]) < end:
                yield row


def _make(store: Store, plan: _Plan, processes: int) -> Corpus:
    """One corpus; the one that is there, if it was made by the same plan."""
    vocabulary = plan.vocabulary
    known = load_vocabulary(vocabulary.path) if vocabulary.path else None
    known = ByteVocabulary() if known is None and vocabulary.kind == "bytes" else known
    settings = plan.settings(known)
    if existing := _existing(store, settings):
        print(f"prepare: {store.path} is there already, made with the same settings from the same inputs")
        shutil.rmtree(_work_directory(store), ignore_errors=True)  # a kill right after the manifest left it
        return existing
    plan.check_fields()
    processes = processes or os.cpu_count() or 1
    work = _work_directory(store)
    _announce(store, plan, settings, known, processes)
    remedy = f"free space and run the same command again; the finished units in {work} are kept"
    with disk_full_is_an_answer(str(store.path), remedy), _begun(work, store, settings):
        if known is None:
            known = _trained(work, plan)
        known.save(work / "vocabulary")
        reused = len(list(work.glob("unit-???????")))
        counts, num_units, seconds = _tokenize(work, plan, known, processes)
        table = Documents(work, num_units)
        result = write_rows(store, table, known, settings, counts)
        _report(result, reused, int(table.length.sum()) / max(seconds, 1e-9))
    shutil.rmtree(work)
    return result


def _check(sources, vocabulary: VocabularyConfig, sequence_length: int, packing: str, processes: int) -> None:
    if not isinstance(sources, Sequence) or not sources or not all(isinstance(source, Source) for source in sources):
        raise UserError("prepare: sources must be a list of Source, with at least one")
    if sequence_length < 2 or sequence_length > 1 << 17:
        raise UserError(f"prepare: sequence_length is {sequence_length}, must be between 2 and {1 << 17}")
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


def _refuse_other(store: Store, plan: _Plan) -> None:
    """`_existing` for a corpus that is made after another, whose vocabulary is not known yet."""
    if there := with_new_keys(store.read_json(MANIFEST)):
        _existing(store, {**plan.settings(None), "vocabulary": there.get("settings", {}).get("vocabulary")})


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting that differs, in words; '' for none."""
    for key in {**new, **old}:
        if old.get(key) == new.get(key):
            continue
        if key == "sources":
            if changed := _changed_source(old.get(key) or [], new[key]):
                return changed
            continue  # settings that an earlier version did not have, and that are off
        return f"{key} was {old.get(key)}, now {new.get(key)}"
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
            changed = _changed(read_json(path), settings)
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


def _trained(work: pathlib.Path, plan: _Plan) -> Vocabulary:
    """Trains a vocabulary on the first `train_characters` of the shuffled documents, once per work directory."""
    config = plan.vocabulary
    if (work / "vocabulary" / "vocabulary.json").exists():
        return load_vocabulary(work / "vocabulary")
    # Keeps the documents with the smallest keys among those read so far, never more text than is needed.
    chosen, characters = [], 0
    for ordinal, source in enumerate(plan.sources):
        source_salt = salt("vocabulary", source.name)
        for row in tqdm(plan.rows(source, ByteVocabulary(), Counter()), f"reading {source.name}", unit=" documents"):
            key = int(mix(np.array([row["index"]], np.uint64) ^ source_salt)[0])
            heapq.heappush(chosen, (-key, -ordinal, -row["index"], row["text"]))
            characters += len(row["text"])
            while characters - len(chosen[0][-1]) >= config.train_characters:
                characters -= len(heapq.heappop(chosen)[-1])
    texts = [text for *_, text in sorted(chosen, reverse=True)]
    if not texts:
        raise UserError(f"no documents to train a vocabulary on in {plan.names}")
    print(f"prepare: training a vocabulary of {config.size:,} on {characters:,} characters")
    return train_sentencepiece(texts, config.size)


def _values_kept(plan: _Plan, vocabulary: Vocabulary) -> frozenset[str] | None:
    """The most frequent metadata, where only they stay: one more pass over the documents."""
    metadata = plan.metadata
    if metadata is None or metadata.top is None:
        return None
    rows = itertools.chain.from_iterable(plan.rows(source, vocabulary, Counter()) for source in plan.sources)
    counted = tqdm(rows, "counting metadata", unit=" documents")
    return most_frequent((metadata.own_value(row["url"], row["field"]) for row in counted), metadata.top)


def _tokenize(
    work: pathlib.Path, plan: _Plan, vocabulary: Vocabulary, processes: int
) -> tuple[dict[str, Counter], int, float]:
    """Tokenises all documents into units; returns what to report of them, the number of units, and seconds."""
    kept, begin = _values_kept(plan, vocabulary), time.monotonic()
    skipped, without = Counter(), Counter()
    sizes = [sum(os.path.getsize(path) for path in source.paths()) for source in plan.sources]

    def rows() -> Iterator[dict[str, Any]]:
        done = 0
        for source, size in zip(plan.sources, sizes, strict=True):
            for row in with_metadata(plan.rows(source, vocabulary, skipped), plan.metadata, kept, without):
                yield row | {"done": done + row["bytes_read"]}
            done += size

    count = 0
    with tqdm(desc="tokenizing", total=sum(sizes), unit="B", unit_scale=True) as bar:
        for unit in tokenize_units(units_of(rows()), work, work / "vocabulary", processes):
            bar.update(max(0, unit[-1]["done"] - bar.n))
            count += 1
        bar.update(bar.total - bar.n)
    if not count:
        why = "all records were skipped" if plan.texts == (0.0, 1.0) else f"none hashes into {plan.texts}"
        raise UserError(f"no documents in {plan.names}: {why}")
    # Units beyond the last can only be there if the reading changed under us.
    assert not unit_path(work, count).exists()
    return {"skipped": skipped, "without": without}, count, time.monotonic() - begin


def _announce(store: Store, plan: _Plan, settings: dict[str, Any], known: Vocabulary | None, processes: int) -> None:
    print(f"prepare: corpus {store.path}")
    for source, inputs in zip(plan.sources, plan.inputs, strict=True):
        if source.tfds:
            print(f"  source {source.name}: {source.files[0]}")
        else:
            print(f"  source {source.name}: {len(inputs)} files, {sum(file['bytes'] for file in inputs) / 1e6:,.1f} MB")
    if plan.texts != (0.0, 1.0):
        print(f"  {plan.texts[1] - plan.texts[0]:.1%} of the documents, by a hash of their text")
    if plan.metadata is not None:
        print(f"  before each document: {plan.metadata.prefix('...').strip()!r} of the {plan.metadata.what}")
    train = settings["vocabulary"]
    print(
        f"  vocabulary: {known.kind} of {known.size:,}"
        if known
        else f"  vocabulary: SentencePiece of {train['train']:,}"
        f", to be trained on up to {train['train_characters']:,} characters"
    )
    print(f"  rows of {settings['sequence_length']:,} tokens, packing {settings['packing']}, {processes} processes")


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
    if about := counts.get("metadata"):
        print(f"  metadata: {about['tokens']:,} tokens, {about['values']:,} values")
        for reason, count in sorted(about["without"].items()):
            print(f"  without metadata of their own, {reason}: {count:,} documents")
    print(f"  at {corpus.path}, fingerprint {corpus.fingerprint[:12]}")
