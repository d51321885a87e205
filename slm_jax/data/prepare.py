"""Stage `prepare`: documents -> corpus.

A stage that was killed continues when it is started again with the same settings, and the corpus is the same to the
byte, for any number of processes.
"""

import contextlib
import hashlib
import heapq
import itertools
import os
import pathlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from slm_jax.config import print_unused
from slm_jax.configurable import Above, AtLeast, AtMost, Below, Natural, OneOf, Seed, configurable
from slm_jax.data.corpus import MANIFEST, Corpus
from slm_jax.data.hashing import mix, salt
from slm_jax.data.metadata import Metadata, most_frequent, with_metadata
from slm_jax.data.packing import PACKINGS
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.sources import FIRST_RECORDS, Source, has_field, read_documents, text_fraction
from slm_jax.data.store import Store, disk_full_is_an_answer
from slm_jax.data.tokenized_shards import Documents, shard_path, shards_of, tokenize_shards
from slm_jax.data.vocabularies import VocabularyConfig, load_vocabulary
from slm_jax.data.vocabulary import DESCRIPTION_FILE, ByteVocabulary, Vocabulary
from slm_jax.data.write_corpus import write_rows
from slm_jax.errors import UserError
from slm_jax.files import lock, read_json, write_json
from slm_jax.renamed import with_new_keys


@configurable
def prepare(
    corpus: str | os.PathLike,
    sources: Sequence[Source] = (),
    vocabulary: VocabularyConfig | None = None,
    sequence_length: Annotated[int, AtLeast(2), AtMost(1 << 17)] = 1024,
    packing: Annotated[str, OneOf(PACKINGS)] = "split",
    seed: Seed = 0,
    processes: Natural = 0,
    metadata: Metadata | None = None,
    plain: str | os.PathLike | None = None,
    plain_share: Annotated[float, Above(0), Below(1)] = 0.1,
) -> Corpus:
    """Reads documents, tokenizes, shuffles and packs them, and writes one corpus, or two that share no document.

    Args:
      corpus: where to write the corpus: a directory, or a gs:// or s3:// URL.
      sources: where the documents come from; one Source by default.
      vocabulary: the vocabulary to use or train; None uses the defaults of VocabularyConfig.
      sequence_length: tokens per row.
      packing: 'split' cuts documents at the end of a row and loses no token; 'complete' starts every row with the
        beginning of a document and discards what does not fit (MeCo); 'whole' never cuts a document and pads, so that
        no answer loses its question. A document that is cut has its metadata at its beginning only.
      seed: of the order of documents.
      processes: number of tokenizing processes; 0 uses one per core. The corpus does not depend on it.
      metadata: what to place before each document, without loss; None places nothing.
      plain: where to write a second corpus, of documents without metadata that are left out of the first, in the same
        vocabulary: MeCo's cooldown. None writes one corpus only.
      plain_share: fraction of the documents, chosen by a hash of their text, for the second corpus.

    Raises:
      UserError: unusable settings, files or records; a corpus made with other settings; a full disk.
    """
    # Created here rather than in the signature: gin binds them when they are called.
    sources, vocabulary = sources or [Source()], vocabulary or VocabularyConfig()  # pyright: ignore[reportCallIssue]
    print_unused()
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError("prepare-same-name", f"prepare: two sources are called {twice[0]!r}; give each its own name")
    for source in sources:
        source.check()
    inputs = [[_identity(path) for path in source.paths()] for source in sources]
    whole = _Plan(sources, inputs, vocabulary, sequence_length, packing, seed, metadata)
    if plain is None:
        return _make(Store(corpus), whole, processes)

    # Two corpora: first the one with metadata, then the plain one, in the vocabulary of the first.
    if Store(plain).path == Store(corpus).path:
        raise UserError(
            "prepare-same-directory", f"prepare: corpus and plain are both {plain}: give each its own directory"
        )
    rest = replace(whole, metadata=None, texts=(0.0, plain_share))
    if there := with_new_keys(Store(plain).read_json(MANIFEST)):  # refuse it before making the first corpus
        _existing(Store(plain), {**rest.settings(None), "vocabulary": there.get("settings", {}).get("vocabulary")})
    result = _make(Store(corpus), replace(whole, texts=(plain_share, 1.0)), processes)
    _make(Store(plain), replace(rest, vocabulary=VocabularyConfig(path=str(result.path))), processes)
    return result


class _Skipped:
    """Counts records that became no document, by source, file and reason; keeps an example of each reason."""

    def __init__(self):
        self.counts: dict[str, dict[str, Counter[str]]] = {}
        self.first: dict[tuple[str, str], str] = {}

    def add(self, source: str, row: dict[str, Any]) -> None:
        by_file = self.counts.setdefault(source, {})
        by_file.setdefault(os.path.basename(row["file"]), Counter())[row["skipped"]] += 1
        self.first.setdefault((source, row["skipped"]), row["problem"])


@dataclass(frozen=True)
class _Plan:
    """Everything that determines one corpus. It takes the documents whose `text_fraction` is in the range `texts`."""

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
            source.described() | ({"files": inputs} if inputs else {})
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
        # Only if set, so that a corpus without them has the same manifest as one made by an earlier version.
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
                    "metadata-of-conversations",
                    f"source {source.name!r} has conversations (template {source.template!r}), without metadata: "
                    "leave out prepare.metadata or the source",
                )
            path = self.metadata.field or source.fields().url
            if path is None or not has_field(source, path):
                what = f"no field {path!r} in its first {FIRST_RECORDS:,} records" if path else "no URL in its schema"
                remedy = "Metadata.field" if self.metadata.field else f"Source.url_field (schema {source.schema!r})"
                raise UserError(
                    "metadata-no-field",
                    f"source {source.name!r} has {what}, so no metadata: name the field with {remedy}, or leave the "
                    "source out",
                )

    def documents(self, source: Source, skipped: _Skipped) -> Iterator[dict[str, Any]]:
        """The documents of a source that belong to this corpus."""
        begin, end = self.texts
        for row in read_documents(source, self.metadata.field if self.metadata else None):
            if row["skipped"]:
                skipped.add(source.name, row)
            elif (begin, end) == (0.0, 1.0) or begin <= text_fraction(row["text"]) < end:
                yield row


def _make(store: Store, plan: _Plan, processes: int) -> Corpus:
    """Makes one corpus, or returns the existing one if it was made from the same plan."""
    vocabulary = plan.vocabulary
    known = load_vocabulary(vocabulary.path) if vocabulary.path else None
    known = ByteVocabulary() if known is None and vocabulary.kind == "bytes" else known
    settings = plan.settings(known)
    # The work directory is in the corpus, or in the local temporary directory if the corpus is remote.
    digest, local = hashlib.sha256(store.path.encode("utf-8")).hexdigest()[:16], store.local()
    work = local / "work" if local else pathlib.Path(tempfile.gettempdir()) / f"slm_jax-prepare-{digest}"
    if existing := _existing(store, settings):
        print(f"prepare: {store.path} is there already, made with the same settings from the same inputs")
        shutil.rmtree(work, ignore_errors=True)  # left if a process was killed right after it wrote the manifest
        return existing
    plan.check_fields()
    processes = processes or os.cpu_count() or 1
    _announce(store, plan, settings, known, processes)
    remedy = f"free space and run the same command again; the finished shards in {work} are kept"
    with disk_full_is_an_answer(str(store.path), remedy), _begun(work, store, settings):
        if known is None:
            known = _trained(work, plan)
        known.save(work / "vocabulary")
        reused = len(list(work.glob("shard-???????")))
        skipped, without, num_shards, seconds = _tokenize(work, plan, processes)
        table = Documents(work, num_shards)
        result = write_rows(store, table, known, settings, {"skipped": skipped.counts, "without": without})
        _report(result, skipped, reused, int(table.length.sum()) / max(seconds, 1e-9))
    shutil.rmtree(work)
    return result


def _identity(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": digest}


def _existing(store: Store, settings: dict[str, Any]) -> Corpus | None:
    """The complete corpus at `store`, or None; refuses one made with other settings."""
    if store.read(MANIFEST) is None:
        return None
    existing = Corpus.open(store.path)
    if changed := _changed(existing.manifest.get("settings", {}), settings):
        raise UserError(
            "prepare-other-settings",
            f"the corpus at {store.path} was made with other settings ({changed}): choose another directory, or delete "
            "it",
        )
    return existing


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting that differs, in words; '' if all are equal."""
    names = [[source["name"] for source in settings.get("sources") or []] for settings in (old, new)]
    if names[0] != names[1]:
        return f"sources were {', '.join(names[0])}, now {', '.join(names[1])}"
    for before, now in zip(old.get("sources") or [], new["sources"], strict=True):
        for key in now:  # a setting that an earlier version did not have counts as None
            if before.get(key) != now[key]:
                if key == "files":
                    return f"the input files of source {now['name']!r} changed"
                return f"{key} of source {now['name']!r} was {before.get(key)}, now {now[key]}"
    for key in {**new, **old}:
        if key != "sources" and old.get(key) != new.get(key):
            return f"{key} was {old.get(key)}, now {new.get(key)}"
    return ""


@contextlib.contextmanager
def _begun(work: pathlib.Path, store: Store, settings: dict[str, Any]) -> Iterator[None]:
    """Locks the work directory; refuses one begun with other settings, or in use by another process."""
    with contextlib.ExitStack() as held:
        try:
            busy = f"another `prepare` is writing {store.path}: wait for it to finish, or stop it"
            held.enter_context(lock(work / "lock", busy))
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                "prepare-not-writable",
                f"cannot write to {work}: {error.strerror}; choose another directory for the corpus",
            ) from error
        path = work / "settings.json"
        if not path.exists():
            write_json(path, settings)
        elif changed := _changed(read_json(path), settings):
            raise UserError(
                "prepare-other-settings",
                f"{store.path} was half prepared with other settings ({changed}): run with those again, or delete "
                f"{work} to start afresh",
            )
        yield


def _trained(work: pathlib.Path, plan: _Plan) -> Vocabulary:
    """Trains a vocabulary on the first `train_characters` of the shuffled documents, once per work directory."""
    config = plan.vocabulary
    if (work / "vocabulary" / DESCRIPTION_FILE).exists():
        return load_vocabulary(work / "vocabulary")
    # Keeps the documents with the smallest keys among those read so far, never more text than needed.
    chosen, characters = [], 0
    for ordinal, source in enumerate(plan.sources):
        source_salt = salt("vocabulary", source.name)
        for row in tqdm(plan.documents(source, _Skipped()), f"reading {source.name}", unit=" documents"):
            key = int(mix(np.array([row["index"]], np.uint64) ^ source_salt)[0])
            heapq.heappush(chosen, (-key, -ordinal, -row["index"], row["text"]))
            characters += len(row["text"])
            while characters - len(chosen[0][-1]) >= config.train_characters:
                characters -= len(heapq.heappop(chosen)[-1])
    texts = [text for *_, text in sorted(chosen, reverse=True)]
    if not texts:
        raise UserError("prepare-no-documents", f"no documents to train a vocabulary on in {plan.names}")
    print(f"prepare: training a vocabulary of {config.size:,} on {characters:,} characters")
    return train_sentencepiece(texts, config.size)


def _tokenize(work: pathlib.Path, plan: _Plan, processes: int) -> tuple[_Skipped, Counter, int, float]:
    """Tokenizes all documents into shards.

    Returns:
        The skipped records; the number of documents that have no metadata themselves, by reason; the number of shards;
        and seconds.
    """
    kept, metadata = None, plan.metadata
    if metadata is not None and metadata.top is not None:
        # Only the most frequent values are shown; one more pass over the documents counts them.
        every = itertools.chain.from_iterable(plan.documents(source, _Skipped()) for source in plan.sources)
        counted = tqdm(every, "counting metadata", unit=" documents")
        kept = most_frequent((metadata.own_value(row["url"], row["field"]) for row in counted), metadata.top)
    begin, skipped, without = time.monotonic(), _Skipped(), Counter()
    sizes = [sum(file["bytes"] for file in inputs) for inputs in plan.inputs]

    def rows() -> Iterator[dict[str, Any]]:
        done = 0
        for source, size in zip(plan.sources, sizes, strict=True):
            for row in with_metadata(plan.documents(source, skipped), metadata, kept, without):
                yield row | {"done": done + row["bytes_read"]}
            done += size

    count = 0
    with tqdm(desc="tokenizing", total=sum(sizes), unit="B", unit_scale=True) as bar:
        for shard in tokenize_shards(shards_of(rows()), work, work / "vocabulary", processes):
            bar.update(max(0, shard[-1]["done"] - bar.n))
            count += 1
        bar.update(bar.total - bar.n)
    if not count:
        raise UserError(
            "prepare-no-documents", f"no documents of {plan.names} fall into this corpus: change part or plain_share"
        )
    # Shards beyond the last can only be there if the inputs changed while they were read.
    assert not shard_path(work, count).exists()
    return skipped, without, count, time.monotonic() - begin


def _announce(store: Store, plan: _Plan, settings: dict[str, Any], known: Vocabulary | None, processes: int) -> None:
    print(f"prepare: corpus {store.path}")
    for source, inputs in zip(plan.sources, plan.inputs, strict=True):
        if inputs:
            print(f"  source {source.name}: {len(inputs)} files, {sum(file['bytes'] for file in inputs) / 1e6:,.1f} MB")
        else:
            print(f"  source {source.name}: {f'seqio {source.seqio}' if source.seqio else source.files[0]}")
    if plan.texts != (0.0, 1.0):
        print(f"  {plan.texts[1] - plan.texts[0]:.1%} of the documents, by a hash of their text")
    if plan.metadata is not None:
        print(f"  before each document: {plan.metadata.prefix('...').strip()!r} from the {plan.metadata.what}")
    train = settings["vocabulary"]
    print(
        f"  vocabulary: {known.kind} of {known.size:,}"
        if known
        else f"  vocabulary: SentencePiece of {train['train']:,}"
        f", to be trained on up to {train['train_characters']:,} characters"
    )
    print(f"  rows of {settings['sequence_length']:,} tokens, packing {settings['packing']}, {processes} processes")


def _report(corpus: Corpus, skipped: _Skipped, reused: int, speed: float) -> None:
    counts = corpus.manifest
    work = f"{reused} shards were tokenized before" if reused else f"tokenized {speed:,.0f} tokens/s"
    print(
        f"prepare: {counts['num_documents']:,} documents, {counts['num_tokens']:,} tokens in {corpus.num_rows:,} rows; "
        f"{work}"
    )
    if counts["num_discarded_tokens"]:
        print(f"  discarded by packing: {counts['num_discarded_tokens']:,} tokens")
    for (source, reason), first in sorted(skipped.first.items()):
        count = sum(by_reason[reason] for by_reason in skipped.counts[source].values())
        print(f"  skipped, {source}: {reason}: {count:,}, first {first}")
    if unspelled := counts.get("unspelled"):
        named = ", ".join(f"{code} ({count:,})" for code, count in list(unspelled.items())[:10])
        print(f"  characters that the vocabulary cannot spell, lost: {sum(unspelled.values()):,}: {named}")
    if about := counts.get("metadata"):
        print(f"  metadata: {about['tokens']:,} tokens, {about['values']:,} values")
        for reason, count in sorted(about["without"].items()):
            print(f"  without metadata of their own, {reason}: {count:,} documents")
    print(f"  at {corpus.path}, fingerprint {corpus.fingerprint[:12]}")
