"""Which corpus and which row stand at position n of a phase: pure functions of (seed, position).

Nothing is remembered: any process can ask for any position at any time, so resuming needs the position alone, and the
order does not depend on hosts, devices or batch size.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import gin
import numpy as np
from jaxtyping import Int

from slm_jax.data.hashing import mix
from slm_jax.errors import UserError

SHARE_UNIT = 1000  # shares are read as fractions with denominators up to this
ORDERS = ("shuffled", "original")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Draw:
    """One corpus of a mixture.

    share: its weight among the rows of the phase. order: `shuffled` (anew in every epoch) or `original`.
    epochs: how often its rows may be used before the plan is refused.
    """

    corpus: str
    share: float = 1.0
    order: str = "shuffled"
    epochs: float = 1.0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"Draw.order {self.order!r} is unknown: known are {', '.join(ORDERS)}")
        if not self.share > 0 or not self.epochs > 0:
            raise UserError(f"Draw of {self.corpus}: share and epochs are above 0")


def pattern(shares: Sequence[float]) -> Int[np.ndarray, " P"]:
    """The periodic sequence of corpus indices that realises `shares` as evenly as integers allow.

    Tijdeman's chairman assignment: after any n positions, corpus i was chosen within less than 1 of n * share_i.
    """
    fractions = [Fraction(share).limit_denominator(SHARE_UNIT) for share in np.asarray(shares) / sum(shares)]
    if not all(fractions):
        raise UserError(f"shares {list(shares)}: the smallest is under 1 in {SHARE_UNIT} of all: raise it")
    fractions = [fraction / sum(fractions) for fraction in fractions]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period > 1_000_000:
        raise UserError(f"shares {list(shares)} have no short common pattern: round them to three digits")
    weights = np.array([int(fraction * period) for fraction in fractions], np.int64)  # sum to period
    slack = Fraction(1, max(1, 2 * len(weights) - 2))
    counts = np.zeros(len(weights), np.int64)
    chosen = np.empty(period, np.int64)
    for n in range(period):
        due = weights * (n + 1) - counts * period  # (share * n - count) in units of 1 / period
        eligible = due * slack.denominator >= period * slack.numerator
        deadline = np.where(eligible, (period - due) / np.maximum(weights, 1), np.inf)
        chosen[n] = np.argmin(deadline)
        counts[chosen[n]] += 1
    return chosen


class Mixture:
    """The rows of one phase. `sizes`: rows of each corpus; `starts`: rows that earlier phases drew from it."""

    def __init__(self, draws: Sequence[Draw], sizes: Sequence[int], starts: Sequence[int], seed: int):
        self.draws, self.sizes, self.starts, self.seed = tuple(draws), tuple(sizes), tuple(starts), seed
        self._pattern = pattern([draw.share for draw in draws])
        one_hot = self._pattern[:, None] == np.arange(len(self.draws))
        self._before = np.concatenate([np.zeros((1, len(self.draws)), np.int64), np.cumsum(one_hot, axis=0)])

    def counts(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
        """How many rows of each corpus stand before each position."""
        period = len(self._pattern)
        return (positions // period)[:, None] * self._before[-1] + self._before[positions % period]

    def rows(self, positions: Int[np.ndarray, " N"]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """(corpus index, row) at each position of the phase."""
        positions = np.asarray(positions, np.int64)
        which = self._pattern[positions % len(self._pattern)]
        nth = self.counts(positions)[np.arange(len(positions)), which]
        rows = np.empty(len(positions), np.int64)
        for i, draw in enumerate(self.draws):
            mine = which == i
            epoch, index = np.divmod(nth[mine] + self.starts[i], self.sizes[i])
            rows[mine] = permuted(index, epoch, self.sizes[i], self.seed) if draw.order == "shuffled" else index
        return which, rows


def permuted(index: Int[np.ndarray, " N"], epoch: Int[np.ndarray, " N"], size: int, seed: int) -> Int[np.ndarray, " N"]:
    """A pseudo-random permutation of range(size) for each (seed, epoch), evaluated at `index` in O(1) memory.

    A four-round Feistel network on the next even number of bits, walked until it lands inside the range; defined here
    to the bit, so that no library version can change the order of a running experiment.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix(epoch.astype(np.uint64) ^ mix(np.full(len(epoch), seed, np.uint64)))

    def encrypt(value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = value >> half, value & mask
        for number in range(4):
            left, right = right, left ^ (mix(right ^ mix(keys + np.uint64(number))) & mask)
        return left << half | right

    value = encrypt(index.astype(np.uint64), keys)
    outside = value >= size
    while outside.any():
        value[outside] = encrypt(value[outside], keys[outside])
        outside = value >= size
    return value.astype(np.int64)
