"""Packing is checked against what it promises, on any lengths, not against itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data.packing import (
    PACKINGS,
    Pieces,
    pack_complete,
    pack_split,
    pack_whole,
)
from slm_jax.data.segments import positions_from_segments

LENGTHS = st.lists(st.integers(1, 40), min_size=0, max_size=60).map(lambda lengths: np.array(lengths, np.int64))
SEQUENCE_LENGTH = st.integers(1, 24)


def segment_rows(pieces: Pieces, sequence_length: int) -> np.ndarray:
    """Lays the pieces out token by token, so that an overlap would show."""
    rows = np.zeros((pieces.num_rows, sequence_length), np.uint16)
    for row, offset, length, segment in zip(pieces.row, pieces.offset, pieces.length, pieces.segment, strict=True):
        place = rows[row, offset : offset + length]
        assert len(place) == length and not place.any()
        place[:] = segment
    return rows


@pytest.mark.parametrize("packing", PACKINGS)
@given(LENGTHS, SEQUENCE_LENGTH)
def test_rows_are_full_and_segments_contiguous(packing, lengths, sequence_length):
    rows = segment_rows(PACKINGS[packing](lengths, sequence_length), sequence_length)
    assert packing == "whole" or (rows[:-1] > 0).all()  # only the last row is padded
    for row in rows:
        used = row[row > 0].astype(int)
        assert (row[: len(used)] > 0).all()
        assert used[0] == 1 and set(np.diff(used)) <= {0, 1}


@given(LENGTHS, SEQUENCE_LENGTH)
def test_split_holds_every_token_once_and_in_order(lengths, sequence_length):
    pieces = pack_split(lengths, sequence_length)
    tokens = [(d, s + i) for d, s, n in zip(*pieces[:3], strict=True) for i in range(n)]
    assert tokens == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    assert pieces.num_rows == -(-lengths.sum() // sequence_length)


@given(LENGTHS, SEQUENCE_LENGTH)
def test_complete_begins_every_row_with_a_document_and_uses_each_once(lengths, sequence_length):
    pieces = pack_complete(lengths, sequence_length)
    assert (pieces.start == 0).all()
    assert pieces.document.tolist() == list(range(len(lengths)))
    ends = pieces.offset + pieces.length
    cut = pieces.length < lengths
    assert (ends[cut] == sequence_length).all()  # tokens are discarded only at the end of a full row


@given(LENGTHS, SEQUENCE_LENGTH)
def test_whole_cuts_only_what_no_row_can_hold_and_begins_a_row_only_where_it_must(lengths, sequence_length):
    pieces = pack_whole(lengths, sequence_length)
    assert pieces.document.tolist() == list(range(len(lengths))) and (pieces.start == 0).all()
    np.testing.assert_array_equal(pieces.length, np.minimum(lengths, sequence_length))
    used = np.bincount(pieces.row, pieces.length, minlength=pieces.num_rows)
    first = pieces.offset == 0
    assert first.sum() == pieces.num_rows
    assert (used[pieces.row[first][1:] - 1] + pieces.length[first][1:] > sequence_length).all()


def test_whole_on_paper():
    pieces = pack_whole(np.array([3, 4, 1, 9, 1]), 5)
    assert pieces.row.tolist() == [0, 1, 1, 2, 3]
    assert pieces.offset.tolist() == [0, 0, 4, 0, 0]
    assert pieces.length.tolist() == [3, 4, 1, 5, 1]


def test_complete_on_paper():
    pieces = pack_complete(np.array([3, 4, 2, 9, 1]), 5)
    assert pieces.row.tolist() == [0, 0, 1, 1, 2]
    assert pieces.offset.tolist() == [0, 3, 0, 2, 0]
    assert pieces.length.tolist() == [3, 2, 2, 3, 1]


@given(LENGTHS, SEQUENCE_LENGTH)
def test_positions_restart_with_every_segment(lengths, sequence_length):
    rows = segment_rows(pack_split(lengths, sequence_length), sequence_length)
    positions = positions_from_segments(rows)
    for row, places in zip(rows, positions, strict=True):
        for segment in set(row.tolist()):
            found = places[row == segment]
            assert (found == (np.arange(len(found)) if segment else 0)).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_million_documents(packing):
    """Where the work grew with the square of their number, this would not end."""
    lengths = np.random.default_rng(0).integers(2, 2000, 1_000_000)
    pieces = PACKINGS[packing](lengths, 1024)
    assert len(np.unique(pieces.document)) > 500_000 and pieces.length.sum() <= lengths.sum()


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_document_without_tokens_is_refused(packing):
    with pytest.raises(ValueError, match="document 1 has 0 tokens"):
        PACKINGS[packing](np.array([3, 0]), 4)
