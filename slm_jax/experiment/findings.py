"""Findings from the results of a recipe: differences paired by seed, at equal tokens or equal cost, and verdicts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slm_jax.experiment.intervals import Estimate, at, crossing, estimate, ratio_of_means
from slm_jax.experiment.recipe import Recipe, Threshold
from slm_jax.experiment.results import selection_quality

Result = Mapping[str, Any]
By = dict[str, dict[str, dict[int, Result]]]  # variant -> arm -> seed -> result


class Verdict(NamedTuple):
    """met: None if runs are missing. values: variant, or names of the two sides -> the estimate."""

    threshold: Threshold
    met: bool | None
    values: dict[str, Estimate]


def grouped(recipe: Recipe, results: Sequence[Result]) -> By:
    """Results by variant, arm and seed, in the order of the recipe."""
    by: By = {variant: {arm.name: {} for arm in recipe.arms} for variant in recipe.variants}
    for result in results:
        by[result["variant"]][result["arm"]][result["seed"]] = result
    return by


def measure_of(result: Result, measure: str) -> float | None:
    """A number of a result: of the evaluators ('target/loss'); 'selected/SOURCE', or 'selected/planted',
    'selected/recall' and 'selected/precision'; 'noisy/NAME', the share of an evaluator's texts that hold noise."""
    kind, _, name = measure.partition("/")
    if kind == "noisy":
        return result["samples"].get(name, {}).get("noisy")
    if kind != "selected":
        return result["final"].get(measure)
    if name in result["selected"]:
        return result["selected"][name]["selected"]
    planted = [source for source in result["selected"] if source.endswith("/noise")]
    quality = selection_quality(result["selected"], planted)
    return quality.get(name) if quality else None


def paired(
    runs: Mapping[int, Result], others: Mapping[int, Result], of: Callable[[Result, Result], float | None]
) -> list[float]:
    """The values of a function on pairs of runs with the same seed, without None."""
    return [value for seed in runs if seed in others and (value := of(runs[seed], others[seed])) is not None]


def mean_of(runs: Mapping[int, Result], measure: str) -> Estimate | None:
    values = [value for result in runs.values() if (value := measure_of(result, measure)) is not None]
    return estimate(values) if values else None


def difference(runs: Mapping[int, Result], others: Mapping[int, Result], measure: str) -> Estimate | None:
    """Difference at the end of both runs: at equal tokens if both have seen the same number."""

    def change(a: Result, b: Result) -> float | None:
        x, y = measure_of(a, measure), measure_of(b, measure)
        return None if x is None or y is None else x - y

    values = paired(runs, others, change)
    return estimate(values) if values else None


def cost(result: Result, with_reference: bool) -> tuple[float, float] | None:
    """Floating point operations before the first step, and of training; None if they are not known."""
    flops = result["flops"]
    before = [flops["scoring"], flops["reference"] if with_reference else 0.0]
    return None if None in (*before, flops["training"]) else (sum(before), flops["training"])


def cost_curve(result: Result, measure: str, with_reference: bool) -> tuple[list[float], list[Any]] | None:
    """The measure over the operations spent, including scoring and, `with_reference`, the training of references."""
    spent = cost(result, with_reference)
    if spent is None or measure not in result["evaluations"]:
        return None
    before, training = spent
    steps = result["evaluations"]["step"]
    return [before + training * step / result["steps"] for step in steps], result["evaluations"][measure]


def equal_cost(
    runs: Mapping[int, Result], others: Mapping[int, Result], measure: str, with_reference: bool
) -> Estimate | None:
    """Difference at the total operations of `others`. The arm's value is interpolated on its curve, in the middle of
    its schedule; an arm that costs less in total is taken at its end. None if training starts only after that cost."""

    def change(a: Result, b: Result) -> float | None:
        curve, there = cost_curve(a, measure, with_reference), cost_curve(b, measure, with_reference)
        if curve is None or there is None:
            return None
        value = at(*curve, min(curve[0][-1], there[0][-1]))
        return None if value is None or there[1][-1] is None else value - there[1][-1]

    values = paired(runs, others, change)
    return estimate(values) if values else None


def crossings(runs: Mapping[int, Result], others: Mapping[int, Result], measure: str) -> list[float | None]:
    """For each seed, the fraction of the others' tokens after which the arm first reaches their final loss; None if it
    never does."""
    found = []
    for seed in runs:
        if seed in others and (goal := measure_of(others[seed], measure)) is not None:
            curve = runs[seed]["evaluations"]
            tokens = crossing(curve["tokens"], curve.get(measure, []), goal) if measure in curve else None
            found.append(None if tokens is None else tokens / others[seed]["tokens_seen"])
    return found


def recovered(
    runs: Mapping[int, Result], others: Mapping[int, Result], oracle: Mapping[int, Result], measure: str
) -> Estimate | None:
    """The fraction of the oracle's gain over `others` that an arm achieves, over the seeds that all three have."""
    gains, best = [], []
    for seed in [seed for seed in runs if seed in others and seed in oracle]:
        mine, base, top = (measure_of(arm[seed], measure) for arm in (runs, others, oracle))
        if mine is not None and base is not None and top is not None:
            gains.append(base - mine)
            best.append(base - top)
    return ratio_of_means(gains, best) if gains else None


class Side(NamedTuple):
    """One side of a comparison. seeds: the planned ones. complete: whether all candidates have all their runs."""

    variant: str
    arm: str
    runs: Mapping[int, Result]
    seeds: set[int]
    complete: bool

    def __str__(self) -> str:
        return f"{self.variant} {self.arm}".strip()


def best(recipe: Recipe, by: By, name: str, variants: Sequence[str]) -> Side:
    """An arm; for a group or several variants, the candidate with the lowest mean of the first measure over the seeds
    that all candidates have, or the first candidate if there is no such seed."""
    planned = [
        (variant, arm.name, recipe.seeds_of(arm))
        for variant in variants
        for arm in recipe.members(name)
        if variant in recipe.variants_of(arm.name)
    ]
    complete = len(planned) == 1 or all(seeds <= {*by[variant][arm]} for variant, arm, seeds in planned)
    sides = [Side(variant, arm, by[variant][arm], seeds, complete) for variant, arm, seeds in planned]
    if not sides:
        return Side(variants[0], name, {}, set(), False)
    shared = set[int].intersection(*({*side.runs} for side in sides))

    def mean(side: Side) -> float:
        found = mean_of({seed: side.runs[seed] for seed in shared}, recipe.measures[0])
        return found.mean if found else float("inf")

    return min(sides, key=mean)


def own_schedules(
    lengths: Sequence[Mapping[int, Result]], others: Mapping[int, Result], measure: str
) -> dict[int, float | None]:
    """For each seed, the fraction of the others' tokens that a full schedule needs to end at the others' final value,
    by linear interpolation between runs with schedules of different lengths. None if no length reaches it; if the
    shortest does, its fraction."""
    found = {}
    for seed in others:
        ends = [(runs[seed]["tokens_seen"], measure_of(runs[seed], measure)) for runs in lengths if seed in runs]
        if ends and (goal := measure_of(others[seed], measure)) is not None:
            tokens, values = zip(*sorted(ends), strict=True)
            reached = crossing(tokens, values, goal)
            found[seed] = None if reached is None else reached / others[seed]["tokens_seen"]
    return found


def verdict(recipe: Recipe, by: By, threshold: Threshold) -> Verdict:
    """Whether a claim holds: in every variant that it names, or between the best variants of the two sides; for the
    mean, every seed or the interval, by Threshold.seeds."""
    values, held = {}, []
    variants, measure = list(threshold.variants or recipe.variants_of(threshold.arm)), threshold.measure
    against = threshold.against or recipe.baseline
    plain = not threshold.best_variant and not {threshold.arm, against} & {*recipe.groups}
    for chosen in [variants] if threshold.best_variant else [[variant] for variant in variants]:
        side, other = best(recipe, by, threshold.arm, chosen), best(recipe, by, against, chosen)
        never, wanted = False, side.seeds & other.seeds
        if threshold.comparison == "value":
            found, wanted = mean_of(side.runs, measure), side.seeds
        elif threshold.comparison == "difference":
            found = difference(side.runs, other.runs, measure)
        elif threshold.comparison == "tokens":
            arms = recipe.members(threshold.arm)
            lengths = [by[side.variant][arm.name] for arm in arms]
            shares = own_schedules(lengths, other.runs, measure)
            reached = [share for share in shares.values() if share is not None]
            found, never = estimate(reached) if reached else None, len(reached) < len(shares)
            wanted = other.seeds & set.union(*map(recipe.seeds_of, arms))
        else:
            top = threshold.gain_of or recipe.oracle
            assert top is not None
            found = recovered(side.runs, other.runs, best(recipe, by, top, chosen).runs, measure)
        if found is not None:
            mine = side._replace(arm=threshold.arm) if threshold.comparison == "tokens" else side
            values[side.variant if plain else f"{mine} against {other}"] = found
        complete = side.complete and (other.complete or threshold.comparison == "value")
        if never:
            held.append(False if complete else None)
        else:
            held.append(_holds(threshold, found) if found and complete and len(found.each) == len(wanted) else None)
    met = False if False in held else None if None in held else True
    return Verdict(threshold, met, values)


def _holds(threshold: Threshold, found: Estimate) -> bool | None:
    checked = {"mean": (found.mean,), "every": found.each, "interval": found.t}[threshold.seeds]
    if checked is None:
        return None
    if threshold.at_most is not None:
        return all(value <= threshold.at_most for value in checked)
    assert threshold.at_least is not None
    return all(value >= threshold.at_least for value in checked)
