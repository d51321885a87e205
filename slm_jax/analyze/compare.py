"""Stage `analyze report`: train runs side by side, as a page, tables and figures."""

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
import numpy as np

from slm_jax import config as config_lib
from slm_jax.analyze import describe
from slm_jax.analyze.curves import Drawing, Line, drawing
from slm_jax.analyze.report import Figure, Report, leaves, report_page
from slm_jax.analyze.runs import Group, Run, group_seeds, read_run, short_names
from slm_jax.analyze.tables import NOTHING, Cell, Table, kind_of, number
from slm_jax.errors import UserError
from slm_jax.evaluate.flops import Flops
from slm_jax.files import write_text

MAIN_TABLES = 3  # before the figures: what runs were, their losses, what they cost


@gin.configurable
def analyze_report(runs: Sequence[str] = (), output: str = "report") -> None:
    """Compares train runs: `slm-jax analyze report RUN [RUN ...]`. It reads what the runs wrote and computes nothing
    anew.

    Runs that differ only in their seed are shown as a mean with lowest and highest: runs with equal settings, and runs
    of one name and plan in seed folders (`a/x`, `a/seed1/x`). Differences are relative to the first run named.
    Unfinished and resumed runs are included and marked.

    Args:
      runs: run directories, given after the stage.
      output: folder for the self-contained report.html, tables/*.md and *.csv, figures/*.svg and *.png.
    """
    if not runs:
        raise UserError("no runs to compare: name run directories behind `analyze report`")
    config_lib.print_unused()
    read = [read_run(run) for run in dict.fromkeys(runs)]
    groups = group_seeds(read)
    print(f"report: {', '.join(group.label for group in groups)} -> {output}/report.html")
    drawn = list(_drawings(groups))
    tables = _tables(groups, read)
    for table in tables:
        for kind, text in (("md", table.markdown()), ("csv", table.csv())):
            if table.file:
                write_text(Path(output) / "tables" / f"{table.file}.{kind}", text)
    (Path(output) / "figures").mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        (Path(output) / "figures" / f"{figure.file}.png").write_bytes(figure.drawing.png)
        write_text(Path(output) / "figures" / f"{figure.file}.svg", figure.drawing.svg)
    report = Report(
        title=f"slm_jax: {', '.join(group.name for group in groups)}",
        heading=f"{len(read)} training run{'s' * (len(read) > 1)}",
        intro=_intro(groups, read),
        tables=tables[:MAIN_TABLES],
        more_tables=tables[MAIN_TABLES:],
        figures=[_figure(figure) for figure in drawn],
        facts={group.label: list(_facts(group)) for group in groups},
    )
    write_text(Path(output) / "report.html", report_page(report))
    print(f"report: done; open {output}/report.html")


def _intro(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    words = ["Losses are in nats per token, lower is better."]
    if len(groups) > 1:
        words.append(f"Small numbers are differences to {groups[0].name}.")
    if any(len(group.runs) > 1 for group in groups):
        words.append("Where runs differ only in their seed, a number is their mean, with the lowest and the highest.")
    paragraphs = [" ".join(words)]
    unfinished = [f"{run.path} ({run.state()})" for run in runs if not run.finished]
    if unfinished:
        paragraphs.append(f"Not finished, so their numbers are those of fewer steps: {', '.join(unfinished)}.")
    return paragraphs


def _tables(groups: Sequence[Group], runs: Sequence[Run]) -> list[Table]:
    tables = [_plans(groups), _losses(groups), _costs(groups), _by_source(groups)]
    if len(runs) > len(groups):
        names = short_names([run.path for run in runs])
        alone = [Group(name, [run]) for name, run in zip(names, runs, strict=True)]
        tables.append(_losses(alone, "Losses of every run", "losses_of_runs", compared=False))
    return [table for table in tables if table.rows]


def _plans(groups: Sequence[Group]) -> Table:
    """A line for each phase of each group."""
    rows = []
    for group in groups:
        first = group.runs[0]
        seeds = ", ".join(str(run.seed) for run in group.runs)
        for index, phase in enumerate(first.settings["phases"]):
            rate = phase.get("schedule") or (first.settings.get("schedule") if index == 0 else None)
            name = group.name if len(first.settings["phases"]) == 1 else f"{group.name}, phase {index}"
            words = (
                seeds,
                "; ".join(dict.fromkeys(run.state() for run in group.runs)),
                f"{phase['steps']:,} of {phase['batch_size']} rows",
                describe.mixture(phase),
                describe.objective(phase),
                describe.schedule(rate) or "goes on",
            )
            rows.append((name, [Cell(word) for word in words]))
    headings = ["run", "seed", "state", "steps", "rows from", "trains on", "learning rate"]
    return Table("What they were", headings, rows, file="runs", words=True)


class Measure(NamedTuple):
    """A column of a table: what a run says, how many digits are shown, whether groups are compared in it."""

    heading: str
    of: Callable[[Run], float | None]
    digits: int
    compared: bool = False
    unit: float = 1.0


def _losses(groups: Sequence[Group], title: str = "Losses", file: str = "losses", compared: bool = True) -> Table:
    """Last values of the evaluators, not by source, and the training loss of the last tenth of the steps."""
    runs = [run for group in groups for run in group.runs]
    found = [run.evaluations() for run in runs]
    named = list(dict.fromkeys(name for values in found for name in values if _of_all_sources(name)))
    losses = [Measure(_heading(name), _evaluated(name), 3, compared and "/loss" in name) for name in named]
    training = [Measure("training loss", lambda run: run.training_losses().get(""), 3, compared)]
    note = "Training loss: of all tokens of the batches, selected or not, over the last tenth of the logged steps."
    return _table(title, groups, losses + training, note, file)


def _heading(name: str) -> str:
    return name.replace("/", " ").replace("_per_", " per ")


def _of_all_sources(name: str) -> bool:
    """`target/loss` and `target/bits_per_byte`, but not `target/loss/web`."""
    return name.split(" (")[0].count("/") == 1


def _evaluated(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.evaluations().get(name)


def _costs(groups: Sequence[Group]) -> Table:
    measures = [
        Measure("steps", lambda run: run.done, 0),
        Measure("tokens seen", lambda run: run.counters.get("tokens_seen"), 0),
        Measure("tokens trained", lambda run: run.counters.get("tokens_trained"), 0),
        Measure("seconds", lambda run: run.counters.get("seconds"), 0),
        Measure("TFLOP training", lambda run: run.flops.training, 3, unit=1e12),
        Measure("TFLOP scoring", lambda run: run.flops.scoring, 3, unit=1e12),
        Measure("TFLOP, both", lambda run: _both(run.flops), 3, unit=1e12),
        Measure("TFLOP training of the reference", lambda run: run.flops.reference, 3, unit=1e12),
    ]
    note = (
        "Tokens are those that have a loss. Seconds are those of the training steps, compilation included, evaluations "
        "not; of an unfinished run, up to its last checkpoint. FLOP follow from the model's shape, recomputation left "
        "out; scoring is one forward pass of the reference over the rows selected from, each row once. "
        f"{NOTHING}: not known, because a corpus or a reference is not where it was."
    )
    return _table("What they cost", groups, measures, note, "costs")


def _both(flops: Flops) -> float | None:
    return None if flops.training is None or flops.scoring is None else flops.training + flops.scoring


def _by_source(groups: Sequence[Group]) -> Table:
    """A line for each source, a column for each group: training losses, then every evaluator's."""
    runs = [run for group in groups for run in group.runs]
    training = dict.fromkeys(name for run in runs for name in run.training_losses() if name)
    evaluated = dict.fromkeys(name for run in runs for name in run.evaluations() if "/loss/" in name)
    lines: dict[str, Callable[[Run], float | None]] = {
        f"training, {name}": lambda run, name=name: run.training_losses().get(name) for name in training
    }
    lines |= {name.replace("/loss/", ", "): _evaluated(name) for name in evaluated}
    rows = []
    for name, of in lines.items():
        measure = Measure(name, of, 3, compared=True)
        rows.append((name, [_cell(group, groups[0], measure) for group in groups]))
    return Table("Losses by source", ["source", *(group.label for group in groups)], rows, file="losses_by_source")


def _table(title: str, groups: Sequence[Group], measures: Sequence[Measure], note: str, file: str) -> Table:
    shown = [measure for measure in measures if any(group.numbers(measure.of) for group in groups)]
    rows = [(group.label, [_cell(group, groups[0], measure) for measure in shown]) for group in groups]
    return Table(title, ["run", *(measure.heading for measure in shown)], rows, note, file)


def _cell(group: Group, baseline: Group, measure: Measure) -> Cell:
    """The mean over a group's seeds, their range, and the difference to the baseline's mean."""
    numbers = [value / measure.unit for value in group.numbers(measure.of)]
    if not numbers:
        return Cell(NOTHING)
    mean = float(np.mean(numbers))
    cell = Cell(number(mean, measure.digits), value=mean)
    if len(numbers) > 1:
        spread = (min(numbers), max(numbers))
        low, high = (number(value, measure.digits) for value in spread)
        cell = cell._replace(spread=spread, range=f"{low} to {high}" if low != high else "")
    there = [value / measure.unit for value in baseline.numbers(measure.of)]
    if measure.compared and group is not baseline and there:
        change = mean - float(np.mean(there))
        cell = cell._replace(change=number(change, measure.digits, signed=True), kind=kind_of(change))
    return cell


class Drawn(NamedTuple):
    title: str
    caption: str
    file: str
    drawing: Drawing


def _drawings(groups: Sequence[Group]) -> Iterator[Drawn]:
    names = dict.fromkeys(
        name for group in groups for run in group.runs for row in run.rows for name in row if name.endswith("/loss")
    )
    seeds = any(len(group.runs) > 1 for group in groups)
    caption = "Loss of the evaluator" + ("; the band is from the lowest to the highest seed." if seeds else ".")
    for name in names:
        yield from _drawn(
            name.removesuffix("/loss"), caption, [_line(group, name, i) for i, group in enumerate(groups)]
        )
    caption = (
        "Loss on the tokens of the batches: faint as measured, bold a running mean" + "; means over seeds." * seeds
    )
    caption = caption.rstrip(".") + "."
    training = [_line(group, "loss", i) for i, group in enumerate(groups)]
    yield from _drawn("Training", caption, training, smooth=True)
    for group in groups:
        fields = (("selected_loss", "selected", 3), ("unselected_loss", "unselected", 4), ("loss", "all", 5))
        parts = [_line(group, field, colour)._replace(label=label) for field, label, colour in fields]
        if len(parts[0].values):
            yield from _drawn(f"Selected and unselected, {group.name}", caption, parts, smooth=True)
    rates = [_line(group, "learning_rate", i) for i, group in enumerate(groups)]
    yield from _drawn("Learning rate", "As it was used.", rates, axes=("step", "learning rate"))


def _drawn(title: str, caption: str, lines: Sequence[Line], **settings: Any) -> Iterator[Drawn]:
    if found := drawing(f"{title} over steps, one line for each run", lines, **settings):
        yield Drawn(title, caption, re.sub(r"\W+", "_", title.lower()).strip("_"), found)


def _line(group: Group, name: str, colour: int) -> Line:
    """The mean over the seeds at the steps that all of them have, and their range."""
    curves = [dict(zip(*run.curve(name), strict=True)) for run in group.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves], float)
    if len(curves) == 1:
        return Line(group.name, steps, values[0].tolist(), colour)
    low, high = values.min(axis=0).tolist(), values.max(axis=0).tolist()
    return Line(group.name, steps, values.mean(axis=0).tolist(), colour, low, high)


def _figure(drawn: Drawn) -> Figure:
    links = {
        "PNG": "data:image/png;base64," + base64.b64encode(drawn.drawing.png).decode("ascii"),
        "SVG": "data:image/svg+xml;base64," + base64.b64encode(drawn.drawing.svg.encode("utf-8")).decode("ascii"),
    }
    return Figure(drawn.title, drawn.caption, drawn.drawing.inline, links, drawn.file)


def _facts(group: Group) -> Iterator[tuple[str, str]]:
    """What is the same in all runs of a group once, the rest for each of them."""
    found = [dict(leaves({"directory": run.path, **describe.facts(run)})) for run in group.runs]
    for name in found[0]:
        yield name, "; ".join(dict.fromkeys(facts[name] for facts in found))
