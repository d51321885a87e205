"""A run is a list of phases. The step alone determines its phase and its learning rate.

`learning_rate` and `keep_ratio` make one function of the step each, t -> value with t counted from 1, from the
`Schedule`s that phases set (schedules.py).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import optax

from slm_jax.configurable import Count, NotNegative, OneOf, Positive, configurable
from slm_jax.data.mixture import MixtureComponent
from slm_jax.errors import UserError
from slm_jax.files import to_json
from slm_jax.score.selection import CombinedSelection, Selection, histories, selection_record
from slm_jax.score.weighting import NORMALISERS, Weighting, check_rule, columns_of, record_of
from slm_jax.train.schedules import Schedule, cosine_schedule, in_turn, over


@configurable
@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of `batch_size` rows drawn from one mixture, with one objective.

    Attributes:
      steps: length in steps; set either `steps` or `tokens`.
      tokens: length in tokens, counting all positions of the rows; rounded up to whole steps.
      mixture: the corpora to draw rows from; by default one MixtureComponent.
      batch_size: rows of the global batch.
      selection: a Selection or CombinedSelection; None trains on every token (causal).
      weighting: the weight of each trained token's loss, instead of 1: DFT, EAFT, Focal, ExcessSigmoid, PositionTanh,
        ColumnWeight, or your own function, see slm_jax/score/weighting.py. No gradient flows through the weights.
      normalise: divisor of the sum of weight * loss over the global batch: the sum of the `weights`, or the number of
        `tokens` that have one. The gradients differ by a factor; AdamW cancels it if it is constant and
        gradients are not clipped.
      unselected_weight: weight of the tokens that the selection drops; 0 leaves them out entirely.
      keep_ratio: a Schedule over the phase that replaces Selection.ratio.
      schedule: learning rate from this phase on, until a later phase sets its own; None continues the previous
        schedule.
      reset_optimizer: reset the moments at the beginning of the phase.
      l2_to_init: pull toward the parameters at the beginning of the phase: each step removes learning rate *
        l2_to_init of the distance (L2 against forgetting), besides OptimizerConfig.weight_decay, which pulls toward
        zero.
    """

    steps: Count | None = None
    tokens: Positive | None = None
    mixture: Sequence[MixtureComponent] = ()
    batch_size: Count = 16
    selection: Selection | CombinedSelection | None = None
    weighting: Callable[..., Any] | None = None
    normalise: Annotated[str, OneOf(NORMALISERS)] = "weights"
    unselected_weight: NotNegative = 0.0
    keep_ratio: Schedule | None = None
    schedule: Schedule | None = None
    reset_optimizer: bool = False
    l2_to_init: NotNegative = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise UserError(
                "phase-length", f"Phase.steps is {self.steps} and Phase.tokens is {self.tokens}: set one of the two"
            )
        if self.keep_ratio and (not isinstance(self.selection, Selection) or self.selection.threshold is not None):
            raise UserError(
                "phase-keep-ratio", "Phase.keep_ratio replaces the ratio of a Selection: set one without a threshold"
            )
        if self.weighting is not None:
            check_rule(self.weighting)
        if self.unselected_weight and self.selection is None:
            raise UserError(
                "phase-unselected-weight",
                f"Phase.unselected_weight is {self.unselected_weight:g} without a selection: set Phase.selection, "
                "which decides the tokens that it applies to",
            )
        if self.unselected_weight and self.selection and self.selection.gradient == "filtered":
            raise UserError(
                "phase-unselected-weight",
                f"Phase.unselected_weight is {self.unselected_weight:g}, but a filtered gradient skips tokens that are "
                "not selected: set Selection.gradient to 'exact'",
            )
        mixture = self.mixture or [MixtureComponent()]  # pyright: ignore[reportCallIssue] (gin's)
        object.__setattr__(self, "mixture", tuple(mixture))
        if len({(component.corpus, component.replay) for component in mixture}) < len(mixture):
            raise UserError(
                "mixture-corpus-twice",
                f"Phase.mixture names a corpus twice ({', '.join(component.corpus for component in mixture)}): give it "
                "one MixtureComponent with the sum of the weights",
            )

    def resolved(self, sequence_length: int) -> "Phase":
        """The phase with its length in steps, and with the maximum of keep_ratio as `selection.ratio`."""
        steps = self.steps or math.ceil(self.tokens / (self.batch_size * sequence_length))  # pyright: ignore[reportOptionalOperand]
        phase = dataclasses.replace(self, steps=steps, tokens=None)
        if not (phase.keep_ratio and isinstance(phase.selection, Selection)):
            return phase
        ratios = phase.ratios()
        if not (ratios.min() > 0 and ratios.max() <= 1):
            raise UserError(
                "phase-keep-ratio",
                f"Phase.keep_ratio ranges from {ratios.min():g} to {ratios.max():g}: keep it within (0, 1], and set "
                "Schedule.start, which is 0 by default",
            )
        return dataclasses.replace(phase, selection=dataclasses.replace(phase.selection, ratio=float(ratios.max())))

    def ratios(self) -> np.ndarray:
        """keep_ratio at each step of a resolved phase, [steps]."""
        assert self.keep_ratio
        return values(over(self.keep_ratio, self.num_steps, owner="Phase.keep_ratio"), self.num_steps)

    @property
    def num_steps(self) -> int:
        """Steps of a resolved phase."""
        assert self.steps is not None, "the phase is given in tokens: call `resolved`"
        return self.steps

    @property
    def score_columns(self) -> tuple[str, ...]:
        """The score columns that the selection and the weighting read."""
        selected = self.selection.columns() if self.selection else ()
        return tuple(dict.fromkeys([*selected, *columns_of(self.weighting)]))

    @property
    def weights(self) -> Weighting:
        """The settings `weighting`, `normalise` and `unselected_weight`, as the train step takes them."""
        return Weighting(self.weighting, self.normalise, self.unselected_weight)

    def record(self) -> dict[str, Any]:
        """The phase as run.json keeps it."""
        weights = {
            "weighting": record_of(self.weighting),
            "normalise": self.normalise,
            "unselected_weight": self.unselected_weight,
        }
        record = {name: value for name, value in to_json(self).items() if name not in weights}
        record["selection"] = selection_record(self.selection)
        # Left out where they are off: run.json is then that of earlier versions, and their runs can be continued.
        return record | (weights if self.weights.on else {})


def history_lag(phases: Sequence[Phase]) -> int:
    """Selection.lag, if a selection of the run compares with lagged parameters; else 0.

    Raises:
      UserError: `selection-two-lags`: two of the phases have different lags.
    """
    selections = [phase.selection for phase in phases if "lagged" in histories(phase.selection)]
    lags = sorted({part.lag for selection in selections if selection for part in selection.parts})
    if len(lags) > 1:
        raise UserError(
            "selection-two-lags",
            f"phases have Selection.lag {lags[0]} and {lags[1]}: a run holds one history, so give all the same",
        )
    return lags[0] if lags else 0


def values(scalar: optax.Schedule, steps: int) -> np.ndarray:
    """The values of a schedule at t = 1, ..., steps: [steps]."""
    return np.asarray(scalar(np.arange(1, steps + 1)) * np.ones(steps))


def first_steps(phases: Sequence[Phase]) -> np.ndarray:
    """Steps before each of the P phases, [P + 1]; the last entry is the length of the run."""
    return np.cumsum([0, *(phase.num_steps for phase in phases)])


def learning_rate(phases: Sequence[Phase], schedule: Schedule | None) -> optax.Schedule:
    """t -> learning rate of the t-th step of the run, t counted from 1.

    `schedule` applies until the first phase that sets its own; None is `cosine_schedule()`.

    Raises:
      UserError: a schedule whose parts are longer than the phases that it spans, or one that spans none.
    """
    if phases[0].schedule and schedule:
        raise UserError(
            "train-two-schedules",
            "train.schedule has no effect because phase 0 sets its own Phase.schedule: remove one of them",
        )
    firsts, owners = first_steps(phases), [i for i, phase in enumerate(phases) if i == 0 or phase.schedule]
    spans = []
    for owner, next_owner in zip(owners, [*owners[1:], len(phases)], strict=True):
        own = phases[owner].schedule or schedule or cosine_schedule()
        first, steps = int(firsts[owner]), int(firsts[next_owner] - firsts[owner])
        own.lengths(steps, f"the schedule of phase {owner}")
        spans.append((first, own, steps))
    return in_turn(spans)


def keep_ratio(phases: Sequence[Phase], number: int) -> optax.Schedule | None:
    """t -> fraction of the valid tokens that trains in phase `number`, t counted from 1 at the beginning of the run;
    None if the phase sets no keep_ratio."""
    phase = phases[number]
    if phase.keep_ratio is None:
        return None
    return in_turn([(int(first_steps(phases)[number]), phase.keep_ratio, phase.num_steps)])
