"""Stage `prepare`: documents -> corpus.

The work is cut into tasks (`prepare_tasks`, in the order of `prepare_steps`), which worker processes or a cluster run
(`workers`); this process holds counts only. A stage that was killed continues when it is started again with the same
settings, and the corpus is identical to the byte, whichever workers did the work.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Annotated, Any

from slm_jax.config import print_unused
from slm_jax.configurable import Above, AtLeast, AtMost, Below, Natural, OneOf, Seed, configurable
from slm_jax.data import readers
from slm_jax.data.corpus import MANIFEST, Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.packing import PACKINGS
from slm_jax.data.prepare_estimate import print_estimate
from slm_jax.data.prepare_steps import Steps, scan_files
from slm_jax.data.prepare_tasks import Job
from slm_jax.data.sources import FIRST_RECORDS, Source, has_field
from slm_jax.data.store import Store, disk_full_is_an_answer
from slm_jax.data.vocabularies import VocabularyConfig, load_vocabulary
from slm_jax.data.vocabulary import ByteVocabulary, Vocabulary
from slm_jax.data.workers import start_workers
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
    cluster: str | None = None,
    work: str | os.PathLike | None = None,
    dry_run: bool = False,
) -> Corpus | None:
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
      processes: number of worker processes; 0 uses one per core. The corpus does not depend on it.
      metadata: what to place before each document, without loss; None places nothing.
      plain: where to write a second corpus, of documents without metadata that are left out of the first, in the same
        vocabulary: MeCo's cooldown. None writes one corpus only.
      plain_share: fraction of the documents, chosen by a hash of their text, for the second corpus.
      cluster: address of a Dask scheduler, such as 'tcp://host:8786', whose workers run the tasks instead of processes
        on this machine. They need the same paths to the files and to the corpus.
      work: directory for work files, about twice the size of the corpus, which are removed when it is complete. None
        puts them into the corpus; a corpus in a bucket needs one.
      dry_run: read a sample of the documents and print the expected number of tokens, time and disk space; write
        nothing and return None.

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
    _mention_long_rows(vocabulary.path, sequence_length)
    first = Store(corpus)
    job = Job(first.path, sources, sequence_length, packing, seed, metadata)
    maker = _Maker(processes or os.cpu_count() or 1, cluster, work)
    if plain is None:
        return maker.estimate(job, vocabulary) if dry_run else maker.make(job, vocabulary)

    # Two corpora: first the one with metadata, then the plain one, in the vocabulary of the first.
    rest = replace(job, corpus=Store(plain).path, metadata=None, texts=(0.0, plain_share))
    if rest.corpus == job.corpus:
        raise UserError(
            "prepare-same-directory", f"prepare: corpus and plain are both {plain}: give each its own directory"
        )
    if dry_run:
        maker.estimate(replace(job, texts=(plain_share, 1.0)), vocabulary)
        return maker.estimate(rest, vocabulary)
    if there := with_new_keys(Store(plain).read_json(MANIFEST)):  # refuse it before making the first corpus
        settings = _settings(rest, maker.identities(job), None, vocabulary)
        _existing(Store(plain), settings | {"vocabulary": there.get("settings", {}).get("vocabulary")})
    result = maker.make(replace(job, texts=(plain_share, 1.0)), vocabulary)
    maker.make(rest, VocabularyConfig(path=result.path))
    return result


def _mention_long_rows(vocabulary: str | None, sequence_length: int) -> None:
    """Prints a note if rows are longer than the model whose vocabulary they use can read."""
    record = os.path.join(vocabulary or "", "run.json")
    if vocabulary and os.path.isfile(record):
        longest = (read_json(record).get("settings", {}).get("model") or {}).get("max_length")
        if longest and sequence_length > longest:
            print(
                f"prepare: rows of {sequence_length} tokens are longer than the {longest} that the model in "
                f"{vocabulary} reads: to train that model, set prepare.sequence_length to {longest} or less",
                flush=True,
            )


def _settings(
    job: Job, inputs: Sequence[Sequence[dict[str, Any]]], known: Vocabulary | None, config: VocabularyConfig
) -> dict[str, Any]:
    """Everything that determines the content of a corpus, as JSON; files by content, so that they may move."""
    described = [
        source.described() | ({"files": files} if source.has_files else {})
        for source, files in zip(job.sources, inputs, strict=True)
    ]
    wanted = {"train": config.size, "train_characters": config.train_characters}
    settings = {
        "sources": described,
        "vocabulary": {"content_hash": known.content_hash} if known else wanted,
        "sequence_length": job.sequence_length,
        "packing": job.packing,
        "seed": job.seed,
    }
    # Only if set, so that a corpus without them has the same manifest as one made by an earlier version.
    if job.metadata is not None:
        settings["metadata"] = asdict(job.metadata)
    if job.texts != (0.0, 1.0):
        settings["texts"] = list(job.texts)
    return settings


def _known(config: VocabularyConfig) -> Vocabulary | None:
    """The vocabulary, unless it is to be trained."""
    if config.path:
        return load_vocabulary(config.path)
    return ByteVocabulary() if config.kind == "bytes" else None


class _Maker:
    """Makes the corpora of one call, which read the same files."""

    def __init__(self, processes: int, cluster: str | None, work: str | os.PathLike | None):
        self._processes, self._cluster, self._work = processes, cluster, work
        self._identities: list[list[dict[str, Any]]] | None = None

    def identities(self, job: Job) -> list[list[dict[str, Any]]]:
        """Name, size and hash of the files of each source."""
        if self._identities is None:
            with ThreadPoolExecutor(min(8, self._processes)) as threads:
                self._identities = [list(threads.map(readers.identity, source.paths())) for source in job.sources]
        return self._identities

    def estimate(self, job: Job, config: VocabularyConfig) -> None:
        """Prints the estimate of one corpus."""
        known = _known(config)
        _check_fields(job)
        _announce(job, known, config, "a dry run")
        print_estimate(job, known, config, self._processes, str(self._work_directory(Store(job.corpus))))

    def make(self, job: Job, config: VocabularyConfig) -> Corpus:
        """Makes one corpus, or returns the existing one if it was made from the same settings."""
        store, known = Store(job.corpus), _known(config)
        work = self._work_directory(store)
        if store.read(MANIFEST) is not None:
            existing = _existing(store, _settings(job, self.identities(job), known, config))
            print(f"prepare: {store.path} is there already, made with the same settings from the same inputs")
            shutil.rmtree(work, ignore_errors=True)  # left if a process was killed right after it wrote the manifest
            return existing
        _check_fields(job)
        _announce(job, known, config, f"Dask at {self._cluster}" if self._cluster else f"{self._processes} processes")
        remedy = f"free space and run the same command again; the finished tasks in {work} are kept"
        with (
            disk_full_is_an_answer(store.path, remedy),
            _locked(work, store),
            start_workers(self._processes, self._cluster) as workers,
        ):
            files = scan_files(work, job, workers)
            self._identities = [[file["identity"] for file in of if file["identity"]] for of in files]
            settings = _settings(job, self._identities, known, config)
            _begin(work, store, settings)
            steps = Steps(work, job, workers, files)
            result = steps.run(known, config, settings)
            _report(result, steps)
        shutil.rmtree(work)
        return result

    def _work_directory(self, store: Store) -> pathlib.Path:
        if self._work is not None:
            digest = hashlib.sha256(store.path.encode("utf-8")).hexdigest()[:16]
            return pathlib.Path(self._work).absolute() / f"prepare-{digest}"
        if (local := store.local()) is None:
            raise UserError(
                "prepare-no-work",
                f"prepare: {store.path} is in a bucket: name a directory for the work files with prepare.work, on a "
                "disk with about twice the size of the corpus",
            )
        return local / "work"


def _existing(store: Store, settings: dict[str, Any]) -> Corpus:
    """The complete corpus at `store`; refuses one made with other settings."""
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
def _locked(work: pathlib.Path, store: Store) -> Iterator[None]:
    """Locks the work directory; refuses one in use by another process."""
    with contextlib.ExitStack() as held:
        try:
            busy = f"another `prepare` is writing {store.path}: wait for it to finish, or stop it"
            held.enter_context(lock(work / "lock", busy))
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                "prepare-not-writable",
                f"cannot write to {work}: {error.strerror}; choose another directory for the corpus",
            ) from error
        yield


def _begin(work: pathlib.Path, store: Store, settings: dict[str, Any]) -> None:
    """Refuses a work directory that was begun with other settings."""
    path = work / "settings.json"
    if not path.exists():
        write_json(path, settings)
    elif changed := _changed(read_json(path), settings):
        raise UserError(
            "prepare-other-settings",
            f"{store.path} was half prepared with other settings ({changed}): run with those again, or delete {work} "
            "to start over",
        )


def _check_fields(job: Job) -> None:
    """Refuses sources that cannot have the metadata."""
    if job.metadata is None:
        return
    for source in job.sources:
        if source.template:
            raise UserError(
                "metadata-of-conversations",
                f"source {source.name!r} has conversations (template {source.template!r}), without metadata: leave out "
                "prepare.metadata or the source",
            )
        path = job.metadata.field or source.fields().url
        if path is None or not has_field(source, path):
            what = f"no field {path!r} in its first {FIRST_RECORDS:,} records" if path else "no URL in its schema"
            remedy = "Metadata.field" if job.metadata.field else f"Source.url_field (schema {source.schema!r})"
            raise UserError(
                "metadata-no-field",
                f"source {source.name!r} has {what}, so no metadata: name the field with {remedy}, or leave the source "
                "out",
            )


def _announce(job: Job, known: Vocabulary | None, config: VocabularyConfig, who: str) -> None:
    print(f"prepare: corpus {job.corpus}")
    for source in job.sources:
        if source.has_files:
            sizes = list(map(os.path.getsize, source.paths()))
            print(f"  source {source.name}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB")
        else:
            print(f"  source {source.name}: {source.origin}")
    if job.texts != (0.0, 1.0):
        print(f"  {job.texts[1] - job.texts[0]:.1%} of the documents, by a hash of their text")
    if job.metadata is not None:
        print(f"  before each document: {job.metadata.prefix('...').strip()!r} from the {job.metadata.what}")
    print(
        f"  vocabulary: {known.kind} of {known.size:,}"
        if known
        else f"  vocabulary: SentencePiece of {config.size:,}, to be trained on up to {config.train_characters:,} "
        "characters"
    )
    print(f"  rows of {job.sequence_length:,} tokens, packing {job.packing}, {who}")


def _report(corpus: Corpus, steps: Steps) -> None:
    counts = corpus.manifest
    print(
        f"prepare: {counts['num_documents']:,} documents, {counts['num_tokens']:,} tokens in {corpus.num_rows:,} "
        f"rows; {steps.speed}"
    )
    if counts["num_discarded_tokens"]:
        print(f"  discarded by packing: {counts['num_discarded_tokens']:,} tokens")
    total: dict[tuple[str, str], list[Any]] = {}
    for name, _, reason, count, first in steps.skipped():
        total.setdefault((name, reason), [0, first])[0] += count
    for (name, reason), (count, first) in sorted(total.items()):
        print(f"  skipped, {name}: {reason}: {count:,}, first {first}")
    if unspelled := counts.get("unspelled"):
        named = ", ".join(f"{code} ({count:,})" for code, count in list(unspelled.items())[:10])
        print(f"  characters that the vocabulary cannot spell, lost: {sum(unspelled.values()):,}: {named}")
    if about := counts.get("metadata"):
        print(f"  metadata: {about['tokens']:,} tokens, {about['values']:,} values")
        for reason, count in sorted(about["without"].items()):
            print(f"  without metadata of their own, {reason}: {count:,} documents")
    print(f"  at {corpus.path}, fingerprint {corpus.fingerprint[:12]}")
