"""Which corpus and which row stand at position n of a phase: pure functions of (seed, position).

Nothing is remembered: any process can ask for any position at any time, so resuming needs the position alone, and the
order does not depend on hosts, devices or batch size.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import gin
import numpy as np
from jaxtyping import Float, Int

from slm_jax.data.hashing import mix
from slm_jax.errors import UserError

SHARE_UNIT = 1000  # shares are read as fractions with denominators up to this
ORDERS = ("shuffled", "original")
REPLAYS = ("in_order", "shuffled")
RESHUFFLED = 1 << 32  # epochs of a shuffled replay are told from those of the first reading by this


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MixtureComponent:
    """One corpus of a mixture.

    Attributes:
      corpus: path of the corpus.
      weight: its fraction of the phase's rows: a number, a Schedule over the phase's steps, or None for the remainder
        of 1.
      order: `shuffled` (reshuffled every epoch) or `original`.
      epochs: how often its rows may be used before the plan is refused.
      replay: read again the rows that earlier phases read: `in_order`, as they were first read (arXiv 2403.08763), or
        `shuffled`. If no earlier phase of the run read this corpus, all its rows, in `order`.
    """

    corpus: str
    weight: Any = 1.0
    order: str = "shuffled"
    epochs: float = 1.0
    replay: str | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"MixtureComponent.order {self.order!r} is unknown: known are {', '.join(ORDERS)}")
        if self.replay not in (None, *REPLAYS):
            raise UserError(
                f"MixtureComponent.replay {self.replay!r} is unknown: known are {', '.join(REPLAYS)}, or None"
            )
        if (isinstance(self.weight, (int, float)) and not self.weight > 0) or not self.epochs > 0:
            raise UserError(f"MixtureComponent of {self.corpus}: weight and epochs are above 0")


class Supply(NamedTuple):
    """The rows that a MixtureComponent reads: of a corpus of `size`, from the one after the first `taken` on. Of a
    replay, `taken`
    counts replayed rows, and `seen` those that were read before and stand to be replayed."""

    size: int
    taken: int = 0
    seen: int | None = None

    @property
    def period(self) -> int:
        """Rows of an epoch."""
        return self.seen or self.size


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


class Fixed:
    """Which corpus stands at each position of a phase with constant shares."""

    def __init__(self, shares: Sequence[float]):
        self._pattern = pattern(shares)
        one_hot = self._pattern[:, None] == np.arange(len(shares))
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(one_hot, axis=0)])

    def counts(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
        """How many rows of each corpus stand before each position."""
        period = len(self._pattern)
        return (positions // period)[:, None] * self._before[-1] + self._before[positions % period]

    def which(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        return self._pattern[positions % len(self._pattern)]


class Scheduled:
    """Which corpus stands at each position of a phase whose shares are given step by step.

    Up to the end of any step, each corpus was chosen within 1 of the sum of its shares; within a step its rows are
    spread evenly.
    """

    def __init__(self, shares: Float[np.ndarray, "N D"], batch_size: int):
        self._rows = batch_size
        due = np.cumsum(shares / shares.sum(axis=1, keepdims=True) * batch_size, axis=0)
        self._table = np.zeros((len(due) + 1, due.shape[1]), np.int64)  # rows of each corpus before each step
        for step, before in enumerate(self._table[:-1]):
            self._table[step + 1] = before + _apportioned(due[step] - before, batch_size)

    def counts(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
        """How many rows of each corpus stand before each position."""
        steps, offsets = np.divmod(positions, self._rows)
        result = self._table[steps]
        for step in np.unique(steps[offsets > 0]):
            mine = steps == step
            one_hot = self._of_step(int(step))[:, None] == np.arange(self._table.shape[1])
            before = np.concatenate([np.zeros((1, one_hot.shape[1]), np.int64), np.cumsum(one_hot, axis=0)])
            result[mine] += before[offsets[mine]]
        return result

    def which(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        steps, offsets = np.divmod(positions, self._rows)
        result = np.empty(len(positions), np.int64)
        for step in np.unique(steps):
            result[steps == step] = self._of_step(int(step))[offsets[steps == step]]
        return result

    def _of_step(self, step: int) -> Int[np.ndarray, " B"]:
        counts = self._table[step + 1] - self._table[step]
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
        return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


def _apportioned(wanted: Float[np.ndarray, " D"], total: int) -> Int[np.ndarray, " D"]:
    """Whole numbers from 0 on that sum to `total`, as near to `wanted` as they can be."""
    now = np.maximum(np.floor(wanted + 1e-9), 0).astype(np.int64)
    missing = total - int(now.sum())
    lacking_most = np.argsort(now - wanted, kind="stable")
    if missing >= 0:
        now[lacking_most[:missing]] += 1
    else:
        too_much = lacking_most[::-1]
        now[too_much[now[too_much] > 0][:-missing]] -= 1
    return now


class Mixture:
    """The rows of one phase.

    shares: of the draws, [D], or [steps, D] where they change from step to step, of `batch_size` rows each.
    """

    def __init__(
        self,
        draws: Sequence[MixtureComponent],
        supplies: Sequence[Supply],
        seed: int,
        shares: Float[np.ndarray, " D"] | Float[np.ndarray, "N D"],
        batch_size: int = 1,
    ):
        self.draws, self.supplies, self.seed = tuple(draws), tuple(supplies), seed
        self._places = Fixed(shares.tolist()) if shares.ndim == 1 else Scheduled(shares, batch_size)

    def counts(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
        """How many rows of each corpus stand before each position."""
        return self._places.counts(positions)

    def rows(self, positions: Int[np.ndarray, " N"]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """(which draw, row of its corpus) at each position of the phase."""
        positions = np.asarray(positions, np.int64)
        which = self._places.which(positions)
        nth = self.counts(positions)[np.arange(len(positions)), which]
        rows = np.empty(len(positions), np.int64)
        for i, (draw, supply) in enumerate(zip(self.draws, self.supplies, strict=True)):
            mine = which == i
            rows[mine] = self._nth_rows(draw, supply, nth[mine] + supply.taken)
        return which, rows

    def _nth_rows(self, draw: MixtureComponent, supply: Supply, nth: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        epoch, index = np.divmod(nth, supply.period)
        if draw.replay:
            if draw.replay == "shuffled":
                index = permuted(index, epoch + RESHUFFLED, supply.period, self.seed)
            epoch = np.zeros_like(epoch)  # what was read before was read in its first order
        return permuted(index, epoch, supply.size, self.seed) if draw.order == "shuffled" else index


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
