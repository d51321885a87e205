"""Estimates the size of a corpus, and the time and disk to prepare it, from a sample of its documents."""

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import zstandard

from slm_jax.data import readers
from slm_jax.data.metadata import with_metadata
from slm_jax.data.packing import PACKINGS
from slm_jax.data.prepare_tasks import RUN_TOKENS, Job
from slm_jax.data.preprocess import token_dtype, tokenize_batch
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.sorted_runs import DOCUMENT
from slm_jax.data.sources import Source, Tally, columns_of, read_records, text_fraction
from slm_jax.data.vocabularies import VocabularyConfig
from slm_jax.data.vocabulary import ByteVocabulary, Vocabulary
from slm_jax.errors import UserError

SAMPLE_FILES, FILE_CHARACTERS, FILE_DOCUMENTS = 8, 500_000, 500  # of a source
STRINGS = 100  # approximate bytes of a document's source and URL
REST = 1.15  # processor time of all of prepare relative to reading and tokenizing, see benchmarks/prepare.py
CORES = 96
PER_ROW, PER_DOCUMENT = 100, 40  # bytes: headers, checksums and index of four columns; documents.parquet


class Sample(NamedTuple):
    """A sample of a source.

    rows: sampled documents of this corpus. scale: size of the source relative to the sample. bytes, files: of the
    source.
    """

    rows: list[dict[str, Any]]
    scale: float
    files: int
    bytes: int


def sample_source(job: Job, source: Source) -> Sample:
    """Reads the beginning of some of the files."""
    paths = source.paths()
    sizes = [os.path.getsize(path) for path in paths]
    chosen = sorted({round(place) for place in np.linspace(0, len(paths) - 1, min(SAMPLE_FILES, len(paths)))})
    rows, read, taken, characters = [], 0, 0, 0
    for number in chosen:
        consumed = 0

        def watched(records: Iterator[readers.Record]) -> Iterator[readers.Record]:
            nonlocal consumed
            for record in records:
                consumed = record.bytes_read
                yield record

        tally = Tally(paths[number])
        records = watched(readers.records(paths[number], columns_of(source, job.field), source.max_line_bytes))
        for row in read_records(source, records, tally, 0, job.field):
            if not row["skipped"] and job.texts[0] <= text_fraction(row["text"]) < job.texts[1]:
                rows.append(row)
            if tally.characters >= FILE_CHARACTERS or tally.records == FILE_DOCUMENTS:
                break
        else:
            consumed = sizes[number]
        read, taken, characters = read + consumed, taken + tally.taken, characters + tally.characters
    scale = sum(sizes) / max(read, 1)
    if source.max_documents is not None:
        scale = min(scale, source.max_documents / max(taken, 1))
    if source.max_characters is not None:
        scale = min(scale, source.max_characters / max(characters, 1))
    return Sample(rows, scale, len(paths), sum(sizes))


def print_estimate(job: Job, known: Vocabulary | None, config: VocabularyConfig, cores: int, work: str) -> None:
    """Prints documents, tokens, time and disk."""
    begin = time.process_time()
    samples = {source.name: sample_source(job, source) for source in job.sources if source.has_files}
    reading = time.process_time() - begin
    vocabulary, which = known, "its vocabulary"
    if vocabulary is None:
        which = f"a vocabulary of {config.size:,} that was trained on the sample"
        texts = itertools.chain.from_iterable((row["text"] for row in sample.rows) for sample in samples.values())
        try:
            vocabulary = train_sentencepiece(texts, config.size)
        except UserError:  # too little text
            vocabulary, which = ByteVocabulary(), "bytes, since the sample is too small to train a vocabulary on"

    # Tokens of each sample, and the time for them.
    begin, tokens, documents, rows, disk, seen = time.process_time(), 0.0, 0.0, 0.0, 0.0, 0
    itemsize, compress = token_dtype(vocabulary).itemsize, zstandard.ZstdCompressor(level=1).compress
    for name, sample in samples.items():
        made = tokenize_batch(list(with_metadata(sample.rows, job.metadata, None, Counter())), vocabulary)
        lengths = np.array([len(document.tokens) for document in made], np.int64)
        print(
            f"  source {name}: {sample.files} files, {sample.bytes / 1e6:,.1f} MB; about "
            f"{len(made) * sample.scale:,.0f} documents, {lengths.sum() * sample.scale:,.0f} tokens"
        )
        if not made:
            continue
        flat = np.concatenate([document.tokens for document in made])
        # Rows are compressed one by one; the other columns take little beyond the fixed cost per row.
        cuts = range(0, len(flat), job.sequence_length)
        packed = sum(len(compress(flat[cut : cut + job.sequence_length].tobytes())) for cut in cuts)
        disk += packed * sample.scale
        rows += PACKINGS[job.packing](lengths, job.sequence_length).num_rows * sample.scale
        seen += len(flat)
        tokens, documents = tokens + len(flat) * sample.scale, documents + len(made) * sample.scale
    for source in job.sources:
        if not source.has_files:
            print(f"  source {source.name}: {source.origin}, which has no files to sample")
    seconds = (reading + time.process_time() - begin) * REST * tokens / max(seen, 1)
    runs = tokens * itemsize + documents * (DOCUMENT.itemsize + STRINGS)
    runs *= 2 if tokens > 512 * RUN_TOKENS else 1  # while they are merged
    column = rows * job.sequence_length
    print(f"  about {tokens:,.0f} tokens of {documents:,.0f} documents in {rows:,.0f} rows, with {which}")
    print(f"  {_duration(seconds / cores)} on {cores} cores like this one, {_duration(seconds / CORES)} on {CORES}")
    disk += PER_ROW * rows + PER_DOCUMENT * documents
    places = f"{_size(runs)} for work files in {work}, {_size(disk)} for the corpus"
    print(f"  disk: {places}, {_size(4 * column)} for each score column (float32)")
    print("prepare: a dry run, nothing was written")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{max(1, seconds / 60):,.0f} minutes"


def _size(amount: float) -> str:
    return f"{amount / 1e9:,.1f} GB" if amount > 1e9 else f"{amount / 1e6:,.1f} MB"
