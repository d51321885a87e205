"""Which corpus and which row is at position n of a phase: pure functions of (seed, position).

There is no state: any process can ask for any position at any time. Resuming therefore needs the position alone, and
the order does not depend on hosts, devices or batch size.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from slm_jax.configurable import OneOf, Positive, configurable
from slm_jax.data.hashing import mix
from slm_jax.errors import UserError

SHARE_UNIT = 1000  # shares are rounded to fractions with denominators up to this
ORDERS = ("shuffled", "original")
REPLAYS = ("in_order", "shuffled")
RESHUFFLED = 1 << 32  # added to the epoch of a shuffled replay, so that its order differs from the first reading's


@runtime_checkable
class ScheduleLike(Protocol):
    """A Schedule, which this package cannot import."""

    def lengths(self, total: int, owner: str = ...) -> list[int]: ...


@configurable
@dataclasses.dataclass(frozen=True)
class MixtureComponent:
    """One corpus of a mixture.

    Attributes:
      corpus: path of the corpus.
      weight: its fraction of the phase's rows, divided by the sum of all: a number, a Schedule over the phase's steps,
        or None for the remainder of 1.
      order: `shuffled` (reshuffled every epoch) or `original`.
      epochs: how often its rows may be used before the plan is refused.
      replay: read again the rows that earlier phases read: `in_order`, as they were first read (arXiv 2403.08763), or
        `shuffled`. If no earlier phase of the run read this corpus, all its rows, in `order`.
    """

    corpus: str
    weight: Positive | ScheduleLike | None = 1.0
    order: Annotated[str, OneOf(ORDERS)] = "shuffled"
    epochs: Positive = 1.0
    replay: Annotated[str, OneOf(REPLAYS)] | None = None


class Supply(NamedTuple):
    """The rows that a component reads.

    size: rows of its corpus. taken: how many of its rows (of a replay: replayed rows) earlier phases read; this phase
    continues after them. seen: of a replay, how many rows there are to be replayed.
    """

    size: int
    taken: int = 0
    seen: int | None = None

    @property
    def period(self) -> int:
        """Rows of one epoch."""
        return self.seen or self.size


def pattern(shares: Sequence[float]) -> Int[np.ndarray, " P"]:
    """The periodic sequence of component indices that realises `shares` as evenly as integers allow.

    Tijdeman's chairman assignment: after any n positions, the count of component i is within 1 of n * share_i.
    """
    fractions = [Fraction(share).limit_denominator(SHARE_UNIT) for share in np.asarray(shares) / sum(shares)]
    if not all(fractions):
        raise UserError(
            "mixture-share-too-small",
            f"shares {list(shares)}: the smallest is under 1 in {SHARE_UNIT} of all: raise it",
        )
    fractions = [fraction / sum(fractions) for fraction in fractions]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period > 1_000_000:
        raise UserError(
            "mixture-no-pattern", f"shares {list(shares)} have no short common pattern: round them to three digits"
        )
    weights = np.array([int(fraction * period) for fraction in fractions], np.int64)  # sum to period
    slack = Fraction(1, max(1, 2 * len(weights) - 2))
    counts = np.zeros(len(weights), np.int64)
    chosen = np.empty(period, np.int64)
    # Of the components whose count is due, choose the one whose deadline comes first.
    for n in range(period):
        due = weights * (n + 1) - counts * period  # (share * n - count) in units of 1 / period
        eligible = due * slack.denominator >= period * slack.numerator
        deadline = np.where(eligible, (period - due) / np.maximum(weights, 1), np.inf)
        chosen[n] = np.argmin(deadline)
        counts[chosen[n]] += 1
    return chosen


class Fixed:
    """Which component is at each position of a phase with constant shares."""

    def __init__(self, shares: Sequence[float]):
        self._pattern = pattern(shares)
        one_hot = self._pattern[:, None] == np.arange(len(shares))
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(one_hot, axis=0)])

    def counts(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
        """How many rows of each component come before each position."""
        period = len(self._pattern)
        return (positions // period)[:, None] * self._before[-1] + self._before[positions % period]

    def which(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        return self._pattern[positions % len(self._pattern)]


class Scheduled:
    """Which component is at each position of a phase whose shares, [steps, components], change from step to step.

    At the end of any step, the count of each component is within 1 of the sum of its shares. Within a step its rows are
    spread evenly.
    """

    def __init__(self, shares: Float[np.ndarray, "N D"], batch_size: int):
        self._rows = batch_size
        due = np.cumsum(shares / shares.sum(axis=1, keepdims=True) * batch_size, axis=0)
        self._table = np.zeros((len(due) + 1, due.shape[1]), np.int64)  # rows of each component before each step
        for step, before in enumerate(self._table[:-1]):
            self._table[step + 1] = before + _apportioned(due[step] - before, batch_size)

    def counts(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
        """How many rows of each component come before each position."""
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
    """Non-negative integers that sum to `total`, as near to `wanted` as possible."""
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

    Args:
      components: the D corpora and their settings.
      supplies: where the rows of each come from, D of them.
      seed: of the order of rows.
      shares: of the components, [D], or [steps, D] where they change from step to step.
      batch_size: rows per step.
    """

    def __init__(
        self,
        components: Sequence[MixtureComponent],
        supplies: Sequence[Supply],
        seed: int,
        shares: Float[np.ndarray, " D"] | Float[np.ndarray, "N D"],
        batch_size: int = 1,
    ):
        self.components, self.supplies, self.seed = tuple(components), tuple(supplies), seed
        self._places = Fixed(shares.tolist()) if shares.ndim == 1 else Scheduled(shares, batch_size)

    def counts(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
        """How many rows of each component come before each position."""
        return self._places.counts(positions)

    def rows(self, positions: Int[np.ndarray, " N"]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """(which component, row of its corpus) at each position of the phase."""
        positions = np.asarray(positions, np.int64)
        which = self._places.which(positions)
        nth = self.counts(positions)[np.arange(len(positions)), which]
        rows = np.empty(len(positions), np.int64)
        for i, (component, supply) in enumerate(zip(self.components, self.supplies, strict=True)):
            mine = which == i
            rows[mine] = self._nth_rows(component, supply, nth[mine] + supply.taken)
        return which, rows

    def _nth_rows(
        self, component: MixtureComponent, supply: Supply, nth: Int[np.ndarray, " N"]
    ) -> Int[np.ndarray, " N"]:
        epoch, index = np.divmod(nth, supply.period)
        if component.replay:
            if component.replay == "shuffled":
                index = permuted(index, epoch + RESHUFFLED, supply.period, self.seed)
            epoch = np.zeros_like(epoch)  # the first reading was epoch 0
        return permuted(index, epoch, supply.size, self.seed) if component.order == "shuffled" else index


def permuted(index: Int[np.ndarray, " N"], epoch: Int[np.ndarray, " N"], size: int, seed: int) -> Int[np.ndarray, " N"]:
    """A pseudo-random permutation of range(size) for each (seed, epoch), evaluated at `index` in O(1) memory.

    A four-round Feistel network on the next even number of bits, applied again until the value lands inside the range.
    It is defined here to the bit, so that no library version can change the order of a running experiment.
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
