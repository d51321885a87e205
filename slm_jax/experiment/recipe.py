"""A recipe describes an experiment: the arms to compare, their seeds and variants, and the stages that they share.

Settings are gin text, in which `%NAME` is the product of the shared stage NAME: a directory or, for a stage that writes
a score column, the name of the column. A task that names a product runs after its stage. `%seed` is the run's seed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import gin

from slm_jax.configurable import OneOf, Seed, configurable
from slm_jax.errors import UserError

DIMENSIONS = ("variant", "seed")
COMPARISONS = ("value", "difference", "recovered", "tokens")
SEEDS = ("mean", "every", "interval")


class _Named:
    """Its name is its gin scope, as in `causal/Arm.settings = ...`, unless `name` is set."""

    name: str

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", gin.current_scope_str().split("/")[-1])
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise UserError(
                "experiment-bad-name",
                f"{type(self).__name__} has the name {self.name!r}: give it a gin scope or a name of letters, digits, "
                "'_', '.', '+' and '-'",
            )


@configurable
@dataclass(frozen=True)
class SharedStage(_Named):
    """A stage whose product several runs use: text, a corpus, a reference, a score column.

    Attributes:
      stage: `prepare`, `train`, `score`, `experiment world` and the like.
      settings: gin text, in addition to the recipe's for that stage.
      per: repeat it for each 'variant' or 'seed', or both; those of its inputs are added. The seed of a train stage is
        100 + seed.
      after: shared stages to wait for that the settings do not name.
      column: name of the score column; by default the stage's name. Two stages that score different corpora with one
        reference share a column name.
      name: by default its gin scope.
    """

    stage: str
    settings: str = ""
    per: Sequence[str] = ()
    after: Sequence[str] = ()
    column: str = ""
    name: str = ""


@configurable
@dataclass(frozen=True)
class Arm(_Named):
    """A train run that is compared with others.

    Attributes:
      settings: gin text, in addition to the recipe's for `train`.
      seeds: seeds to run; None uses the recipe's.
      variants: variants to run it in; all by default.
      after: shared stages to wait for that the settings do not name.
      label: name in reports; by default `name`.
      name: by default its gin scope.
    """

    settings: str = ""
    seeds: Sequence[Seed] | None = None
    variants: Sequence[str] = ()
    after: Sequence[str] = ()
    label: str = ""
    name: str = ""


@configurable
@dataclass(frozen=True)
class Threshold(_Named):
    """A claim written down before the run, with a bound from which the verdict is computed.

    Attributes:
      claim: the claim in words.
      arm: the arm that the claim is about, or a group of arms, of which the best is used.
      comparison: `value` of the measure at the end; `difference` to `against`, paired by seed; `recovered`, the
        fraction of the gain of another arm (`gain_of`) over `against`; `tokens`, the fraction of the tokens of
        `against` that a group of arms with schedules of different lengths needs to reach its final value.
      measure: a number of the evaluators such as 'target/loss', or 'selected/SOURCE', the fraction of a source's tokens
        selected over the second half of the run.
      at_most: upper bound; set either this or `at_least`.
      at_least: lower bound.
      against: an arm, or the best of a group of arms; None uses the recipe's baseline.
      gain_of: for `recovered`, the arm whose gain is 100 %; None uses the recipe's oracle.
      variants: variants in which it must hold; by default all in which the arm runs.
      best_variant: compare the best variant of each side, such as the better of two learning rates, instead of every
        variant.
      seeds: whether the bound must hold for the `mean`, for `every` seed, or for the whole 95 % `interval` (t).
      name: by default its gin scope.
    """

    claim: str
    arm: str
    measure: str
    comparison: Annotated[str, OneOf(COMPARISONS)] = "difference"
    at_most: float | None = None
    at_least: float | None = None
    against: str | None = None
    gain_of: str | None = None
    variants: Sequence[str] = ()
    best_variant: bool = False
    seeds: Annotated[str, OneOf(SEEDS)] = "mean"
    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.at_most is None) == (self.at_least is None):
            raise UserError(
                "experiment-bad-threshold", f"Threshold {self.name}: give it at_most or at_least, one of the two"
            )
        if self.comparison == "tokens" and self.at_most is None:
            raise UserError(
                "experiment-bad-threshold",
                f"Threshold {self.name}: comparison = 'tokens' needs at_most, since an arm may never reach the value",
            )


@configurable
@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
      name: of its folders.
      question: the question it asks, in one sentence.
      sources: the sources of its text: for each, its public name, licence, and how to get it.
      evidence: a paragraph on what its result is evidence for, and what it is not.
      settings: stage -> gin text for all jobs of that stage.
      changes: like `settings`, for a recipe that includes another one: overrides the settings of that one.
      shared: stages that run before the arms.
      arms: the train runs to compare.
      groups: name -> names of arms. The best of a group is the arm with the lowest mean of the first measure.
      variants: name -> gin text; every arm runs once in each. One without a name by default.
      seeds: of the arms.
      measures: numbers of the evaluators to report; the first is the target's loss, the second that of general text.
      baseline: the arm that others are compared with.
      oracle: the arm that knows which tokens are worth training on, if there is one.
      thresholds: claims written before the run.
      keep_runs: keep the run directories of arms when their results are written.
    """

    name: str
    question: str
    arms: Sequence[Arm]
    sources: Sequence[str] = ()
    evidence: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    shared: Sequence[SharedStage] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    variants: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    seeds: Sequence[Seed] = (0,)
    measures: Sequence[str] = ("target/loss", "general/loss")
    baseline: str = "causal"
    oracle: str | None = None
    thresholds: Sequence[Threshold] = ()
    keep_runs: bool = True

    def __post_init__(self) -> None:
        for setting in ("arms", "shared", "thresholds"):
            names = [item.name for item in getattr(self, setting)]
            if len(set(names)) < len(names):
                raise UserError(
                    "experiment-name-taken",
                    f"Recipe.{setting}: two are called {max(names, key=names.count)!r}: rename one",
                )
        stages, arms = {stage.name for stage in self.shared}, {arm.name for arm in self.arms}
        for item in (*self.shared, *self.arms):
            if wrong := {*item.after} - stages:
                raise UserError(
                    "experiment-unknown-stage",
                    f"{item.name} runs after {min(wrong)!r}: the shared stages are {', '.join(stages)}",
                )
        claims = self.thresholds
        compared = [name for t in claims for name in (t.arm, t.against, t.gain_of) if name not in self.groups]
        for arm in (self.baseline, self.oracle, *compared, *(name for group in self.groups.values() for name in group)):
            if arm is not None and arm not in arms:
                raise UserError(
                    "experiment-unknown-arm",
                    f"recipe {self.name} has no arm {arm!r}: it has {', '.join(a.name for a in self.arms)}",
                )
        for item in (*self.arms, *claims):
            if wrong := {*item.variants} - {*self.variants}:
                raise UserError(
                    "experiment-unknown-variant",
                    f"{type(item).__name__} {item.name}: {min(wrong)!r} is no variant of recipe {self.name}",
                )
        for threshold in claims:
            if threshold.comparison == "recovered" and threshold.gain_of is None and self.oracle is None:
                raise UserError(
                    "experiment-bad-threshold",
                    f"Threshold {threshold.name}: recipe {self.name} has no oracle: set Threshold.gain_of",
                )

    def members(self, name: str) -> list[Arm]:
        """The arms of a group, or the arm of that name."""
        names = self.groups.get(name, [name])
        return [arm for arm in self.arms if arm.name in names]

    def seeds_of(self, arm: Arm) -> set[int]:
        return {*(self.seeds if arm.seeds is None else arm.seeds)}

    def variants_of(self, name: str) -> list[str]:
        """Those in which an arm, or any of a group, runs."""
        return [each for each in self.variants if any(each in (arm.variants or [each]) for arm in self.members(name))]

    def stage(self, name: str) -> SharedStage:
        return next(stage for stage in self.shared if stage.name == name)

    def common(self, stage: str) -> tuple[str, str]:
        """The gin texts of all jobs of a stage."""
        return self.settings.get(stage, ""), self.changes.get(stage, "")

    def reads(self, item: SharedStage | Arm) -> list[str]:
        """Names of the shared stages that an item runs after."""
        stage, varied = (item.stage, "variant" in item.per) if isinstance(item, SharedStage) else ("train", True)
        texts = [
            line
            for variant in (self.variants.values() if varied else [""])
            for line in statements(*self.common(stage), variant, item.settings)
        ]
        named = {name for text in texts for name in re.findall(r"%(\w+)", text)} - {item.name}
        return [stage.name for stage in self.shared if stage.name in named | {*item.after}]

    def dimensions(self, item: SharedStage | Arm) -> tuple[str, ...]:
        """Over what an item is repeated: variants, seeds, both or none."""
        if isinstance(item, Arm):
            return DIMENSIONS
        own = {*item.per}.union(*(self.dimensions(self.stage(name)) for name in self.reads(item)))
        return tuple(name for name in DIMENSIONS if name in own)


def statements(*texts: str) -> list[str]:
    """The statements of gin texts one after the other, without comment lines and indentation; of those that bind the
    same name the last."""
    found: dict[str, str] = {}
    name = ""
    for line in (line.strip() for text in texts for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if begins := re.match(r"(?:([\w./]+)\s*=(?!=)|include\b)", line):
            name = begins[1] or line
            found.pop(name, None)
            found[name] = line
        elif name:
            found[name] += f"\n{line}"
    return list(found.values())
