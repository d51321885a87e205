"""Scalars of the step, composed from optax schedules: the learning rate, the share that is kept, a share of a mixture.

A schedule is a start and legs; the families below name the usual ones. Formulas: Ibrahim et al. (arXiv 2403.08763)
Eq 1, Eq 2 and section 7.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import gin
import jax.numpy as jnp
import numpy as np
import optax

from slm_jax.config import as_list
from slm_jax.errors import UserError

INVERSE_SQRT_TIMESCALE = 10.0  # alpha of the cooldown; the paper leaves it open, its authors' later code has 10


def _inverse_sqrt(steps: int) -> optax.Schedule:
    def h(x):
        return 1 / jnp.sqrt(1 + INVERSE_SQRT_TIMESCALE * x) - 1

    return lambda t: 1 - h(jnp.minimum(t, steps) / steps) / h(1.0)


# Shape -> how much of the way is still to go, 1 to 0 in so many steps.
SHAPES: dict[str, Callable[[int], optax.Schedule]] = {
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "inverse_sqrt": _inverse_sqrt,
    "one_minus_sqrt": lambda steps: lambda t: 1 - jnp.sqrt(jnp.minimum(t, steps) / steps),
}
EXPONENTIAL = "exponential"  # takes equal factors in equal times, so it has no such share


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SchedulePart:
    """One part of a schedule: from the value where the previous part ended to another.

    Attributes:
      to: value at the end of the part.
      steps: its length: a number of steps from 1 on, or, below 1, a fraction of the schedule's steps; None takes the
        steps that the other parts leave.
      shape: `linear`, `cosine`, `inverse_sqrt`, `one_minus_sqrt` or `exponential`.
    """

    to: float
    steps: float | None = None
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in (*SHAPES, EXPONENTIAL):
            raise UserError(
                f"SchedulePart.shape {self.shape!r} is unknown: known are {', '.join((*SHAPES, EXPONENTIAL))}"
            )
        if self.to < 0 or (self.steps is not None and self.steps < 0):
            raise UserError(
                f"SchedulePart(to={self.to}, steps={self.steps}): neither a value nor a length can be negative"
            )


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A start value and parts; after the last part its value stays.

    Attributes:
      parts: the parts, in order.
      start: value at step 0; None continues from where the previous schedule ended.
    """

    parts: Sequence[SchedulePart]
    start: float | None = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(as_list(self.parts, SchedulePart, "Schedule.parts")))
        if self.start is not None and self.start < 0:
            raise UserError(f"Schedule.start {self.start} is negative")
        if sum(leg.steps is None for leg in self.parts) > 1:
            raise UserError("Schedule.parts: at most one leg takes what the others leave (steps = None)")

    def lengths(self, total: int, owner: str = "the schedule") -> list[int]:
        """Steps of each leg, where `total` steps are ruled.

        Raises:
          UserError: together they are longer than that.
        """
        wanted = [0.0 if s is None else s * total if s < 1 else s for s in (leg.steps for leg in self.parts)]
        # Ends are rounded rather than lengths, so that shares of a whole make a whole.
        ends = [math.floor(sum(wanted[: i + 1]) + 0.5) for i in range(len(wanted))]
        given = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        rest = total - sum(given)
        if rest < 0:
            raise UserError(
                f"the parts of {owner} take {' + '.join(map(str, given))} steps, it rules {total}: shorten them or "
                "train longer"
            )
        return [rest if leg.steps is None else length for leg, length in zip(self.parts, given, strict=True)]


def over(schedule: Schedule, total: int, before: float = 0.0, owner: str = "the schedule") -> optax.Schedule:
    """t -> value for t in [0, total], t steps after the schedule begins. `before`: where the one before it ended."""
    at = before if schedule.start is None else schedule.start
    parts, ends, end = [], [], 0
    for leg, steps in zip(schedule.parts, schedule.lengths(total, owner), strict=True):
        if steps:
            parts.append(_part(leg, at, steps))
            ends.append(end := end + steps)
        at = leg.to
    return optax.join_schedules([*parts, optax.constant_schedule(at)], ends)


def _part(leg: SchedulePart, start: float, steps: int) -> optax.Schedule:
    if leg.shape == EXPONENTIAL:
        if not start > 0 or not leg.to > 0:
            raise UserError(f"an exponential leg from {start} to {leg.to}: both are above 0, or take another shape")
        return optax.exponential_decay(start, steps, leg.to / start)
    to_go = SHAPES[leg.shape](steps)
    return lambda t: leg.to + (start - leg.to) * to_go(t)


def in_turn(spans: Sequence[tuple[int, Schedule, int]]) -> optax.Schedule:
    """t -> value over (first step, schedule, steps) one behind the other. The n-th step, counted from 1, applies t = n,
    so a span that begins after step F rules from t = F + 1 on."""
    first, schedule, steps = spans[0]
    rules = [(first, over(schedule, steps))]
    for first, schedule, steps in spans[1:]:
        before_first, before = rules[-1]
        rules.append((first, over(schedule, steps, np.asarray(before(first - before_first)).item())))

    def value(t):
        first, rule = rules[0]
        result = rule(t - first)
        for first, rule in rules[1:]:
            result = jnp.where(t > first, rule(t - first), result)
        return result

    return value


@gin.configurable
def cosine_schedule(peak: float = 3e-4, warmup: float = 0.01, final: float = 0.1) -> Schedule:
    """Linear warm-up from 0 to `peak`, then a cosine down to `peak * final` (Eq 1, 2).

    As a phase's own schedule it re-warms and re-decays.

    Args:
      peak: the highest value.
      warmup: length of the warm-up, in steps or, below 1, as a fraction of the schedule.
      final: the last value, as a fraction of `peak`.
    """
    return _from_zero((_peak(peak), warmup, "linear"), (peak * final, None, "cosine"))


@gin.configurable
def constant_schedule(peak: float = 3e-4, warmup: float = 0.01) -> Schedule:
    """Linear warm-up from 0 to `peak`, which stays.

    Args:
      peak: the value after the warm-up.
      warmup: length of the warm-up, in steps or, below 1, as a fraction of the schedule.
    """
    return _from_zero((_peak(peak), warmup, "linear"))


@gin.configurable
def wsd_schedule(
    peak: float = 3e-4, warmup: float = 0.01, decay: float = 0.1, final: float = 0.0, shape: str = "linear"
) -> Schedule:
    """Warm-up, stable, decay: linear warm-up to `peak`, then a decay to `peak * final` at the end.

    Args:
      peak: the value between warm-up and decay.
      warmup: length of the warm-up, in steps or, below 1, as a fraction of the schedule.
      decay: length of the decay, likewise.
      final: the last value, as a fraction of `peak`.
      shape: of the decay: `linear` or `one_minus_sqrt`.
    """
    return _from_zero((_peak(peak), warmup, "linear"), (peak, None, "linear"), (peak * final, decay, shape))


@gin.configurable
def infinite_schedule(
    peak: float = 3e-4,
    constant: float = 0.55,
    final: float = 0.1,
    warmup: float = 0.01,
    cooldown: float = 0.6,
    anneal: float = 0.0,
    shape: str = "cosine",
) -> Schedule:
    """Warm-up, cooldown to a constant that stays for any number of phases, and an optional exponential anneal.

    Section 7 of the paper; the defaults of `constant` and of the lengths are its Table 14's. Lengths given in steps do
    not change when the run is extended.

    Args:
      peak: the highest value.
      constant: the value after the cooldown, as a fraction of `peak`.
      final: the value after the anneal, as a fraction of `peak`.
      warmup: length of the warm-up, in steps or, below 1, as a fraction of the schedule.
      cooldown: length of the cooldown, likewise.
      anneal: length of the anneal at the end, likewise; 0 does not anneal yet.
      shape: of the cooldown: `cosine` or `inverse_sqrt`.
    """
    parts = [(_peak(peak), warmup, "linear"), (peak * constant, cooldown, shape), (peak * constant, None, "linear")]
    return _from_zero(*parts, *([(peak * final, anneal, EXPONENTIAL)] if anneal else []))


@gin.configurable
def anneal_schedule(to: float = 3e-5, steps: float | None = None, shape: str = EXPONENTIAL) -> Schedule:
    """From the value reached so far down to another.

    Args:
      to: the last value.
      steps: length, in steps or, below 1, as a fraction of the schedule; None takes all of it.
      shape: a shape of `SchedulePart`.
    """
    return Schedule([SchedulePart(to, steps, shape)], start=None)


def _from_zero(*parts: tuple[float, float | None, str]) -> Schedule:
    """Every argument is given, so that gin's settings of SchedulePart and Schedule, made for others, do not reach
    these."""
    return Schedule([SchedulePart(*part) for part in parts], 0.0)


def _peak(peak: float) -> float:
    if not peak > 0:
        raise UserError(f"peak {peak} of a schedule: it is above 0")
    return peak
