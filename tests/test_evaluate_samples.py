"""Repetition, worked by hand."""

import pytest

from slm_jax.evaluate.samples import Loop, distinct_ngrams, longest_loop


@pytest.mark.parametrize(
    "text, n, expected",
    [
        ("a b c d", 1, 1.0),
        ("a b a b", 1, 0.5),
        ("a b a b", 2, 2 / 3),  # ab, ba, ab
        ("a b a b", 4, 1.0),
        ("a a a a", 2, 1 / 3),
        ("a b", 3, None),
        ("", 1, None),
    ],
)
def test_distinct_ngrams(text, n, expected):
    assert distinct_ngrams(text.split(), n) == expected


@pytest.mark.parametrize(
    "text, length, period",
    [
        ("a b c d", 0, 0),
        ("", 0, 0),
        ("a b a", 0, 0),  # the unit is not there twice
        ("a b a b", 4, 2),
        ("a b c b c b", 5, 2),
        ("x a a y", 2, 1),
        ("a a b a a b", 6, 3),  # longer than the two a's
        ("a a a a", 4, 1),  # also a loop of aa
        ("a b a b x c c c c c", 5, 1),
    ],
)
def test_longest_loop(text, length, period):
    assert longest_loop(text.split()) == longest_loop([ord(letter) for letter in text.split()]) == Loop(length, period)
