"""Conditional inference (MeCo, arXiv 2501.01956, section 3.3): plain documents with something behind their BOS.

Rows are packed anew, so that there is room for it. What is measured stays the same: the loss of each token of a
document is put back where the token stood.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from jaxtyping import Int, Integer

from slm_jax.data.corpus import Corpus
from slm_jax.data.hashing import mix
from slm_jax.data.metadata import Metadata
from slm_jax.data.packing import positions_from_segments
from slm_jax.errors import UserError

KERNEL_ROWS = 128  # every attention backend takes rows of a multiple of so many tokens


class Segments(NamedTuple):
    """The segments of packed rows, in their order; all arrays are [S]: place of the first token, and tokens."""

    row: Int[np.ndarray, "S"]
    start: Int[np.ndarray, "S"]
    length: Int[np.ndarray, "S"]


class Repacked(NamedTuple):
    """Rows with prefixes: `origin` says where each token stood, counted through all given rows; -1 for what is new."""

    tokens: Integer[np.ndarray, "R W"]
    segment_ids: Int[np.ndarray, "R W"]
    origin: Int[np.ndarray, "R W"]

    def restore(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Values [R, W], such as losses, at the places where their tokens stood; 0 elsewhere."""
        restored = np.zeros(shape, values.dtype)
        there = self.origin >= 0
        restored.reshape(-1)[self.origin[there]] = values[there]
        return restored


def conditioned(
    table: Corpus, num_rows: int, prefix: str | None, metadata: Metadata | None, shuffled: bool, max_length: int
) -> tuple[Repacked, dict[str, Any]]:
    """The first rows of a plain corpus, each document behind its prefix; a piece that continues one has none.

    Args:
        table: the corpus.
        num_rows: how many rows.
        prefix: of every document; or
        metadata: each document's own, or, `shuffled`, another's.
        max_length: tokens that the model reads.

    Returns:
        The new rows; and, to be recorded: text and ids of the first document's prefix, the number of different
        prefixes, and the tokens of the longest.

    Raises:
        UserError: the corpus carries metadata itself; see `document_prefixes`; the model reads too few tokens.
    """
    if table.metadata is not None:
        raise UserError(
            f"corpus {table.path} carries metadata itself, so HeldOut puts no other before it: prepare it without"
        )
    columns, vocabulary = table.read(np.arange(num_rows), ("tokens", "segment_ids")), table.vocabulary()
    segments = segments_of(columns["segment_ids"])
    begun = columns["tokens"][segments.row, segments.start] == vocabulary.bos_id
    if vocabulary.bos_id == vocabulary.eos_id:
        begun &= segments.length > 1  # the EOS of a document that the row before could not hold
    begins = np.flatnonzero(begun).tolist()
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
    needed = max(length + len(prefix) for length, prefix in zip(segments.length.tolist(), ids, strict=True))
    if needed > max_length:
        raise UserError(
            f"a document of corpus {table.path} has {needed} tokens in its row behind a prefix of up to {longest}, the "
            f"model reads {max_length}: prepare the corpus with sequence_length = {max_length - longest} or "
            f"less, or raise "
            "model.max_length"
        )
    first = next(iter(ids_of), "")
    about = {"text": first, "ids": ids_of.get(first, []), "different": len(ids_of), "longest": longest}
    return repack(columns["tokens"], segments, ids, row_width(max(needed, table.sequence_length), max_length)), about


def segments_of(segment_ids: Integer[np.ndarray, "B L"]) -> Segments:
    begins = (segment_ids > 0) & (positions_from_segments(segment_ids) == 0)
    row, start = np.nonzero(begins)
    number = np.cumsum(begins).reshape(begins.shape) - 1
    return Segments(row, start, np.bincount(number[segment_ids > 0], minlength=len(row)).astype(np.int64))


def row_width(needed: int, max_length: int) -> int:
    """Tokens of rows that hold `needed`: what every attention backend takes, unless the model reads no more."""
    rounded = -(-needed // KERNEL_ROWS) * KERNEL_ROWS
    return rounded if rounded <= max_length else needed


def repack(
    tokens: Integer[np.ndarray, "B L"], segments: Segments, prefixes: Sequence[Sequence[int]], width: int
) -> Repacked:
    """Puts each segment's prefix, ids, behind its first token, and the segments into rows of `width`, in their order.

    None is cut: one that does not fit into what is left of a row begins the next.
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

    Args:
        documents: of a corpus.
        metadata: which; its field and its most frequent values are not known here.
        shuffled: each document takes the metadata of another one, chosen by a hash, that shows another value.

    Raises:
        UserError: what cannot be told from a corpus alone; no URLs; nothing to shuffle.
    """
    if metadata.field or metadata.top:
        raise UserError(
            "HeldOut.metadata takes forms of the URL: a held-out corpus knows no other field (Metadata.field), nor "
            "which values are frequent where the model was trained (Metadata.top)"
        )
    own = [metadata.own_value(url or "", "") for url in documents["url"].to_pylist()]
    if not any(own):
        raise UserError(f"none of the {len(own):,} held-out documents has a URL: name a HeldOut.prefix in its place")
    shown = [metadata.shown(value) for value in own]
    return [metadata.prefix(value) for value in (_of_others(shown) if shuffled else shown)]


def _of_others(shown: Sequence[str | None]) -> list[str | None]:
    """For each document that shows a value, what a document of another value shows; frequent values come often."""
    showing = [i for i, value in enumerate(shown) if value is not None]
    order = np.array(sorted(showing, key=lambda i: shown[i] or ""), np.int64)
    ordered = np.array([shown[i] for i in order.tolist()], str)
    first, end = (np.searchsorted(ordered, ordered, side) for side in ("left", "right"))
    others = len(order) - (end - first)  # they stand before and after those of the same value
    if not others.all():
        raise UserError("HeldOut.shuffled: all documents show the same metadata, so none can have another's")
    choice = (mix(order.astype(np.uint64)) % others.astype(np.uint64)).astype(np.int64)
    donors = order[np.where(choice < first, choice, choice + (end - first))]
    result: list[str | None] = [None] * len(shown)
    for document, donor in zip(order.tolist(), donors.tolist(), strict=True):
        result[document] = shown[donor]
    return result


def refuse_escaped_newline(setting: str, prefix: str) -> None:
    """Refuses a prefix with a literal backslash and n, which a shell passes on where a line break was meant."""
    if "\\n" in prefix:
        raise UserError(
            "prefix-escaped-newline",
            f"{setting} {prefix!r} has a backslash and an n instead of a line break: in a shell write "
            "--prefix=$'URL: en.wikipedia.org\\n\\n'",
        )
