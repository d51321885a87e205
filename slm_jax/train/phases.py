"""A run is a list of phases; the step alone decides which of them it belongs to, and its learning rate."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import gin
import numpy as np
import optax

from slm_jax.config import as_list, at_least
from slm_jax.data.mixture import MixtureComponent
from slm_jax.errors import UserError
from slm_jax.score.selection import CombinedSelection, Selection
from slm_jax.train.schedules import Schedule, cosine_schedule, in_turn, over


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of `batch_size` rows drawn from one mixture, with one objective.

    Attributes:
      steps: length in steps; set either `steps` or `tokens`.
      tokens: length in tokens, counting all positions of the rows; rounded up to whole steps.
      mixture: the corpora to draw rows from; by default one MixtureComponent.
      batch_size: rows of the global batch.
      selection: a Selection or CombinedSelection; None trains on every token (causal).
      keep_ratio: a Schedule over the phase in place of Selection.ratio.
      schedule: learning rate from this phase on, until a later phase sets its own; None continues the previous
        schedule.
      reset_optimizer: reset the moments at the beginning of the phase.
      l2_to_init: pull toward the parameters at the beginning of the phase: each step removes learning rate *
        l2_to_init of the distance (L2 against forgetting), besides OptimizerConfig.weight_decay, which pulls toward
        zero.
    """

    steps: int | None = None
    tokens: float | None = None
    mixture: Sequence[MixtureComponent] = ()
    batch_size: int = 16
    selection: Selection | CombinedSelection | None = None
    keep_ratio: Schedule | None = None
    schedule: Schedule | None = None
    reset_optimizer: bool = False
    l2_to_init: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise UserError(f"Phase takes steps or tokens, one of the two; it was given {self.steps} and {self.tokens}")
        at_least(1, **{"Phase.batch_size": self.batch_size})
        if self.steps is not None:
            at_least(1, **{"Phase.steps": self.steps})
        if self.tokens is not None and not self.tokens > 0:
            raise UserError(f"Phase.tokens is {self.tokens}: it is above 0")
        if self.l2_to_init < 0:
            raise UserError(f"Phase.l2_to_init is {self.l2_to_init}: it is 0 or above")
        for name in ("keep_ratio", "schedule"):
            check_schedule(getattr(self, name), f"Phase.{name}")
        if not isinstance(self.selection, Selection | CombinedSelection | None):
            raise UserError(f"Phase.selection takes @Selection() with brackets; it was given {self.selection!r}")
        if self.keep_ratio and (not isinstance(self.selection, Selection) or self.selection.threshold is not None):
            raise UserError("Phase.keep_ratio is the share that one Selection keeps: give it one without threshold")
        draws = as_list(self.mixture, MixtureComponent, "Phase.mixture") or [MixtureComponent()]  # pyright: ignore[reportCallIssue] (gin's)
        object.__setattr__(self, "mixture", tuple(draws))
        if len({(draw.corpus, draw.replay) for draw in draws}) < len(draws):
            raise UserError(
                "Phase.mixture names a corpus twice: give it one MixtureComponent with the sum of the shares"
            )

    def resolved(self, sequence_length: int) -> "Phase":
        """With its length in steps, and as `selection.ratio` the highest that keep_ratio asks for."""
        steps = self.steps or math.ceil(self.tokens / (self.batch_size * sequence_length))  # pyright: ignore[reportOptionalOperand]
        phase = dataclasses.replace(self, steps=steps, tokens=None)
        if not (phase.keep_ratio and isinstance(phase.selection, Selection)):
            return phase
        ratios = phase.ratios()
        if not (ratios.min() > 0 and ratios.max() <= 1):
            raise UserError(
                f"Phase.keep_ratio goes from {ratios.min():g} to {ratios.max():g}: a share that is kept is in (0, 1], "
                "and a schedule begins at 0 unless Schedule.start says otherwise"
            )
        return dataclasses.replace(phase, selection=dataclasses.replace(phase.selection, ratio=float(ratios.max())))

    def ratios(self) -> np.ndarray:
        """What keep_ratio is at each step of a phase that is resolved."""
        assert self.keep_ratio
        return values(over(self.keep_ratio, self.num_steps, owner="Phase.keep_ratio"), self.num_steps)

    @property
    def num_steps(self) -> int:
        """Steps of a phase that is resolved."""
        assert self.steps is not None, "the phase is given in tokens: call `resolved`"
        return self.steps

    @property
    def score_columns(self) -> tuple[str, ...]:
        return self.selection.columns() if self.selection else ()


def check_schedule(value: Any, name: str) -> None:
    if not isinstance(value, Schedule | None):
        raise UserError(f"{name} takes a schedule, such as @cosine_schedule() with brackets; it was given {value!r}")


def values(scalar: optax.Schedule, steps: int) -> np.ndarray:
    """What a scalar is at t = 1, ..., steps."""
    return np.asarray(scalar(np.arange(1, steps + 1)) * np.ones(steps))


def first_steps(phases: Sequence[Phase]) -> np.ndarray:
    """Steps before each phase, [P + 1]; the last is the length of the run."""
    return np.cumsum([0, *(phase.num_steps for phase in phases)])


def learning_rate(phases: Sequence[Phase], schedule: Schedule | None) -> optax.Schedule:
    """t -> learning rate of the t-th step of the run, t counted from 1.

    `schedule` rules until the first phase that brings its own; None is `cosine_schedule()`.

    Raises:
      UserError: a schedule whose parts are longer than the phases that it rules, or one that rules none.
    """
    check_schedule(schedule, "train.schedule")
    if phases[0].schedule and schedule:
        raise UserError("train.schedule rules no phase, since the first brings its own: take one of them away")
    firsts, owners = first_steps(phases), [i for i, phase in enumerate(phases) if i == 0 or phase.schedule]
    spans = []
    for owner, next_owner in zip(owners, [*owners[1:], len(phases)], strict=True):
        ruling = phases[owner].schedule or schedule or cosine_schedule()
        first, steps = int(firsts[owner]), int(firsts[next_owner] - firsts[owner])
        ruling.lengths(steps, f"the schedule of phase {owner}")
        spans.append((first, ruling, steps))
    return in_turn(spans)


def keep_ratio(phases: Sequence[Phase], number: int) -> optax.Schedule | None:
    """t -> the share of the valid tokens that trains, t counted as for the learning rate; None where it is constant."""
    phase = phases[number]
    if phase.keep_ratio is None:
        return None
    return in_turn([(int(first_steps(phases)[number]), phase.keep_ratio, phase.num_steps)])
