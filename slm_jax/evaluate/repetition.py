"""How much a text repeats itself: distinct n-grams and the longest loop, of ids or of words. Pure functions."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Loop(NamedTuple):
    """A stretch that repeats one unit: tokens in all, and tokens of the unit; (0, 0) where nothing repeats."""

    length: int
    period: int


def distinct_ngrams(tokens: Sequence[Hashable], n: int) -> float | None:
    """Different n-grams per n-gram (arXiv 1510.03055): 1 where none occurs twice; None where there is none."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def longest_loop(tokens: Sequence[Hashable]) -> Loop:
    """The longest stretch in which every token equals the one `period` places before it, after a first whole unit, and
    which holds the unit twice at least.

    `a b c b c b` has a loop of 5 tokens with the period 2. Of equally long ones that with the shortest period counts.
    """
    best = Loop(0, 0)
    for period in range(1, len(tokens) // 2 + 1):
        run = longest = 0
        for before, now in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if before == now else 0
            longest = max(longest, run)
        if longest >= period and longest + period > best.length:
            best = Loop(longest + period, period)
    return best
