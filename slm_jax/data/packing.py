"""Token lists -> rows of one length, computed on document lengths alone: which piece of which document lies where."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer


class Pieces(NamedTuple):
    """Pieces of documents in rows, in row order; all arrays are [P].

    Piece p is `length[p]` tokens of document `document[p]` from its token `start[p]` on, and lies in row `row[p]` from
    place `offset[p]` on. It is segment `segment[p]` of its row, counted from 1.
    """

    document: Int[np.ndarray, "P"]
    start: Int[np.ndarray, "P"]
    length: Int[np.ndarray, "P"]
    row: Int[np.ndarray, "P"]
    offset: Int[np.ndarray, "P"]
    segment: Int[np.ndarray, "P"]
    num_rows: int


def pack_split(lengths: Integer[np.ndarray, "D"], sequence_length: int) -> Pieces:
    """Concatenates the documents and cuts every `sequence_length` tokens: no token is lost, only the last row is
    padded.

    A document that is cut continues in the next row as a new segment, without what came before.

    Args:
        lengths: tokens of each document, at least 1.
        sequence_length: tokens of a row.
    """
    lengths = _checked(lengths, sequence_length)
    begins = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    cuts = np.union1d(begins, np.arange(0, total, sequence_length))  # a piece begins where a document or a row does
    document = np.searchsorted(begins, cuts, side="right") - 1
    return _pieces(
        document, cuts - begins[document], np.diff(cuts, append=total), cuts // sequence_length, cuts % sequence_length
    )


def pack_complete(lengths: Integer[np.ndarray, "D"], sequence_length: int) -> Pieces:
    """MeCo's packing (arXiv 2501.01956, A.3): every row begins with the begin of a document.

    Documents are appended until the row is full, what hangs over is discarded, the next row begins with the next
    document. The last row is padded. Arguments as in `pack_split`.
    """
    lengths = _checked(lengths, sequence_length)
    ends = np.cumsum(lengths)
    return _row_by_row(
        lengths, sequence_length, np.searchsorted(ends, ends - lengths + sequence_length, side="left") + 1
    )


def pack_whole(lengths: Integer[np.ndarray, "D"], sequence_length: int) -> Pieces:
    """No document is cut: one that does not fit in what is left of a row begins the next, and the row is padded.

    Only of a document that is longer than a row, what hangs over is discarded. Arguments as in `pack_split`.
    """
    lengths = np.minimum(_checked(lengths, sequence_length), sequence_length)
    ends = np.cumsum(lengths)
    return _row_by_row(lengths, sequence_length, np.searchsorted(ends, ends - lengths + sequence_length, side="right"))


PACKINGS = {"split": pack_split, "complete": pack_complete, "whole": pack_whole}


def positions_from_segments(segment_ids: Integer[np.ndarray, "B L"]) -> Int[np.ndarray, "B L"]:
    """int32 positions that restart at 0 with every segment, as the rotary embedding reads them; 0 in the padding."""
    place = np.arange(segment_ids.shape[1], dtype=np.int32)
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    latest = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return np.where(segment_ids > 0, place - latest, 0).astype(np.int32)


def _row_by_row(lengths: np.ndarray, sequence_length: int, following: np.ndarray) -> Pieces:
    """If a row begins with document d, the next begins with document `following[d]`.

    Every row follows from the one before, so the chain is walked; all that can be computed at once is.
    """
    firsts, first, chain = [], 0, following.tolist()
    while first < len(lengths):
        firsts.append(first)
        first = chain[first]
    firsts = np.array(firsts, np.int64)
    begins = np.cumsum(lengths) - lengths
    row = np.searchsorted(firsts, np.arange(len(lengths)), side="right") - 1
    offset = begins - begins[firsts[row]] if len(lengths) else begins
    kept = np.minimum(lengths, sequence_length - offset)
    return _pieces(np.arange(len(lengths)), np.zeros_like(lengths), kept, row, offset)


def _checked(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}, must be positive")
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and lengths.min() < 1:
        raise ValueError(f"document {int(lengths.argmin())} has {int(lengths.min())} tokens, must be positive")
    return lengths


def _pieces(document, start, length, row, offset) -> Pieces:
    number = np.arange(len(row))
    first_of_row = np.searchsorted(row, row, side="left")  # rows ascend
    return Pieces(document, start, length, row, offset, number - first_of_row + 1, int(row[-1]) + 1 if len(row) else 0)
