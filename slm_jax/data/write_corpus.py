"""Tokenized documents -> the rows of a corpus: shuffled, packed, written block by block."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
from tqdm import tqdm

from slm_jax.data.corpus import Corpus, CorpusWriter
from slm_jax.data.hashing import mix, salt
from slm_jax.data.packing import PACKINGS, Pieces
from slm_jax.data.preprocess import token_dtype
from slm_jax.data.store import SHARD_ROWS, Store
from slm_jax.data.tokenized_shards import Documents
from slm_jax.data.vocabularies import Vocabulary
from slm_jax.errors import UserError

_DOCUMENTS_SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("id", "source", "url")]
    + [(name, pyarrow.int64()) for name in ("row", "start", "length", "bytes")]
)


def write_rows(
    store: Store, table: Documents, vocabulary: Vocabulary, settings: dict[str, Any], counts: Mapping[str, Counter]
) -> Corpus:
    """Shuffles, packs and writes the documents.

    Args:
        store: where to.
        table: the documents, tokenised.
        vocabulary: theirs.
        settings: everything that determines the corpus; recorded.
        counts: by source and reason: records `skipped`, documents `without` metadata of their own.
    """
    names = [source["name"] for source in settings["sources"]]
    source_names = _source_names(table, names)
    order = _shuffled(table, names, settings["seed"])
    sequence_length = settings["sequence_length"]
    pieces = PACKINGS[settings["packing"]](table.length[order], sequence_length)
    if pieces.segment.max() > np.iinfo(np.uint16).max:
        raise UserError(f"sequence_length {sequence_length} is too long: a row would hold more than 65,535 documents")
    writer = CorpusWriter(store, pieces.num_rows, sequence_length, vocabulary)
    tokens_of, loss_tokens = np.zeros(len(source_names), np.int64), 0
    for block in tqdm(_blocks(table, order, pieces, source_names, sequence_length, vocabulary), "writing rows",
                      total=-(-pieces.num_rows // SHARD_ROWS), unit=" blocks"):  # fmt: skip
        tokens_of += np.bincount(block["source_ids"][block["segment_ids"] > 0], minlength=len(source_names))
        loss_tokens += int(block["loss_mask"].sum())
        writer.write(block)
    documents_of = Counter(table.source)
    more = {
        "settings": settings,
        "num_documents": len(order),
        "num_tokens": int(tokens_of.sum()),
        "num_loss_tokens": loss_tokens,
        "num_discarded_tokens": int(table.length.sum() - tokens_of.sum()),
        "skipped": dict(counts["skipped"]),
        "sources": {
            name: {"documents": documents_of[name], "tokens": int(count)}
            for name, count in zip(source_names, tokens_of, strict=True)
        },
    }
    documents = _document_table(table, order, pieces)
    if "metadata" in settings:
        values = [table.metadata[document] for document in order]
        documents = documents.append_column("metadata", pyarrow.array(values, pyarrow.string()))
        more["metadata"] = {
            "tokens": more["num_tokens"] - loss_tokens - len(order),  # all without loss but a BOS per document
            "values": len(set(values) - {None}),
            "without": dict(counts["without"]),
        }
    return writer.finish(documents, source_names, more)


def _shuffled(table: Documents, names: Sequence[str], seed: int) -> np.ndarray:
    """The order of the documents, [D]: by a hash of seed, source and index."""
    ordinal_of = {name: ordinal for ordinal, name in enumerate(names)}
    ordinal = np.array([ordinal_of[source.partition("/")[0]] for source in table.source])
    salts = np.array([salt(seed, name) for name in names], np.uint64)
    keys = mix(table.index.astype(np.uint64) ^ salts[ordinal])
    return np.lexsort((table.index, ordinal, keys))


def _source_names(table: Documents, names: Sequence[str]) -> list[str]:
    """Names that occur, in the order of the sources; NAME/noise where a document has marked spans."""
    occur = set(table.source) | {
        f"{name}/noise" for name, noisy in zip(table.source, table.noisy, strict=True) if noisy
    }
    result = sorted(occur, key=lambda name: (names.index(name.partition("/")[0]), name))
    if len(result) > 255:
        raise UserError(f"the documents have {len(result)} source names, at most 255 are possible: set no source_field")
    return result


def _blocks(table: Documents, order, pieces: Pieces, source_names, sequence_length, vocabulary) -> Iterator[dict]:
    """The columns, `SHARD_ROWS` rows at a time."""
    source_id = {name: number for number, name in enumerate(source_names)}
    clean = np.array([source_id[name] for name in table.source], np.uint8)
    noise = np.array([source_id.get(f"{name}/noise", 0) for name in table.source], np.uint8)
    for begin in range(0, pieces.num_rows, SHARD_ROWS):
        end = min(begin + SHARD_ROWS, pieces.num_rows)
        shape = (end - begin, sequence_length)
        tokens = np.full(shape, vocabulary.pad_id, token_dtype(vocabulary))
        segment_ids, source_ids = np.zeros(shape, np.uint16), np.zeros(shape, np.uint8)
        loss_mask = np.zeros(shape, bool)
        for p in range(*np.searchsorted(pieces.row, (begin, end)).tolist()):
            document, length = int(order[pieces.document[p]]), int(pieces.length[p])
            place = (int(pieces.row[p]) - begin, slice(int(pieces.offset[p]), int(pieces.offset[p]) + length))
            tokens[place], loss_mask[place], noisy = table.piece(document, int(pieces.start[p]), length)
            segment_ids[place] = pieces.segment[p]
            source_ids[place] = np.where(noisy, noise[document], clean[document])
        yield {"tokens": tokens, "segment_ids": segment_ids, "loss_mask": loss_mask, "source_ids": source_ids}


def _document_table(table: Documents, order: np.ndarray, pieces: Pieces) -> pyarrow.Table:
    first = np.searchsorted(pieces.document, np.arange(len(order)))  # pieces come in the order of the documents
    return pyarrow.table(
        {
            "id": [table.id[document] for document in order],
            "source": [table.source[document] for document in order],
            "url": [table.url[document] or None for document in order],
            "row": pieces.row[first],
            "start": pieces.offset[first],
            "length": np.bincount(pieces.document, pieces.length, minlength=len(order)).astype(np.int64),
            "bytes": table.bytes[order],
        },
        schema=_DOCUMENTS_SCHEMA,
    )
