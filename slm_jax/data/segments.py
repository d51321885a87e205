"""Finds the segments of packed rows: documents, or pieces of documents that were cut."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer


class Segments(NamedTuple):
    """The segments of packed rows, in order: row and start of the first token, and length in tokens."""

    row: Int[np.ndarray, "S"]
    start: Int[np.ndarray, "S"]
    length: Int[np.ndarray, "S"]

    def each(self) -> Iterator[tuple[int, int, int]]:
        """(row, start, length) of one segment after the other."""
        return zip(*(column.tolist() for column in self), strict=True)


def segments_of(segment_ids: Integer[np.ndarray, "B L"]) -> Segments:
    """The segments of rows; padding (id 0) is not a segment."""
    begins = (segment_ids > 0) & (positions_from_segments(segment_ids) == 0)
    row, start = np.nonzero(begins)
    number = np.cumsum(begins).reshape(begins.shape) - 1  # [B, L]: which segment each token belongs to
    return Segments(row, start, np.bincount(number[segment_ids > 0], minlength=len(row)).astype(np.int64))


def positions_from_segments(segment_ids: Integer[np.ndarray, "B L"]) -> Int[np.ndarray, "B L"]:
    """int32 positions that restart at 0 with every segment, as the rotary embedding reads them; 0 in the padding."""
    place = np.arange(segment_ids.shape[1], dtype=np.int32)
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    latest = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return np.where(segment_ids > 0, place - latest, 0).astype(np.int32)
