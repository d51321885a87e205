"""Conditional inference (MeCo, arXiv 2501.01956, section 3.3): plain documents with a prefix after their BOS.

Rows are repacked to make room for the prefix. The measure stays the same: the loss of each token of a document is put
back where the token was.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from jaxtyping import Int, Integer

from slm_jax.data.corpus import Corpus
from slm_jax.data.hashing import mix
from slm_jax.data.metadata import Metadata
from slm_jax.data.segments import Segments, segments_of
from slm_jax.errors import UserError

KERNEL_ROWS = 128  # every attention backend takes rows of a multiple of this many tokens


class Repacked(NamedTuple):
    """Rows with prefixes. `origin` is each token's index in the flattened original rows; -1 for a prefix or padding."""

    tokens: Integer[np.ndarray, "R W"]
    segment_ids: Int[np.ndarray, "R W"]
    origin: Int[np.ndarray, "R W"]

    def restore(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Values [R, W], such as losses, at the original places of their tokens; 0 elsewhere."""
        restored = np.zeros(shape, values.dtype)
        there = self.origin >= 0
        restored.reshape(-1)[self.origin[there]] = values[there]
        return restored


def conditioned(
    table: Corpus, num_rows: int, prefix: str | None, metadata: Metadata | None, shuffled: bool, max_length: int
) -> tuple[Repacked, dict[str, Any]]:
    """The first rows of a plain corpus, with a prefix before each document; a piece that continues one gets none.

    The prefix is the same for all, or each document's own metadata, or, with `shuffled`, another document's.

    Returns:
        The new rows, which the model can read; and a record of the prefixes: text and ids of the first document's, the
        number of different ones, and the length of the longest in tokens.

    Raises:
        UserError: the corpus contains metadata itself; the model reads too few tokens; see `document_prefixes`.
    """
    if table.metadata is not None:
        raise UserError(
            "prefix-corpus-has-metadata",
            f"corpus {table.path} contains metadata, so HeldOut cannot add a prefix: prepare it without metadata",
        )

    # ---- Which segments begin a document
    columns, vocabulary = table.read(np.arange(num_rows), ("tokens", "segment_ids")), table.vocabulary()
    segments = segments_of(columns["segment_ids"])
    begun = columns["tokens"][segments.row, segments.start] == vocabulary.bos_id
    if vocabulary.bos_id == vocabulary.eos_id:
        begun &= segments.length > 1  # the EOS of a document that the row before could not hold
    begins = np.flatnonzero(begun).tolist()

    # ---- The prefix of each, as ids
    if metadata is None:
        texts = dict.fromkeys(begins, prefix or "")
    else:
        documents = table.documents()
        places = zip(documents["row"].to_pylist(), documents["start"].to_pylist(), strict=True)
        text_at = dict(zip(places, document_prefixes(documents, metadata, shuffled), strict=True))
        texts = {s: text_at[int(segments.row[s]), int(segments.start[s])] for s in begins}
    ids_of = {text: vocabulary.encode(text) for text in dict.fromkeys(texts.values())}
    ids = [ids_of[texts[s]] if s in texts else [] for s in range(len(segments.row))]
    longest = max(map(len, ids_of.values()), default=0)

    # ---- Rows wide enough for the longest document with its prefix
    needed = max(length + len(prefix) for length, prefix in zip(segments.length.tolist(), ids, strict=True))
    if needed > max_length:
        raise UserError(
            "prefix-too-long",
            f"a document of corpus {table.path} has {needed} tokens with its prefix of up to {longest}, the model "
            f"reads {max_length}: prepare the corpus with sequence_length = {max_length - longest} or less, or raise "
            "model.max_length",
        )
    first = next(iter(ids_of), "")
    about = {"text": first, "ids": ids_of.get(first, []), "different": len(ids_of), "longest": longest}
    return repack(columns["tokens"], segments, ids, row_width(max(needed, table.sequence_length), max_length)), about


def row_width(needed: int, max_length: int) -> int:
    """Width of rows that hold `needed` tokens: a multiple of KERNEL_ROWS, unless the model reads fewer tokens."""
    rounded = -(-needed // KERNEL_ROWS) * KERNEL_ROWS
    return rounded if rounded <= max_length else needed


def repack(
    tokens: Integer[np.ndarray, "B L"], segments: Segments, prefixes: Sequence[Sequence[int]], width: int
) -> Repacked:
    """Inserts each segment's prefix after its first token, and packs the segments into rows of `width`, in order.

    None is cut: a segment that does not fit into the remainder of a row begins the next.
    """
    added = np.array([len(prefix) for prefix in prefixes], np.int64)
    lengths = segments.length + added
    rows, offsets, numbers, row, filled, number = [], [], [], 0, 0, 0
    for length in lengths.tolist():
        if filled + length > width:
            row, filled, number = row + 1, 0, 0
        number += 1
        rows.append(row)
        offsets.append(filled)
        numbers.append(number)
        filled += length
    shape = (row + 1, width)
    result = Repacked(np.zeros(shape, tokens.dtype), np.zeros(shape, np.int64), np.full(shape, -1, np.int64))
    origins = segments.row * tokens.shape[1] + segments.start
    for i, prefix in enumerate(prefixes):
        place = (rows[i], slice(offsets[i], offsets[i] + int(lengths[i])))
        result.segment_ids[place] = numbers[i]
        origin = np.arange(origins[i], origins[i] + segments.length[i])
        result.origin[place] = np.concatenate([origin[:1], np.full(len(prefix), -1), origin[1:]])
        result.tokens[rows[i], offsets[i] + 1 : offsets[i] + 1 + len(prefix)] = prefix
    there = result.origin >= 0
    result.tokens[there] = tokens.reshape(-1)[result.origin[there]]
    return result


def document_prefixes(documents: pyarrow.Table, metadata: Metadata, shuffled: bool = False) -> list[str]:
    """The prefix of each document of `Corpus.documents`, from its own URL; '' for none.

    With `shuffled` it is that of a document with a different value, chosen by a hash.

    Raises:
        UserError: settings that need more than the URLs; no URLs; nothing to shuffle.
    """
    if metadata.field or metadata.top:
        raise UserError(
            "prefix-needs-url-metadata",
            "HeldOut.metadata cannot set Metadata.field or Metadata.top: a held-out corpus has only URLs, and does not "
            "say which values were frequent in training",
        )
    own = [metadata.own_value(url or "", "") for url in documents["url"].to_pylist()]
    if not any(own):
        raise UserError(
            "prefix-no-urls", f"none of the {len(own):,} held-out documents has a URL: set HeldOut.prefix instead"
        )
    shown = [metadata.shown(value) for value in own]
    if not shuffled:
        return [metadata.prefix(value) for value in shown]

    # ---- Each value becomes that of a random document with another value, so that frequent values stay frequent.
    showing = [i for i, value in enumerate(shown) if value is not None]
    order = np.array(sorted(showing, key=lambda i: shown[i] or ""), np.int64)  # documents by their value
    ordered = np.array([shown[i] for i in order.tolist()], str)
    first, end = (np.searchsorted(ordered, ordered, side) for side in ("left", "right"))
    others = len(order) - (end - first)  # documents before and after those with the same value
    if not others.all():
        raise UserError(
            "prefix-nothing-to-shuffle", "HeldOut.shuffled: all documents have the same metadata: set it to False"
        )
    choice = (mix(order.astype(np.uint64)) % others.astype(np.uint64)).astype(np.int64)
    donors = order[np.where(choice < first, choice, choice + (end - first))]
    given = {document: shown[donor] for document, donor in zip(order.tolist(), donors.tolist(), strict=True)}
    return [metadata.prefix(given.get(document)) for document in range(len(shown))]


def refuse_escaped_newline(setting: str, prefix: str) -> None:
    """Refuses a prefix with a literal backslash and n, which a shell passes on where a line break was meant."""
    if "\\n" in prefix:
        raise UserError(
            "prefix-escaped-newline",
            f"{setting} {prefix!r} has a backslash and an n instead of a line break: in a shell write "
            "--prefix=$'URL: en.wikipedia.org\\n\\n'",
        )
