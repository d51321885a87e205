"""The report of an experiment: report.html, results.md and summary.json."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.analyze import report as report_lib
from slm_jax.analyze.page import visible
from slm_jax.analyze.plots import Figure
from slm_jax.analyze.report import ArmRun, Passage, Report, ShownToken, Writing, arm_figures
from slm_jax.analyze.tables import NOTHING, Cell, Table, kind_of, number
from slm_jax.experiment import findings
from slm_jax.experiment.findings import By, Verdict
from slm_jax.experiment.intervals import Estimate
from slm_jax.experiment.recipe import Recipe, Threshold
from slm_jax.experiment.worlds.plant import noise_in
from slm_jax.files import write_json, write_text

Runs = Mapping[int, findings.Result]
MAIN_FIGURES = 4  # shown before the details
WRITTEN = 3  # texts of each arm that are shown
MET = {True: "met", False: "not met", None: "not run"}
SELECTION = ("planted", "recall", "precision")
INTERVALS = (
    "Paired by seed. In brackets: 95 % interval by Student's t; then by bootstrap over the seeds, which is too narrow "
    "where they are few."
)


def write_report(folder: Path, recipe: Recipe, results: Mapping[str, findings.Result], total: int) -> dict[str, Any]:
    """Writes the three files from the results that are there; returns the summary."""
    by = findings.grouped(recipe, list(results.values()))
    verdicts = [findings.verdict(recipe, by, threshold) for threshold in recipe.thresholds]
    tables = [table for table in _tables(recipe, by) if table.rows]
    summary = summary_of(recipe, by, verdicts, total)
    write_json(folder / "summary.json", summary)
    write_text(folder / "results.md", _markdown(recipe, by, verdicts, tables, total))
    first, *others = tables
    figures = list(_figures(recipe, by))
    report = Report(
        title=f"slm_jax: {recipe.name}",
        heading=recipe.question,
        intro=[_progress(by, total)],
        table=first,
        passages=_passages(by),
        writings=_writings(recipe, by),
        findings=[(MET[each.met], _sentence(each)) for each in verdicts],
        figures=figures[:MAIN_FIGURES],
        evidence=[*filter(None, [recipe.evidence]), *recipe.sources],
        details=others,
        more_figures=figures[MAIN_FIGURES:],
        facts={"Made with": _facts(by)},
    )
    report_lib.write_report(folder, report)
    return summary


def summary_of(recipe: Recipe, by: By, verdicts: Sequence[Verdict], total: int) -> dict[str, Any]:
    """All numbers of the report: variant -> arm -> measure, comparison with the baseline, cost, selection."""
    first = recipe.measures[0]
    found: dict[str, Any] = {}
    for variant, arms in by.items():
        base = arms[recipe.baseline]
        for arm, runs in arms.items():
            if not runs:
                continue
            row: dict[str, Any] = {"seeds": sorted(runs)}
            row["measures"] = {name: _plain(findings.mean_of(runs, name)) for name in recipe.measures}
            row["cost"] = _mean_cost(runs)
            if arm != recipe.baseline:
                row["difference"] = {name: _plain(findings.difference(runs, base, name)) for name in recipe.measures}
                row["equal_flops"] = {
                    "scoring counted": _plain(findings.equal_cost(runs, base, first, False)),
                    "scoring and reference counted": _plain(findings.equal_cost(runs, base, first, True)),
                }
                row["reaches_baseline_at_share_of_tokens"] = findings.crossings(runs, base, first)
            if recipe.oracle and arm not in (recipe.oracle, recipe.baseline):
                row["recovered"] = _plain(findings.recovered(runs, base, arms[recipe.oracle], first))
            selection = {name: _plain(findings.mean_of(runs, f"selected/{name}")) for name in SELECTION}
            row |= {"selection": selection} if selection["recall"] else {}
            found.setdefault(variant, {})[arm] = row
    return {
        "recipe": recipe.name,
        "question": recipe.question,
        "runs": sum(len(runs) for arms in by.values() for runs in arms.values()),
        "runs_planned": total,
        "baseline": recipe.baseline,
        "verdicts": [
            {
                "name": each.threshold.name,
                "claim": each.threshold.claim,
                "verdict": MET[each.met],
                "bound": {"at_most": each.threshold.at_most, "at_least": each.threshold.at_least},
                "values": {variant: _plain(value) for variant, value in each.values.items()},
            }
            for each in verdicts
        ],
        "variants": found,
    }


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    if value is None:
        return None
    rounded = {name: [round(x, 6) for x in item] for name, item in value._asdict().items() if isinstance(item, tuple)}
    return {"mean": round(value.mean, 6), "t": None, "bootstrap": None} | rounded


def _mean_cost(runs: Runs) -> dict[str, Any]:
    """Means over the seeds; None if one is not known."""
    costs: dict[str, Any] = {}
    for name in ("steps", "tokens_seen", "tokens_trained", "train_seconds"):
        costs[name] = float(np.mean([result[name] for result in runs.values()]))
    for name in ("training", "scoring", "reference"):
        values = [result["flops"][name] for result in runs.values()]
        costs[f"flops_{name}"] = None if None in values else float(np.mean(values))
    return costs


def _progress(by: By, total: int) -> str:
    done = sum(len(runs) for arms in by.values() for runs in arms.values())
    return f"{done} of {total} runs are done." if done < total else f"All {total} runs are done."


def _sentence(found: Verdict) -> str:
    """The claim, its bound, and what was found."""
    threshold = found.threshold
    bound = threshold.at_most if threshold.at_most is not None else threshold.at_least
    assert bound is not None
    least = "at most" if threshold.at_most is not None else "at least"
    of = {"mean": "the mean", "every": "every seed", "interval": "the interval"}[threshold.seeds]
    share, signed = _is_share(threshold), threshold.comparison == "difference"
    values = [
        f"{variant + ': ' if variant else ''}{_estimate(value, 3, signed, share)}"
        for variant, value in found.values.items()
    ]
    wanted = f"{100 * bound if share else bound:g}{_unit(signed, share)}".replace("-", "−")
    return f"{threshold.claim}. Required: {least} {wanted} for {of}. Found: {'; '.join(values) or NOTHING}."


def _is_share(threshold: Threshold) -> bool:
    return threshold.comparison == "recovered" or is_share(threshold.measure)


def is_share(measure: str) -> bool:
    """Whether a measure is a share of something, shown in percent."""
    return measure.startswith(("noisy/", "selected/")) or measure.endswith("/accuracy")


def heading(measure: str) -> str:
    """The heading for a measure."""
    if measure.startswith("noisy/"):
        return f"{measure.removeprefix('noisy/')} that hold noise"
    return report_lib.heading(measure)


def _unit(signed: bool, share: bool) -> str:
    return (" points" if signed else " %") if share else ""


def _number(value: float, digits: int, signed: bool, share: bool) -> str:
    return number(100 * value, 0, signed) if share else number(value, digits, signed)


def _estimate(value: Estimate | None, digits: int = 3, signed: bool = False, share: bool = False) -> str:
    """Mean and intervals; shares are in percent, differences of shares in percentage points."""
    if value is None:
        return NOTHING
    text = _number(value.mean, digits, signed, share)
    for interval in (value.t, value.bootstrap):
        if interval is not None:
            low, high = (_number(end, digits, signed, share) for end in interval)
            text += f" [{low}, {high}]"
    return text + _unit(signed, share)


class Row(NamedTuple):
    """An arm that has results, and those of the baseline in its variant."""

    label: str
    arm: str
    runs: Runs
    base: Runs
    oracle: Runs


def _rows(recipe: Recipe, by: By) -> Iterator[Row]:
    labels = {arm.name: arm.label or arm.name for arm in recipe.arms}
    for variant, arms in by.items():
        oracle = arms[recipe.oracle] if recipe.oracle else {}
        for arm, runs in arms.items():
            label = f"{variant}: {labels[arm]}" if variant else labels[arm]
            if runs:
                yield Row(label, arm, runs, arms[recipe.baseline], oracle)


def _tables(recipe: Recipe, by: By) -> Iterator[Table]:
    rows = list(_rows(recipe, by))
    compared = [row for row in rows if row.arm != recipe.baseline]
    headings, first = [heading(name) for name in recipe.measures], recipe.measures[0]

    def arm_cells(row: Row) -> list[Cell]:
        seeds = Cell(str(len(row.runs)), value=len(row.runs))
        return [seeds, *(_cell(row.runs, row.base, name) for name in recipe.measures)]

    note = f"Means over seeds, lowest and highest; small: difference to {recipe.baseline}. Losses in nats per token."
    yield Table("Arms", ["arm", "seeds", *headings], [(row.label, arm_cells(row)) for row in rows], note, "arms")

    def differences(row: Row) -> list[Cell]:
        changes = [(findings.difference(row.runs, row.base, name), is_share(name)) for name in recipe.measures]
        return [_difference_cell(change, share) for change, share in changes]

    title = f"Differences to {recipe.baseline} at equal tokens"
    if any(len(row.runs) > 1 for row in compared):  # with one seed they are in the first table
        yield Table(title, ["arm", *headings], [(r.label, differences(r)) for r in compared], INTERVALS, "differences")

    def costs(row: Row) -> list[Cell]:
        equal = [findings.equal_cost(row.runs, row.base, first, reference) for reference in (False, True)]
        reached = findings.crossings(row.runs, row.base, first)
        crossed = ", ".join("never" if share is None else f"{share:.0%}" for share in reached)
        return [*map(_difference_cell, equal), Cell(crossed), *_cost_cells(row.runs)]

    columns = ["arm", "scoring counted", "and reference", "tokens to its end", "TFLOP training", "scoring", "reference"]
    note = (
        f"Difference to {recipe.baseline} where it ends, in operations: an arm that pays for scoring or a reference is "
        "read off there in the middle of its schedule. Tokens: the share of the baseline's after which the arm's curve "
        "first reaches the baseline's final value, for each seed."
    )
    yield Table(f"{first} at equal cost", columns, [(row.label, costs(row)) for row in compared], note, "costs")

    yield from _groups(recipe, by)

    gains = {r.label: findings.recovered(r.runs, r.base, r.oracle, first) for r in compared if r.arm != recipe.oracle}
    cells = [(label, [Cell(_estimate(gain, share=True), value=gain.mean)]) for label, gain in gains.items() if gain]
    note = "Mean gain over the oracle's mean gain; brackets: Fieller's interval, then bootstrap."
    yield Table(f"Share of the oracle's gain in {first}", ["arm", "recovered"], cells, note, "recovered")

    kept = [(r.label, [findings.mean_of(r.runs, f"selected/{name}") for name in SELECTION]) for r in rows]
    cells = [(label, [Cell(_percent(x), value=x.mean) for x in values if x]) for label, values in kept if all(values)]
    columns = ["arm", "kept of planted tokens", "of all others (recall)", "not planted, of the kept (precision)"]
    yield Table("What selection keeps", columns, cells, "Over the second half of the run.", "selection")


def _groups(recipe: Recipe, by: By) -> Iterator[Table]:
    """The best of each group in each variant; of a group whose arms differ in length, the tokens that it needs."""
    bests, lengths = [], []
    for variant, name in itertools.product(by, recipe.groups):
        side, base = findings.best(recipe, by, name, [variant]), by[variant][recipe.baseline]
        if not side.runs:
            continue
        label = f"{variant}: {name}" if variant else name
        cells = [_cell(side.runs, base, measure) for measure in recipe.measures]
        bests.append((label, [Cell(side.arm), *cells]))
        members = [by[variant][arm.name] for arm in recipe.members(name)]
        if len({result["tokens_seen"] for runs in members for result in runs.values()}) > 1:
            shares = findings.own_schedules(members, base, recipe.measures[0]).values()
            lengths.append((label, [Cell(", ".join("never" if x is None else f"{x:.0%}" for x in shares))]))
    headings = [heading(measure) for measure in recipe.measures]
    note = f"The arm with the lowest mean {recipe.measures[0]}; small: difference to {recipe.baseline}."
    yield Table("Best of several", ["of", "best", *headings], bests, note, "groups")
    title = f"Tokens to the end of {recipe.baseline}, by schedules of their own"
    note = (
        f"Share of the tokens of {recipe.baseline}, for each seed, at which runs with full schedules of different "
        "lengths end where it ends; between two lengths on a straight line, and not below the shortest length."
    )
    yield Table(title, ["arms", "share"], lengths, note, "lengths")


def _writings(recipe: Recipe, by: By) -> list[Writing]:
    """What the models of the first seed write side by side, in the variant whose baseline writes the most noise."""
    written = {
        variant: {arm: texts for arm, runs in arms.items() if (texts := list(filter(None, map(_texts, runs.values()))))}
        for variant, arms in by.items()
    }  # variant -> arm -> texts of each seed
    noisy = {
        variant: {arm: float(np.mean([found["noisy"] or 0.0 for found in texts])) for arm, texts in arms.items()}
        for variant, arms in written.items()
    }
    shown = max(by, key=lambda variant: noisy[variant].get(recipe.baseline, -1.0))
    labels = {arm.name: arm.label or arm.name for arm in recipe.arms}
    writings = []
    for arm, texts in written[shown].items():
        count = sum(found["texts"] for found in texts)
        # Without noise in any text there is nothing to count.
        said = f"{100 * noisy[shown][arm]:.0f} % of {count:,} samples hold noise" if any(noisy[shown].values()) else ""
        pairs = [(text.get("prompt") or "", _pieces(text["text"])) for text in texts[0]["shown"]]
        label = f"{labels[arm]}, {shown}" if shown else labels[arm]
        writings.append(Writing(label, said, pairs[:: max(1, len(pairs) // WRITTEN)][:WRITTEN]))
    return writings


def _texts(result: findings.Result) -> dict[str, Any] | None:
    """Of the first evaluator that continued prompts: how many texts, the share with noise, and some of them."""
    found = [each for each in result["samples"].values() if each["shown"] and "answer" not in each["shown"][0]]
    return found[0] if found else None


def _pieces(text: str) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is noise by the generator's grammar."""
    pieces, last = [], 0
    for start, end in noise_in(text):
        if start >= last:
            pieces += [(text[last:start], False), (text[start:end], True)]
            last = end
    return [(visible(piece), noise) for piece, noise in [*pieces, (text[last:], False)] if piece]


def _percent(value: Estimate) -> str:
    return f"{value.mean:.1%}"


def _cell(runs: Runs, base: Runs, name: str) -> Cell:
    value, change = findings.mean_of(runs, name), findings.difference(runs, base, name)
    if value is None:
        return Cell(NOTHING)
    share = is_share(name)
    unit = _unit(signed=False, share=share)
    cell = Cell(_number(value.mean, 3, False, share) + unit, value=value.mean)
    if len(value.each) > 1:
        low, high = min(value.each), max(value.each)
        shown = f"{_number(low, 3, False, share)} to {_number(high, 3, False, share)}{unit}"
        cell = cell._replace(spread=(low, high), range=shown)
    if change is None or runs is base:
        return cell
    lower_is_better = name.startswith("noisy/") or "loss" in name or "bits" in name
    kind = kind_of(change.mean if lower_is_better else -change.mean)
    return cell._replace(change=_number(change.mean, 3, True, share) + _unit(True, share), kind=kind)


def _difference_cell(value: Estimate | None, share: bool = False) -> Cell:
    return Cell(_estimate(value, signed=True, share=share), value=value.mean if value else None)


def _cost_cells(runs: Runs) -> list[Cell]:
    values = [_mean_cost(runs)[f"flops_{name}"] for name in ("training", "scoring", "reference")]
    return [Cell(NOTHING) if value is None else Cell(number(value / 1e12, 2), value=value / 1e12) for value in values]


def _figures(recipe: Recipe, by: By) -> Iterator[Figure]:
    labels = {arm.name: arm.label or arm.name for arm in recipe.arms}
    measures = [name for name in recipe.measures if "loss" in name]
    for variant, arms in by.items():
        shown = []
        for arm, runs in arms.items():
            # Without the loss before the first step, which is the same everywhere and would take most of the figures.
            curves = [
                (r, {name: x[1:] if len(x) > 2 else x for name, x in r["evaluations"].items()}) for r in runs.values()
            ]
            each = [ArmRun(evaluations, r["training"], findings.cost(r, True)) for r, evaluations in curves]
            shown += [report_lib.Arm(labels[arm], each)] if each else []
        counted = "Training, scoring and the training of the reference"
        yield from arm_figures(shown, measures, f", {variant}" if variant else "", counted)


def _passages(by: By) -> list[Passage]:
    """Those of the first result that has any."""
    for runs in (runs for arms in by.values() for runs in arms.values() if runs):
        if stored := runs[min(runs)].get("passages"):
            return [
                Passage(**about | {"tokens": [ShownToken(*token) for token in about["tokens"]]}) for about in stored
            ]
    return []


def _facts(by: By) -> list[tuple[str, str]]:
    results = [result for arms in by.values() for runs in arms.values() for result in runs.values()]
    values = {name: sorted({str(result[name]) for result in results}) for name in ("commit", "device", "parameters")}
    return [(name, ", ".join(value)) for name, value in values.items()]


def _markdown(recipe: Recipe, by: By, verdicts: Sequence[Verdict], tables: Sequence[Table], total: int) -> str:
    lines = [f"# {recipe.name}: {recipe.question}", "", _progress(by, total), ""]
    lines += [*([recipe.evidence, ""] if recipe.evidence else []), *(f"- {source}" for source in recipe.sources), ""]
    lines += [f"- **{MET[each.met]}**: {_sentence(each)}" for each in verdicts] + [""]
    for table in tables:
        lines += [f"## {table.title}", "", table.markdown(), table.note, ""]
    lines += [f"{name}: {value}  " for name, value in _facts(by)]
    return "\n".join(lines) + "\n"
