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
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError

_DOCUMENTS_SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("id", "source", "url")]
    + [(name, pyarrow.int64()) for name in ("row", "start", "length", "bytes")]
)


def write_rows(
    store: Store, table: Documents, vocabulary: Vocabulary, settings: dict[str, Any], counts: Mapping[str, Any]
) -> Corpus:
    """Shuffles, packs and writes the documents.

    Args:
        store: where to write.
        table: the tokenized documents.
        vocabulary: the one that made their ids.
        settings: everything that determines the corpus; recorded.
        counts: `skipped` records by source, file and reason; documents that have no metadata themselves (`without`).
    """
    # Order: by a hash of seed, source and index.
    names = [source["name"] for source in settings["sources"]]
    number_of = {name: number for number, name in enumerate(names)}
    ordinal = np.array([number_of[source.partition("/")[0]] for source in table.source])
    salts = np.array([salt(settings["seed"], name) for name in names], np.uint64)
    order = np.lexsort((table.index, ordinal, mix(table.index.astype(np.uint64) ^ salts[ordinal])))

    # Packing: on the lengths alone.
    sequence_length = settings["sequence_length"]
    pieces = PACKINGS[settings["packing"]](table.length[order], sequence_length)
    if pieces.segment.max() > np.iinfo(np.uint16).max:
        raise UserError(
            "prepare-sequence-length",
            f"sequence_length {sequence_length} is too long: a row would hold more than 65,535 documents",
        )

    # Rows: block by block.
    source_names = _source_names(table, names)
    writer = CorpusWriter(store, pieces.num_rows, sequence_length, vocabulary)
    tokens_of, loss_tokens = np.zeros(len(source_names), np.int64), 0
    blocks = _blocks(table, order, pieces, source_names, sequence_length, vocabulary)
    for block in tqdm(blocks, "writing rows", total=-(-pieces.num_rows // SHARD_ROWS), unit=" blocks"):
        tokens_of += np.bincount(block["source_ids"][block["segment_ids"] > 0], minlength=len(source_names))
        loss_tokens += int(block["loss_mask"].sum())
        writer.write(block)

    # Table of the documents, and the manifest.
    first = np.searchsorted(pieces.document, np.arange(len(order)))  # pieces come in the order of the documents
    documents = pyarrow.table(
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
    documents_of = Counter(table.source)
    more = {
        "settings": settings,
        "num_documents": len(order),
        "num_tokens": int(tokens_of.sum()),
        "num_loss_tokens": loss_tokens,
        "num_discarded_tokens": int(table.length.sum() - tokens_of.sum()),
        "skipped": counts["skipped"],
        "sources": {
            name: {"documents": documents_of[name], "tokens": int(count)}
            for name, count in zip(source_names, tokens_of, strict=True)
        },
    }
    if table.unspelled:
        more["unspelled"] = {f"U+{ord(character):04X}": count for character, count in table.unspelled.most_common()}
    if "metadata" in settings:
        values = [table.metadata[document] for document in order]
        documents = documents.append_column("metadata", pyarrow.array(values, pyarrow.string()))
        more["metadata"] = {
            "tokens": more["num_tokens"] - loss_tokens - len(order),  # all without loss, except one BOS per document
            "values": len(set(values) - {None}),
            "without": dict(counts["without"]),
        }
    return writer.finish(documents, source_names, more)


def _source_names(table: Documents, names: Sequence[str]) -> list[str]:
    """Names that occur, in the order of the sources; NAME/noise where a document has marked spans."""
    noisy = {f"{name}/noise" for name, noisy in zip(table.source, table.noisy, strict=True) if noisy}
    result = sorted(set(table.source) | noisy, key=lambda name: (names.index(name.partition("/")[0]), name))
    if len(result) > 255:
        raise UserError(
            "prepare-too-many-sources",
            f"the documents have {len(result)} source names, at most 255 are possible: set no source_field",
        )
    return result


def _blocks(table: Documents, order, pieces: Pieces, source_names, sequence_length, vocabulary) -> Iterator[dict]:
    """The columns, each [SHARD_ROWS, sequence_length] (the last block may have fewer rows)."""
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
