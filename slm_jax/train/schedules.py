"""Scalars that depend on the step, composed from optax schedules: learning rate, keep ratio, weight of a mixture.

A schedule is a start and parts; the functions below make the usual ones. Formulas: Ibrahim et al. (arXiv 2403.08763)
Eq 1, Eq 2 and section 7.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax

from slm_jax.configurable import NotNegative, OneOf, Positive, configurable
from slm_jax.errors import UserError

INVERSE_SQRT_TIMESCALE = 10.0  # alpha of the cooldown: the paper leaves it open, its authors' later code uses 10


def _inverse_sqrt(steps: int) -> optax.Schedule:
    def h(x):
        return 1 / jnp.sqrt(1 + INVERSE_SQRT_TIMESCALE * x) - 1

    return lambda t: 1 - h(jnp.minimum(t, steps) / steps) / h(1.0)


# Shape -> number of steps -> t -> fraction of the way that remains, from 1 to 0.
SHAPES: dict[str, Callable[[int], optax.Schedule]] = {
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "inverse_sqrt": _inverse_sqrt,
    "one_minus_sqrt": lambda steps: lambda t: 1 - jnp.sqrt(jnp.minimum(t, steps) / steps),
}
EXPONENTIAL = "exponential"  # equal factors in equal times: no such fraction describes it
Shape = Annotated[str, OneOf((*SHAPES, EXPONENTIAL))]


@configurable
@dataclasses.dataclass(frozen=True)
class SchedulePart:
    """One part of a schedule: from the value where the previous part ended to another.

    Attributes:
      to: value at the end of the part.
      steps: its length: a number of steps from 1 on, or, below 1, a fraction of the schedule's steps; None takes the
        steps that the other parts leave.
      shape: `linear`, `cosine`, `inverse_sqrt`, `one_minus_sqrt` or `exponential`.
    """

    to: NotNegative
    steps: NotNegative | None = None
    shape: Shape = "linear"


@configurable
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A start value and parts; after the last part its value stays.

    Attributes:
      parts: the parts, in order.
      start: value at step 0; None continues from where the previous schedule ended.
    """

    parts: Sequence[SchedulePart]
    start: NotNegative | None = 0.0

    def __post_init__(self) -> None:
        if sum(part.steps is None for part in self.parts) > 1:
            raise UserError(
                "schedule-two-remainders",
                "two of Schedule.parts have SchedulePart.steps = None, the remaining steps: give one a length",
            )

    def lengths(self, total: int, owner: str = "the schedule") -> list[int]:
        """Steps of each part of a schedule over `total` steps.

        Raises:
          UserError: `schedule-too-long`: the parts are longer together.
        """
        wanted = [0.0 if s is None else s * total if s < 1 else s for s in (part.steps for part in self.parts)]
        # Ends are rounded rather than lengths, so that fractions that sum to 1 cover all steps.
        ends = [math.floor(sum(wanted[: i + 1]) + 0.5) for i in range(len(wanted))]
        given = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        rest = total - sum(given)
        if rest < 0:
            raise UserError(
                "schedule-too-long",
                f"the parts of {owner} take {' + '.join(map(str, given))} steps, but it spans {total}: shorten them or "
                "train longer",
            )
        return [rest if part.steps is None else length for part, length in zip(self.parts, given, strict=True)]


def over(schedule: Schedule, total: int, before: float = 0.0, owner: str = "the schedule") -> optax.Schedule:
    """t -> value for t in [0, total], t steps after the schedule begins. `before`: last value of the previous one."""
    at = before if schedule.start is None else schedule.start
    pieces, ends, end = [], [], 0
    for part, steps in zip(schedule.parts, schedule.lengths(total, owner), strict=True):
        if steps:
            pieces.append(_piece(part, at, steps))
            ends.append(end := end + steps)
        at = part.to
    return optax.join_schedules([*pieces, optax.constant_schedule(at)], ends)


def _piece(part: SchedulePart, start: float, steps: int) -> optax.Schedule:
    if part.shape == EXPONENTIAL:
        if not start > 0 or not part.to > 0:
            raise UserError(
                "schedule-exponential-zero",
                f"an exponential SchedulePart goes from {start} to {part.to}: both must be above 0, or take another "
                "shape",
            )
        return optax.exponential_decay(start, steps, part.to / start)
    remaining = SHAPES[part.shape](steps)
    return lambda t: part.to + (start - part.to) * remaining(t)


def in_turn(spans: Sequence[tuple[int, Schedule, int]]) -> optax.Schedule:
    """t -> value of consecutive schedules, given as (first step, schedule, steps). The n-th step, counted from 1, takes
    the value at t = n, so a span that begins after F steps applies from t = F + 1 on."""
    first, schedule, steps = spans[0]
    scalars = [(first, over(schedule, steps))]
    for first, schedule, steps in spans[1:]:
        before_first, before = scalars[-1]
        scalars.append((first, over(schedule, steps, np.asarray(before(first - before_first)).item())))

    def value(t):
        first, scalar = scalars[0]
        result = scalar(t - first)
        for first, scalar in scalars[1:]:
            result = jnp.where(t > first, scalar(t - first), result)
        return result

    return value


def peak_by_size(parameters: int) -> float:
    """A peak learning rate for AdamW and a model of this many parameters, with two digits.

    3e-3 at 1.2M parameters, measured here, and 4e-4 at 1.1B (TinyLlama's), with a power law through both.
    """
    return float(f"{3e-3 * (max(parameters, 1) / 1.2e6) ** -0.3:.1e}")


@configurable
def cosine_schedule(peak: Positive = 3e-4, warmup: NotNegative = 0.01, final: NotNegative = 0.1) -> Schedule:
    """Linear warm-up from 0 to `peak`, then a cosine down to `peak * final` (Eq 1, 2).

    As a phase's own schedule it re-warms and re-decays.

    Args:
      peak: the highest value.
      warmup: length of the warm-up, in steps or, below 1, as a fraction of the schedule.
      final: the last value, as a fraction of `peak`.
    """
    return _from_zero((peak, warmup, "linear"), (peak * final, None, "cosine"))


@configurable
def constant_schedule(peak: Positive = 3e-4, warmup: NotNegative = 0.01) -> Schedule:
    """Linear warm-up from 0 to `peak`, which stays.

    Args:
      peak: the value after the warm-up.
      warmup: length of the warm-up, in steps or, below 1, as a fraction of the schedule.
    """
    return _from_zero((peak, warmup, "linear"))


@configurable
def wsd_schedule(
    peak: Positive = 3e-4,
    warmup: NotNegative = 0.01,
    decay: NotNegative = 0.1,
    final: NotNegative = 0.0,
    shape: Shape = "linear",
) -> Schedule:
    """Warm-up, stable, decay: linear warm-up to `peak`, then a decay to `peak * final` at the end.

    Args:
      peak: the value between warm-up and decay.
      warmup: length of the warm-up, in steps or, below 1, as a fraction of the schedule.
      decay: length of the decay, likewise.
      final: the last value, as a fraction of `peak`.
      shape: of the decay: `linear` or `one_minus_sqrt`.
    """
    return _from_zero((peak, warmup, "linear"), (peak, None, "linear"), (peak * final, decay, shape))


@configurable
def infinite_schedule(
    peak: Positive = 3e-4,
    constant: NotNegative = 0.55,
    final: NotNegative = 0.1,
    warmup: NotNegative = 0.01,
    cooldown: NotNegative = 0.6,
    anneal: NotNegative = 0.0,
    shape: Shape = "cosine",
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
    parts = [(peak, warmup, "linear"), (peak * constant, cooldown, shape), (peak * constant, None, "linear")]
    return _from_zero(*parts, *([(peak * final, anneal, EXPONENTIAL)] if anneal else []))


@configurable
def anneal_schedule(
    to: NotNegative = 3e-5,
    steps: NotNegative | None = None,
    shape: Shape = EXPONENTIAL,
) -> Schedule:
    """From the value reached so far down to another.

    Args:
      to: the last value.
      steps: length, in steps or, below 1, as a fraction of the schedule; None takes all of it.
      shape: a shape of `SchedulePart`.
    """
    return Schedule([SchedulePart(to, steps, shape)], start=None)


def _from_zero(*parts: tuple[float, float | None, str]) -> Schedule:
    """Passes every argument, so that gin's settings of SchedulePart and Schedule, meant for others, do not apply."""
    return Schedule([SchedulePart(*part) for part in parts], 0.0)
