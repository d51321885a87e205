"""Token lists -> rows of one length, computed from document lengths alone: which piece of which document goes where."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer


class Pieces(NamedTuple):
    """Pieces of documents in rows, in row order; all arrays are [P].

    Piece p is tokens [start[p], start[p] + length[p]) of document `document[p]`, at `offset[p]` of row `row[p]`. It is
    segment `segment[p]` of its row, counted from 1.
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

    A document that is cut continues in the next row as a new segment, which does not see the tokens before the cut.

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
    """MeCo's packing (arXiv 2501.01956, A.3): every row starts with the start of a document.

    Documents are appended until the row is full, the overhang is discarded, and the next row starts with the next
    document. The last row is padded. Arguments as in `pack_split`.
    """
    lengths = _checked(lengths, sequence_length)
    ends = np.cumsum(lengths)
    return _row_by_row(
        lengths, sequence_length, np.searchsorted(ends, ends - lengths + sequence_length, side="left") + 1
    )


def pack_whole(lengths: Integer[np.ndarray, "D"], sequence_length: int) -> Pieces:
    """No document is cut: one that does not fit into the rest of a row starts the next, and the row is padded.

    A document that is longer than a row loses its overhang. Arguments as in `pack_split`.
    """
    lengths = np.minimum(_checked(lengths, sequence_length), sequence_length)
    ends = np.cumsum(lengths)
    return _row_by_row(lengths, sequence_length, np.searchsorted(ends, ends - lengths + sequence_length, side="right"))


PACKINGS = {"split": pack_split, "complete": pack_complete, "whole": pack_whole}


def pack_from(place: int, packing: str, lengths: Integer[np.ndarray, "D"], sequence_length: int) -> Pieces:
    """Packs documents that follow others, so that a corpus can be packed in parts.

    Args:
        place: where they begin, in tokens of the rows one after the other: the end of the last piece before.
        packing: one of `PACKINGS`.
        lengths: as there.
        sequence_length: as there.

    Returns:
        Their pieces; rows count from the beginning of the corpus. Segments of the row in which they begin are counted
        from there, not from the beginning of that row.
    """
    row, filled = divmod(place, sequence_length)
    # What fills the row already packs like a document of its length.
    before = [filled] if filled else []
    pieces = PACKINGS[packing](np.concatenate([before, lengths]).astype(np.int64), sequence_length)
    own = slice(len(before), None)
    document, start, length, rows, offset, segment = (column[own] for column in pieces[:6])
    return Pieces(document - len(before), start, length, rows + row, offset, segment, row + pieces.num_rows)


def _row_by_row(lengths: np.ndarray, sequence_length: int, following: np.ndarray) -> Pieces:
    """Rows of documents, where a row that starts with document d is followed by one with document `following[d]`.

    Each row depends on the one before, so this walks the chain; everything else is vectorised.
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
