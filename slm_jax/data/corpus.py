"""A corpus is a table of N rows of L tokens, and a score is a column of it. Opens, reads, verifies and writes corpora.

manifest.json       format version, fingerprint, counts, settings; written last, so its presence means complete
columns/            zarr3 arrays [N, L], one compressed chunk per row, `SHARD_ROWS` rows per file:
  tokens            ids, uint16 or uint32 by the size of the vocabulary
  segment_ids       uint16: which document of its row a token belongs to, from 1; 0 is padding
  loss_mask         bool: whether the token's loss counts
  source_ids        uint8: index into the manifest's `source_names`
documents.parquet   one row per document: id, source, url, row, start, length, bytes (and metadata, if it has any)
vocabulary/         the vocabulary that the tokens belong to
scores/NAME/        score columns: zarr3 arrays [N, L], one per statistic, for example loss; see scores.py
work/               work files until the corpus is complete, unless prepare.work names another place
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Integer

from slm_jax.data.preprocess import token_dtype
from slm_jax.data.scores import ScoreColumn, ScoreName, create_score, open_score, score_names
from slm_jax.data.store import SHARD_ROWS, Store, read_result
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.renamed import with_new_keys

FORMAT_VERSION = 2
READABLE_FORMATS = (1, 2)  # 1 has another fingerprint
MANIFEST = "manifest.json"
DOCUMENTS = "documents.parquet"
# The fingerprint covers these columns in this order: another one here would change the fingerprint of every corpus.
COLUMNS = ("tokens", "segment_ids", "loss_mask", "source_ids")
COLUMN_DTYPES = {"segment_ids": "uint16", "loss_mask": "bool", "source_ids": "uint8"}  # tokens: uint16 or uint32

Rows = Integer[np.ndarray, "B"]


class Corpus:
    """A complete corpus, opened for reading. `slm_jax.data.prepare.prepare` makes one, `Corpus.open` opens it.

    Attributes:
        path: its directory or URL.
        manifest: everything recorded when it was made.
        fingerprint: hash of the content, 64 hexadecimal digits; equal content has equal fingerprints.
        num_rows: number of rows N; every column is [N, L].
        sequence_length: tokens per row L.
        vocabulary_hash: hash of the vocabulary's content.
        vocab_size: number of ids of the vocabulary.
        source_names: the source of each value of `source_ids`.
        metadata: settings of the `Metadata` put before its documents; None for plain documents.
    """

    def __init__(self, store: Store, manifest: dict[str, Any]):
        self._store = store
        self.path = store.path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self.sequence_length: int = manifest["sequence_length"]
        self.vocabulary_hash: str = manifest["vocabulary"]["content_hash"]
        self.vocab_size: int = manifest["vocabulary"]["size"]
        self.source_names: tuple[str, ...] = tuple(manifest["source_names"])
        self.metadata: dict[str, Any] | None = manifest.get("settings", {}).get("metadata")
        self._columns = {name: self._open_column(name) for name in COLUMNS}
        self._scores: dict[str, ScoreColumn] = {}  # opened when first read: a run needs few of them

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Corpus":
        """Opens the corpus at a local path, gs:// or s3:// URL.

        Raises:
            UserError: no corpus there, or one that is unfinished, damaged or of another format version.
        """
        store = Store(path)
        manifest = with_new_keys(store.read_json(MANIFEST))
        # A missing manifest has three causes, each with its own remedy.
        if manifest is None:
            if not store.keys():
                raise UserError(
                    "corpus-not-found",
                    f"no corpus at {store.path}: check the path, or make one with the stage `prepare`",
                )
            if store.keys("work/") or store.keys("columns/"):
                raise UserError(
                    "corpus-unfinished",
                    f"corpus {store.path} is only half prepared: run the same `prepare` again to continue",
                )
            raise UserError("corpus-not-one", f"{store.path} is not a corpus (it has no {MANIFEST}): check the path")
        if manifest.get("format_version") not in READABLE_FORMATS:
            raise UserError(
                "corpus-format",
                f"corpus {store.path} has format version {manifest.get('format_version')}, this version of slm_jax "
                f"reads {READABLE_FORMATS}: prepare it again",
            )
        try:
            return cls(store, manifest)
        except (KeyError, TypeError) as error:
            raise UserError(
                "corpus-damaged", f"{store.path}/{MANIFEST} is damaged ({error!r}): prepare the corpus again"
            ) from error

    def read(self, rows: Rows, columns: Sequence[str] = COLUMNS) -> dict[str, np.ndarray]:
        """Reads rows, in the given order.

        Args:
            rows: row numbers in [0, num_rows).
            columns: names of columns, or 'scores/NAME/STATISTIC' for a finished score column.

        Returns:
            One [B, L] array per column.

        Raises:
            UserError: `column-damaged`, `corpus-no-column`.
            IndexError: a row outside the corpus.
        """
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_rows):
            wrong = int(rows.min() if rows.min() < 0 else rows.max())
            raise IndexError(f"row {wrong} is outside the corpus {self.path} of {self.num_rows} rows")
        # Start all reads before waiting for the first.
        futures = {name: self._column(name)[rows].read() for name in columns}
        among = f"among rows {rows.min()} to {rows.max()}" if rows.size else "no rows"
        return {
            name: read_result(
                future,
                f"column {name} of {self.path}, {among},",
                f"delete {self.path}/scores/{ScoreName.parse(name)[0]} and score again"
                if name.startswith("scores/")
                else "restore it or prepare the corpus again",
            )
            for name, future in futures.items()
        }

    def vocabulary(self) -> Vocabulary:
        """The vocabulary of its tokens.

        Raises:
            UserError: `vocabulary-changed`: its files are not those that the manifest records.
        """
        vocabulary = load_vocabulary(self.path)
        if vocabulary.content_hash != self.vocabulary_hash:
            raise UserError(
                "vocabulary-changed",
                f"corpus {self.path}: its folder vocabulary has the hash {vocabulary.content_hash[:12]}, its manifest "
                f"says {self.vocabulary_hash[:12]}: restore the folder, or prepare the corpus again",
            )
        return vocabulary

    def documents(self) -> pyarrow.Table:
        """One row per document, in corpus order: id, source, url, row and start of its first token, length in tokens,
        bytes of its text, and the text of its `metadata` if the corpus has any."""
        content = self._store.read(DOCUMENTS)
        if content is None:
            raise UserError("corpus-damaged", f"corpus {self.path} has lost its {DOCUMENTS}: prepare it again")
        try:
            # Corpora of earlier versions have no checksum of this file.
            if zlib.crc32(content) != self.manifest.get("documents_crc32", zlib.crc32(content)):
                raise OSError("checksum")
            return pyarrow.parquet.read_table(io.BytesIO(content))
        except (pyarrow.ArrowException, OSError) as error:  # a page that cannot be decompressed is an OSError
            raise UserError(
                "corpus-damaged", f"corpus {self.path}: its {DOCUMENTS} is damaged: restore it or prepare it again"
            ) from error

    def read_documents(
        self, documents: pyarrow.Table, columns: Sequence[str] = ("tokens",)
    ) -> list[dict[str, np.ndarray]]:
        """Reads whole documents, including those that packing cut over several rows.

        Args:
            documents: some rows of `documents()`.
            columns: as in `read`.

        Returns:
            For each document one array [length] per column.
        """
        # A cut document continues at the start of the next row, so in the flattened table it is one span:
        # begin and end are positions there, [documents].
        begin = documents["row"].to_numpy() * self.sequence_length + documents["start"].to_numpy()
        end = begin + documents["length"].to_numpy()
        first, last = begin // self.sequence_length, (end - 1) // self.sequence_length
        # Each row is read once, however many of the documents it holds: [B, L] -> [B * L].
        rows = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)] or [[]]))
        read = {name: x.reshape(-1) for name, x in self.read(rows.astype(np.int64), columns).items()}
        # `rows` is sorted, so the rows of one document are adjacent in what was read, and its span is whole there too.
        at = np.searchsorted(rows, first) * self.sequence_length + begin % self.sequence_length
        return [
            {name: x[start : start + size] for name, x in read.items()}
            for start, size in zip(at, end - begin, strict=True)
        ]

    def score_names(self) -> list[str]:
        """Names of the score columns, finished or not, sorted."""
        return score_names(self._store)

    def score(self, name: str, partial: bool = False) -> ScoreColumn:
        """Opens the score column `name` of exactly this content; with `partial`, also one with unfinished rows.

        Raises:
            UserError: it is missing, unfinished, or was made for another corpus.
        """
        return open_score(self._store, name, self.fingerprint, partial)

    def create_score(
        self, name: str, statistics: Sequence[str] = ("loss",), dtype: str = "float32", *, reference: Mapping[str, Any]
    ) -> ScoreColumn:
        """Creates a score column, or reopens an unfinished one that has the same arguments.

        Args:
            name: letters, digits, '.', '_' and '-'.
            statistics: names of its arrays, each [num_rows, sequence_length].
            dtype: float32 or float16.
            reference: JSON object that identifies the model, including its fingerprint.

        Raises:
            UserError: a column of this name was made with other arguments.
        """
        shape = (self.num_rows, self.sequence_length)
        return create_score(self._store, name, tuple(statistics), dtype, dict(reference), self.fingerprint, shape)

    def expect(self, fingerprint: str, what: str) -> None:
        """Raises UserError unless `what` (a run, a column) was made from exactly this content."""
        if fingerprint != self.fingerprint:
            raise UserError(
                "corpus-mismatch",
                f"{what} was made from a corpus with fingerprint {fingerprint[:12]}, but {self.path} has "
                f"{self.fingerprint[:12]}: pass the corpus it was made from, or make it again",
            )

    def verify(self) -> None:
        """Reads every row and raises UserError if the content does not match the fingerprint."""
        fresh = Corpus.open(self.path)  # this one may answer from its cache, see `_open_column`
        fingerprint = Fingerprint(self.manifest["format_version"])
        for begin in range(0, self.num_rows, SHARD_ROWS):
            fingerprint.update(fresh.read(np.arange(begin, min(begin + SHARD_ROWS, self.num_rows))))
        found = fingerprint.hexdigest(fresh.sequence_length, fresh.vocabulary().content_hash, fresh.source_names)
        if found != self.fingerprint:
            raise UserError(
                "corpus-damaged",
                f"corpus {self.path} was changed after it was made: its content has fingerprint {found[:12]}, "
                f"its manifest says {self.fingerprint[:12]}; prepare it again",
            )

    def _column(self, name: str):
        if name in self._columns:
            return self._columns[name]
        if not name.startswith("scores/"):
            raise UserError(
                "corpus-no-column",
                f"corpus {self.path} has no column {name!r}: {', '.join(COLUMNS)} or scores/NAME/STATISTIC",
            )
        score, statistic = ScoreName.parse(name)
        if score not in self._scores:
            self._scores[score] = self.score(score)
        return self._scores[score].array(statistic)

    def _open_column(self, name: str):
        # A complete corpus does not change, so chunks in the cache need no check against the file.
        column = self._store.open_array(f"columns/{name}", immutable=True)
        if column is None:
            raise UserError("corpus-damaged", f"corpus {self.path} has lost its column {name!r}: prepare it again")
        if column.shape != (self.num_rows, self.sequence_length):
            raise UserError(
                "corpus-damaged",
                f"corpus {self.path}: column {name!r} is {column.shape[0]} x {column.shape[1]}, the manifest says "
                f"{self.num_rows} x {self.sequence_length}; prepare it again",
            )
        self._store.say_if_unchecked(column)
        return column


def block_digest(block: Mapping[str, np.ndarray]) -> bytes:
    """SHA-256 of the columns of one block, one after the other: `SHARD_ROWS` rows, fewer at the end of a corpus."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(np.ascontiguousarray(block[name]).data)
    return digest.digest()


class Fingerprint:
    """Hash of a corpus' content. It covers the digests of the blocks, so that workers can hash blocks in parallel.

    Args:
        format_version: format 1 has one hash per column over all rows instead, which only one process can compute.
    """

    def __init__(self, format_version: int = FORMAT_VERSION):
        self._version = format_version
        names = COLUMNS if format_version == 1 else ("blocks",)
        self._hashes = {name: hashlib.sha256() for name in names}

    def update(self, block: Mapping[str, np.ndarray]) -> None:
        """Adds the next block of rows, [B, L] per column; see `block_digest`."""
        if self._version > 1:
            self.add(block_digest(block))
        else:
            for name, digest in self._hashes.items():
                digest.update(np.ascontiguousarray(block[name]).data)

    def add(self, digests: bytes) -> None:
        """Adds the next blocks by their digests, concatenated."""
        self._hashes["blocks"].update(digests)

    def hexdigest(self, sequence_length: int, vocabulary_hash: str, source_names: Iterable[str]) -> str:
        """The fingerprint, 64 hexadecimal digits: of the rows, and of what gives their ids a meaning."""
        content = {name: digest.hexdigest() for name, digest in self._hashes.items()}
        content |= {
            "row_length": sequence_length,  # the name in earlier versions: another key would change every fingerprint
            "vocabulary": vocabulary_hash,
            "source_names": list(source_names),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def create_columns(store: Store, num_rows: int, sequence_length: int, vocabulary: Vocabulary) -> None:
    """Creates the four columns, [num_rows, sequence_length] each, and discards any that are there."""
    dtypes = {"tokens": token_dtype(vocabulary).name, **COLUMN_DTYPES}
    for name in COLUMNS:
        store.create_array(f"columns/{name}", dtypes[name], (num_rows, sequence_length), complete=True)


def write_block(store: Store, begin: int, block: Mapping[str, np.ndarray]) -> None:
    """Writes rows from `begin` on, [B, L] per column. Several processes may write at the same time if each writes whole
    files: `begin` and B must be multiples of `SHARD_ROWS`, except at the end of the corpus."""
    arrays = {name: store.open_array(f"columns/{name}", cached=False) for name in COLUMNS}
    some = 4 * SHARD_ROWS  # rows at a time: TensorStore copies them before it writes
    for first in range(0, len(block["tokens"]), some):
        writing = []
        for name, array in arrays.items():
            assert array is not None
            rows = block[name][first : first + some]
            writing.append(array[begin + first : begin + first + len(rows)].write(rows))
        for future in writing:
            future.result()


def complete(
    store: Store,
    fingerprint: Fingerprint,
    shape: tuple[int, int],
    vocabulary: Vocabulary,
    source_names: Sequence[str],
    more: Mapping[str, Any],
) -> Corpus:
    """Turns columns and documents that are on disk into a corpus, by writing the vocabulary and the manifest.

    Args:
        store: of the corpus.
        fingerprint: to which all rows were added.
        shape: (num_rows, sequence_length).
        vocabulary: of the tokens.
        source_names: the source of each value of `source_ids`.
        more: further entries of the manifest, such as counts and settings.
    """
    for name, file in vocabulary.files().items():
        store.write(f"vocabulary/{name}", file)
    about = {"kind": vocabulary.kind, "size": vocabulary.size, "content_hash": vocabulary.content_hash}
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint.hexdigest(shape[1], vocabulary.content_hash, source_names),
        "num_rows": shape[0],
        "sequence_length": shape[1],
        "source_names": list(source_names),
        "vocabulary": about,
    }
    # Last: without a manifest, `open` refuses the corpus as unfinished.
    store.write_json(MANIFEST, {**more, **manifest})
    return Corpus.open(store.path)


class CorpusWriter:
    """Writes a corpus from arrays in one process: call `write` for each block of rows in order, then `finish`."""

    def __init__(self, store: Store, num_rows: int, sequence_length: int, vocabulary: Vocabulary):
        self._store, self._vocabulary, self._shape = store, vocabulary, (num_rows, sequence_length)
        self._fingerprint, self._rows = Fingerprint(), 0
        create_columns(store, num_rows, sequence_length, vocabulary)

    def write(self, block: Mapping[str, np.ndarray]) -> None:
        """Appends a block, [B, L] per column; B is `SHARD_ROWS`, a whole file, for every block but the last."""
        write_block(self._store, self._rows, block)
        self._fingerprint.update(block)
        self._rows += len(block["tokens"])

    def finish(self, documents: pyarrow.Table, source_names: Sequence[str], more: Mapping[str, Any]) -> Corpus:
        """Writes documents, vocabulary and manifest; `more` are counts and settings for the manifest."""
        assert self._rows == self._shape[0], f"{self._rows} rows written, {self._shape[0]} announced"
        content = io.BytesIO()
        pyarrow.parquet.write_table(documents, content)
        self._store.write(DOCUMENTS, content.getvalue())
        more = {"documents_crc32": zlib.crc32(content.getvalue()), **more}
        return complete(self._store, self._fingerprint, self._shape, self._vocabulary, source_names, more)
