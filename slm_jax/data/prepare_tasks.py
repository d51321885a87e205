"""The tasks of `prepare`: what one worker does with some of the files.

scan      hashes an input file and finds where it can be cut
survey    samples documents of some parts for the vocabulary, and counts metadata
tokenize  turns the documents of some parts into sorted runs
merge     merges runs, if there are many
plan      finds where each bucket of keys begins in the rows, from the lengths of all documents in order
write     writes a range of rows, and the table of the documents that begin there
"""

import functools
import io
import itertools
import json
import pathlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from slm_jax.data import readers
from slm_jax.data.corpus import block_digest, write_block
from slm_jax.data.hashing import mix, salt
from slm_jax.data.metadata import Metadata, with_metadata
from slm_jax.data.packing import pack_from
from slm_jax.data.preprocess import token_dtype, tokenize_batch
from slm_jax.data.readers import Part, Record
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.sorted_runs import LOSS, NOISE, Collector, read_lengths, read_runs, write_run
from slm_jax.data.sources import Source, Tally, columns_of, read_records, task_or_tfds_records, text_fraction, text_hash
from slm_jax.data.store import SHARD_ROWS, Store
from slm_jax.data.vocabularies import VocabularyConfig, load_vocabulary
from slm_jax.data.vocabulary import DESCRIPTION_FILE, Vocabulary
from slm_jax.data.workers import publish, publishing
from slm_jax.errors import UserError

BATCH = 500  # documents to tokenize at a time
BATCH_CHARACTERS = 2_000_000
# What a task holds in memory at a time.
RUN_TOKENS, RUN_DOCUMENTS = 8 << 20, 100_000
WRITE_TOKENS = 8 << 20
PLAN_DOCUMENTS = 1 << 20
BUCKET_TOKENS = 1 << 20
SPOOL_LINE = 1 << 40  # maximum line of our own files; documents have their own limit
DOCUMENTS_SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("id", "source", "url")]
    + [(name, pyarrow.int64()) for name in ("row", "start", "length", "bytes")]
)


@dataclass(frozen=True)
class Job:
    """Everything that determines a corpus except its vocabulary and the content of its files. The corpus has the
    documents whose `text_fraction` is in the range `texts`."""

    corpus: str
    sources: Sequence[Source]
    sequence_length: int
    packing: str
    seed: int
    metadata: Metadata | None = None
    texts: tuple[float, float] = (0.0, 1.0)

    @property
    def field(self) -> str | None:
        return self.metadata.field if self.metadata else None


class Piece(NamedTuple):
    """A part of a file, to be read by a task.

    Attributes:
        source: number of its source.
        file: number of the file in the source.
        path: the file to read.
        stat: size and modification time that `path` must have.
        part: which part.
        index: number of its first record in the source.
        taken: documents of the source before it, for a source with limits.
        characters: likewise.
        origin: source of records that were first written to `path`, see `spool`; None for a user's file.
    """

    source: int
    file: int
    path: str
    stat: tuple[int, int]
    part: Part
    index: int
    taken: int = 0
    characters: int = 0
    origin: str | None = None


def stat_of(path: str) -> tuple[int, int]:
    found = pathlib.Path(path).stat()
    return found.st_size, found.st_mtime_ns


def scan(work: pathlib.Path, key: str, paths: Sequence[str], part_bytes: int, max_line_bytes: int) -> dict[str, Any]:
    """Hashes files, and cuts them into parts."""
    files = []
    for path in paths:
        stat = stat_of(path)
        parts = readers.split_file(path, part_bytes, max_line_bytes)
        files.append({"identity": readers.identity(path), "stat": stat, "parts": parts, "path": path, "origin": None})
        _check_unchanged(path, stat)
    return {"files": files}


def spool(work: pathlib.Path, key: str, job: Job, number: int, part_bytes: int) -> dict[str, Any]:
    """Writes the records of a Task or of TFDS as JSON lines, which are then read in parts as those of files are."""
    source = job.sources[number]
    path = work / f"{key}.jsonl"
    with publishing(path) as own, own.open("w", encoding="utf-8") as file:
        for record in task_or_tfds_records(source, columns_of(source, job.field)):
            file.write(json.dumps({"fields": record.fields, "problem": record.problem}) + "\n")
    parts = readers.split_file(str(path), part_bytes, SPOOL_LINE)
    about = {"identity": None, "stat": stat_of(str(path)), "parts": parts, "path": str(path), "origin": source.origin}
    return {"files": [about]}


def _check_unchanged(path: str, stat: Sequence[int]) -> None:
    if stat_of(path) != tuple(stat):
        raise UserError(
            "file-changed", f"{path} changed while it was read: wait until it is complete, then run the command again"
        )


def _documents(job: Job, piece: Piece, tally: Tally) -> Iterator[dict[str, Any]]:
    """The documents of a piece that belong to the corpus."""
    source, (begin, end) = job.sources[piece.source], job.texts
    columns = columns_of(source, job.field)
    if piece.origin is None:
        records = readers.records(piece.path, columns, source.max_line_bytes, piece.part)
    else:
        lines = readers.records(piece.path, [], SPOOL_LINE, piece.part)
        first = piece.part.first + 1
        records = (
            Record(f"{piece.origin}:{number}", line.fields["fields"], line.fields["problem"], 0)
            for number, line in enumerate(lines, first)
            if line.fields
        )
    for row in read_records(source, records, tally, piece.index, job.field):
        if not row["skipped"] and ((begin, end) == (0.0, 1.0) or begin <= text_fraction(row["text"]) < end):
            yield row
    _check_unchanged(piece.path, piece.stat)


def _tally(piece: Piece) -> Tally:
    return Tally(piece.origin or piece.path, piece.taken, piece.characters)


def count(work: pathlib.Path, key: str, job: Job, piece: Piece) -> dict[str, Any]:
    """Counts the documents that a source would take without its limits."""
    source = replace(job.sources[piece.source], max_documents=None, max_characters=None)
    source = replace(source, bad_lines=1 << 60, max_document_characters=1 << 60)
    sources = [source if number == piece.source else other for number, other in enumerate(job.sources)]
    tally = _tally(piece)
    for _ in _documents(replace(job, sources=sources, texts=(0.0, 1.0)), piece, tally):
        pass
    return {"taken": tally.taken, "characters": tally.characters}


def survey(
    work: pathlib.Path, key: str, job: Job, pieces: Sequence[Piece], below: int | None, values: bool
) -> dict[str, Any]:
    """Reads documents before they are tokenized.

    Args:
        work: directory of the corpus' work files.
        key: of the task.
        job: the description of the corpus.
        pieces: the parts to read.
        below: sample the documents with a random key below this, to train a vocabulary on; None for no sample.
        values: whether to count the values of the metadata.
    """
    counts, tallies, characters = Counter[str](), [], 0
    with publishing(work / f"{key}.jsonl") as own, own.open("w", encoding="utf-8") as file:
        for piece in pieces:
            its_salt, tally = salt("vocabulary", job.sources[piece.source].name), _tally(piece)
            for row in _documents(job, piece, tally):
                if values and job.metadata and (value := job.metadata.own_value(row["url"], row["field"])) is not None:
                    counts[value] += 1
                number = int(mix(np.array([row["index"]], np.uint64) ^ its_salt)[0])
                if below is not None and number < below:
                    file.write(json.dumps([number, piece.source, row["index"], len(row["text"]), row["text"]]) + "\n")
                    characters += len(row["text"])
            tallies.append(asdict(tally))
    if values:
        publish(work / f"{key}.values", json.dumps(counts).encode("utf-8"))
    return {"tallies": tallies, "characters": characters}


def top_values(work: pathlib.Path, key: str, surveys: Sequence[str], top: int) -> dict[str, Any]:
    """The values of the metadata that occur most often; ties are broken alphabetically."""
    counts = Counter[str]()
    for survey in surveys:
        counts.update(json.loads((work / f"{survey}.values").read_bytes()))
    kept = sorted(counts, key=lambda value: (-counts[value], value))[:top]
    publish(work / "kept.json", json.dumps(kept).encode("utf-8"))
    return {"values": len(counts)}


def train(work: pathlib.Path, key: str, surveys: Sequence[str], config: VocabularyConfig) -> dict[str, Any]:
    """Trains a vocabulary on the first `train_characters` of the sample, in the order of its random keys."""

    def sample() -> Iterator[list[Any]]:
        for survey in surveys:
            with (work / f"{survey}.jsonl").open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    sizes, characters, last = sorted(row[:4] for row in sample()), 0, None
    for *order, size in sizes:
        last, characters = order, characters + size
        if characters >= config.train_characters:
            break
    chosen = sorted(row for row in sample() if last is not None and row[:3] <= last)
    print(f"prepare: training a vocabulary of {config.size:,} on {characters:,} characters")
    train_sentencepiece((row[-1] for row in chosen), config.size).save(work / "vocabulary")
    return {"characters": characters}


def tokenize(work: pathlib.Path, key: str, job: Job, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Turns documents into runs of limited size, so that memory does not grow with the files."""
    vocabulary, collected = _vocabulary(work), Collector()
    runs: list[str] = []
    total, without, unspelled, noisy, shown = Counter(), Counter(), Counter(), set(), set()
    tallies, kept = [], None
    if job.metadata and job.metadata.top is not None:
        kept = frozenset(json.loads((work / "kept.json").read_bytes()))

    def add(source: int, rows: list[dict[str, Any]]) -> None:
        index = np.array([row["index"] for row in rows], np.uint64)
        keys = mix(index ^ salt(job.seed, job.sources[source].name)).tolist()
        for row, number, made in zip(rows, keys, tokenize_batch(rows, vocabulary), strict=True):
            collected.add(number, source, row, made)
            total[row["source"]] += 1
            if made.noise.any():
                noisy.add(row["source"])
            unspelled.update(vocabulary.unspelled(row["prefix"] + row["text"]))
            shown.add(row["metadata"])

    def spill() -> None:
        nonlocal collected
        runs.append(f"{key}.run{len(runs)}")
        write_run(work / runs[-1], [collected.documents()])
        tokens.append(collected.num_tokens)
        collected = Collector()

    tokens: list[int] = []
    for piece in pieces:
        tally, rows, characters = _tally(piece), [], 0
        for row in with_metadata(_documents(job, piece, tally), job.metadata, kept, without):
            rows.append(row)
            characters += len(row["text"])
            if len(rows) == BATCH or characters >= BATCH_CHARACTERS:
                add(piece.source, rows)
                rows, characters = [], 0
                if collected.num_tokens >= RUN_TOKENS or len(collected) >= RUN_DOCUMENTS:
                    spill()
        if rows:
            add(piece.source, rows)
        tallies.append(asdict(tally))
    if len(collected):
        spill()
    if job.metadata:
        values = [text_hash(value) for value in shown if value is not None]
        content = io.BytesIO()
        np.save(content, np.unique(np.array(values, np.uint64)))
        publish(work / f"{key}.values.npy", content.getbuffer())
    counts = {"sources": total, "without": without, "unspelled": unspelled}
    return {**counts, "noisy": sorted(noisy), "runs": runs, "tokens": sum(tokens), "tallies": tallies}


def merge(work: pathlib.Path, key: str, runs: Sequence[str]) -> dict[str, Any]:
    """Merges several runs into one."""
    dtype = token_dtype(_vocabulary(work))
    tokens = sum((work / run / "tokens").stat().st_size for run in runs) // dtype.itemsize
    parts = 1 + tokens // RUN_TOKENS
    borders = [number * (1 << 64) // parts for number in range(parts + 1)]
    paths = [work / run for run in runs]
    ranges = itertools.pairwise(borders)
    write_run(work / f"{key}.run", (read_runs(paths, first, last, dtype) for first, last in ranges))
    return {"run": f"{key}.run"}


def plan(work: pathlib.Path, key: str, job: Job, runs: Sequence[str], documents: int, tokens: int) -> dict[str, Any]:
    """Writes plan.npy, [buckets + 1]: where the documents of each bucket begin, in tokens of the concatenated rows.

    Keys are random, so buckets of equal ranges of keys have about equally many tokens.
    """
    bits = (tokens // BUCKET_TOKENS).bit_length()
    places, place = np.zeros((1 << bits) + 1, np.int64), 0
    step = max(1, (PLAN_DOCUMENTS << bits) // max(documents, 1))  # buckets at a time
    paths = [work / run for run in runs]
    for first in range(0, 1 << bits, step):
        last = min(first + step, 1 << bits)
        keys, lengths = read_lengths(paths, first << (64 - bits), last << (64 - bits))
        pieces = pack_from(place, job.packing, lengths, job.sequence_length)
        # The end of the last piece of each document, with where the first begins in front: [documents + 1].
        final = np.searchsorted(pieces.document, np.arange(len(lengths)), side="right") - 1
        ends = pieces.row[final] * job.sequence_length + pieces.offset[final] + pieces.length[final]
        ends = np.concatenate([[place], ends])
        borders = np.array([bucket << (64 - bits) for bucket in range(first, last)], np.uint64)
        places[first:last], place = ends[np.searchsorted(keys, borders)], int(ends[-1])
    places[-1] = place
    content = io.BytesIO()
    np.save(content, places)
    publish(work / "plan.npy", content.getbuffer())
    return {"rows": -(-place // job.sequence_length)}


def write(
    work: pathlib.Path, key: str, job: Job, runs: Sequence[str], names: Sequence[str], rows: tuple[int, int]
) -> dict[str, Any]:
    """Writes rows [begin, end), whole blocks of them, and a part of the table of documents."""
    vocabulary, length = _vocabulary(work), job.sequence_length
    begin, end = rows

    # The documents of all buckets that reach into these rows.
    places = np.load(work / "plan.npy", mmap_mode="r")
    bits = (len(places) - 1).bit_length() - 1
    first = int(np.searchsorted(places, begin * length, side="right")) - 1
    last = int(np.searchsorted(places, end * length, side="left"))
    dtype = token_dtype(vocabulary)
    found = read_runs([work / run for run in runs], first << (64 - bits), last << (64 - bits), dtype)
    table, described = found.table, found.names()

    # Their pieces in these rows; `at` is a piece's place in the block.
    every = pack_from(int(places[first]), job.packing, table["length"], length)
    here = (every.row >= begin) & (every.row < end)
    document, start, size, row, offset, segment = (column[here] for column in every[:6])
    at = (row - begin) * length + offset
    if segment.max(initial=0) > np.iinfo(np.uint16).max:
        raise UserError(
            "prepare-sequence-length",
            f"sequence_length {length} is too long: a row would hold more than 65,535 documents",
        )

    # Tokens, piece by piece, and what is constant in a piece; between pieces there is padding.
    shape, total = (end - begin, length), (end - begin) * length
    tokens = np.full(total, vocabulary.pad_id, dtype)
    source_id = {name: number for number, name in enumerate(names)}
    own = np.array([source_id[source] for source, *_ in described], np.uint8)
    noise = np.array([source_id.get(f"{source}/noise", 0) for source, *_ in described], np.uint8)
    without = np.clip(table["without"][document] - start, 0, size)
    gaps = np.diff(at, append=total) - size
    segment_ids = _spread(segment, size, gaps, np.uint16)
    source_ids = _spread(own[document], size, gaps, np.uint8)
    loss_mask = np.repeat(
        np.tile([False, True, False], len(size)), np.stack([without, size - without, gaps], axis=1).reshape(-1)
    )
    begins = (table["begin"][document] + start).tolist()
    for place, source_place, count in zip(at.tolist(), begins, size.tolist(), strict=True):
        tokens[place : place + count] = found.tokens[source_place : source_place + count]
    # Documents with losses of their own, or noise.
    for piece in np.flatnonzero(table["num_flags"][document]).tolist():
        of, span = document[piece], slice(at[piece], at[piece] + size[piece])
        flags = found.flags[table["flags"][of] + start[piece] :][: size[piece]]
        loss_mask[span] = flags & LOSS > 0
        source_ids[span] = np.where(flags & NOISE > 0, noise[of], own[of])

    # Blocks on disk, each with its digest.
    block = {"tokens": tokens, "segment_ids": segment_ids, "loss_mask": loss_mask, "source_ids": source_ids}
    block = {name: column.reshape(shape) for name, column in block.items()}
    write_block(Store(job.corpus), begin, block)
    blocks = [slice(first, first + SHARD_ROWS) for first in range(0, end - begin, SHARD_ROWS)]
    digests = [block_digest({name: column[some] for name, column in block.items()}) for some in blocks]
    publish(work / f"{key}.digests", b"".join(digests))

    # The documents that begin in these rows, with the tokens that packing keeps of them.
    kept = np.bincount(every.document, every.length, minlength=len(table)).astype(np.int64)
    starts = np.flatnonzero(start == 0)
    mine = document[starts]
    columns: dict[str, Any] = {
        "id": [f"{described[d][0].partition('/')[0]}:{table['index'][d]}" for d in mine],
        "source": [described[d][0] for d in mine],
        "url": [described[d][1] or None for d in mine],
        "row": row[starts],
        "start": offset[starts],
        "length": kept[mine],
        "bytes": table["bytes"][mine],
    }
    schema = DOCUMENTS_SCHEMA
    if job.metadata:
        columns["metadata"] = [described[d][2] for d in mine]
        schema = schema.append(pyarrow.field("metadata", pyarrow.string()))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, schema) as writer:
        writer.write_table(pyarrow.table(columns, schema=schema))
    publish(work / f"{key}.documents", memoryview(sink.getvalue()))
    of_sources = np.bincount(source_ids[segment_ids > 0], minlength=len(names)).tolist()
    return {"tokens": of_sources, "loss_tokens": int(loss_mask.sum()), "documents": len(mine)}


def _spread(values: np.ndarray, sizes: np.ndarray, gaps: np.ndarray, dtype: type) -> np.ndarray:
    """Repeats each value by its size, followed by a gap of zeros."""
    pairs = np.stack([values, np.zeros_like(values)], axis=1).astype(dtype)
    return np.repeat(pairs.reshape(-1), np.stack([sizes, gaps], axis=1).reshape(-1))


def join_documents(work: pathlib.Path, key: str, job: Job, parts: Sequence[str]) -> dict[str, Any]:
    """Writes documents.parquet, with the row groups that a single table would have; gives its checksum."""
    group, waiting, rows = 1 << 20, list[pyarrow.Table](), 0
    path = work / "documents.parquet"
    writer = None
    try:
        for number, part in enumerate(parts):
            with pyarrow.memory_map(str(work / f"{part}.documents")) as file:
                waiting.append(pyarrow.ipc.open_file(file).read_all())
            rows += len(waiting[-1])
            writer = writer or pyarrow.parquet.ParquetWriter(path, waiting[0].schema)
            final = number + 1 == len(parts)
            while rows >= group or (final and rows):
                table = pyarrow.concat_tables(waiting).combine_chunks()
                writer.write_table(table.slice(0, group), row_group_size=group)
                waiting = [table.slice(group)]
                rows = len(waiting[0])
    finally:
        if writer:
            writer.close()
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    Store(job.corpus).move_in("documents.parquet", path)
    return {"documents_crc32": checksum}


def count_values(work: pathlib.Path, key: str, parts: Sequence[str], first: int, last: int) -> dict[str, Any]:
    """The number of metadata values with a hash in [first, last)."""
    found = [np.empty(0, np.uint64)]
    for part in parts:
        values = np.load(work / f"{part}.values.npy", mmap_mode="r")
        found.append(values[np.searchsorted(values, first) : np.searchsorted(values, last)])
    return {"values": len(np.unique(np.concatenate(found)))}


def _vocabulary(work: pathlib.Path) -> Vocabulary:
    description = work / "vocabulary" / DESCRIPTION_FILE
    return _load_vocabulary(str(work / "vocabulary"), description.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load_vocabulary(path: str, _changed: int) -> Vocabulary:
    return load_vocabulary(path)
