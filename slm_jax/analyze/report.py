"""The report on training runs: its content as data, and the page that shows it.

`analyze report` fills a Report from run directories, the stage `experiment` from its results. The page shows a sentence
with the tokens that were kept and dropped, what the models write, one table, then target against general loss, loss
over floating-point operations and the share selected from each source; everything else is folded below.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.analyze import plots
from slm_jax.analyze.page import render, script_json, visible
from slm_jax.analyze.plots import Figure, Line, Point
from slm_jax.analyze.tables import Table, number
from slm_jax.files import write_bytes, write_text

Columns = Mapping[str, Sequence[Any]]  # name -> a value for each row; None where it was not measured
SCRIPTS = tuple(f"report_{part}.js.html.j2" for part in ("passages", "figures", "copy"))


class ArmRun(NamedTuple):
    """The curves of one run.

    evaluations: `step` and the numbers of the evaluators, such as `target/loss`. training: `step` and what was logged
    of the steps: `loss`, `learning_rate`, `selected_share/SOURCE`. flops: floating-point operations before the first
    step (scoring, references) and of all its steps; None where they are unknown.
    """

    evaluations: Columns
    training: Columns
    flops: tuple[float, float] | None = None

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], flops: tuple[float, float] | None) -> "ArmRun":
        """From the rows of metrics.jsonl."""

        def columns(part: list[Mapping[str, Any]]) -> Columns:
            names = dict.fromkeys(name for row in part for name in row)
            return {name: [row.get(name) for row in part] for name in names}

        evaluations, training = ([row for row in rows if ("loss" in row) == trained] for trained in (False, True))
        return cls(columns(evaluations), columns(training), flops)


class Arm(NamedTuple):
    """Runs that differ only in their seed: one line of the table and one colour in all figures."""

    name: str
    runs: Sequence[ArmRun]


class ShownToken(NamedTuple):
    """A token of a passage. Losses in nats; kept: None where it takes no part in selection; noise: whether the corpus
    knows that it was injected."""

    text: str
    loss: float | None = None
    reference: float | None = None
    kept: bool | None = None
    noise: bool = False


class Passage(NamedTuple):
    """A document, or the part of it in one row, with the tokens that a run kept at its last checkpoint."""

    source: str
    url: str
    tokens: Sequence[ShownToken]
    run: str = ""


class Writing(NamedTuple):
    """What the models of an arm write. share: of their texts that hold noise, in a few words, or "". texts: (prompt,
    pieces of the continuation), each piece with whether it is noise."""

    arm: str
    share: str
    texts: Sequence[tuple[str, Sequence[tuple[str, bool]]]]


class Report(NamedTuple):
    """A report from top to bottom; empty parts are left out.

    title: of the browser's tab. passages: the first is the picture at the top. writings: side by side. findings:
    (better, worse, same, met, not met or note; a sentence). evidence: paragraphs on what it shows and what not.
    details: further tables. more_figures: shown with them. facts: heading -> (name, value).
    """

    title: str
    heading: str
    intro: Sequence[str]
    table: Table
    passages: Sequence[Passage] = ()
    writings: Sequence[Writing] = ()
    findings: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    evidence: Sequence[str] = ()
    details: Sequence[Table] = ()
    more_figures: Sequence[Figure] = ()
    facts: Mapping[str, Sequence[tuple[str, str]]] = {}


def write_report(folder: str | Path, report: Report) -> None:
    """Writes report.html, which needs no other file, tables/*.md and *.csv, and figures/*.svg and *.png."""
    folder, files = Path(folder), set()
    for group in ("figures", "more_figures"):
        figures = []
        for figure in getattr(report, group):
            while figure.file in files:  # titles that differ only in punctuation
                figure = figure._replace(file=figure.file + "_")
            files.add(figure.file)
            figures.append(figure)
        report = report._replace(**{group: figures})
    for table in (report.table, *report.details):
        if table.file:
            write_text(folder / "tables" / f"{table.file}.md", table.markdown())
            write_text(folder / "tables" / f"{table.file}.csv", table.csv())
    for figure in (*report.figures, *report.more_figures):
        write_text(folder / "figures" / f"{figure.file}.svg", figure.svg)
        write_bytes(folder / "figures" / f"{figure.file}.png", figure.png)
    write_text(folder / "report.html", report_page(report))


def report_page(report: Report) -> str:
    """The report as HTML."""
    tables = [table for table in (report.table, *report.details) if table.file]
    figures = [*report.figures, *report.more_figures]
    data = {
        "copies": {table.file: {"Markdown": table.markdown(), "CSV": table.csv()} for table in tables},
        "hover": {figure.file: figure.hover for figure in figures},
    }
    links = {}  # figure -> ending -> address that holds the file
    for figure in figures:
        png, svg = (base64.b64encode(x).decode("ascii") for x in (figure.png, figure.svg.encode("utf-8")))
        links[figure.file] = {"png": f"data:image/png;base64,{png}", "svg": f"data:image/svg+xml;base64,{svg}"}
    first, *others = [_shown(passage) for passage in report.passages] or [None]
    return render(
        "report.html.j2",
        SCRIPTS,
        report=report,
        first=first,
        others=others,
        links=links,
        data=script_json(data),
    )


def _shown(passage: Passage) -> dict[str, Any]:
    """A passage for the template: shades from 0 to 1 by excess loss, and the words of the readout for each token."""
    both = [(token.loss, token.reference) for token in passage.tokens]
    excess = [None if loss is None or reference is None else loss - reference for loss, reference in both]
    # The shade is full at the 90th percentile of the positive ones: a few outliers would leave the rest pale.
    high = max(np.quantile([x for x in excess if x is not None and x > 0] or [1.0], 0.9), 1e-6)
    tokens = []
    for token, over in zip(passage.tokens, excess, strict=True):
        part = {True: "kept", False: "dropped", None: "out"}[token.kept]
        marks = {part: True, "noise": token.noise, "line": "\n" in token.text}
        words = "takes no part" if token.kept is None else part
        numbers = (number(token.loss, 2), number(token.reference, 2), number(over, 2, signed=True))
        tokens.append(
            {
                "text": visible(token.text),
                "classes": " ".join(name for name, on in marks.items() if on),
                "shade": f"{min(max(over or 0.0, 0.0) / high, 1.0):.2f}",
                "says": "|".join((words + ", noise" * token.noise, *numbers)),
            }
        )

    # ---- The line above the passage: how much was kept, of the noise and of the rest
    shares = []
    has_noise = any(token.noise for token in passage.tokens)
    for noise in (False, True):
        counted = [token.kept for token in passage.tokens if token.kept is not None and token.noise == noise]
        if counted and has_noise:
            shares.append(f"{np.mean(counted):.0%} of the {'noise' if noise else 'other tokens'}")
        elif counted:
            shares.append(f"{np.mean(counted):.0%} of the tokens")
    return {
        "source": passage.source,
        "url": visible(passage.url),
        "run": passage.run,
        "tokens": tokens,
        "kept": " and ".join(shares),
        "has_noise": has_noise,
        "has_out": any(token.kept is None for token in passage.tokens),
    }


# ---- Figures of arms


def arm_figures(
    arms: Sequence[Arm], measures: Sequence[str], where: str = "", counted: str = "Training and scoring"
) -> list[Figure]:
    """The figures of every report, those that the measurements allow: the first measure against the second, both over
    floating-point operations, and the share selected from each source over time.

    measures: of the evaluators, such as ("target/loss", "general/loss"). where: ends the titles, as ", 10 % noise".
    counted: what the operations are those of.
    """
    several = any(len(arm.runs) > 1 for arm in arms)
    found: list[Figure | None] = []

    # ---- One measure against the other
    if len(measures) > 1:
        caption = "At the end of training. Lower left is better on both."
        caption += " Large: mean over seeds; small: each seed." * several
        points = []
        for colour, arm in enumerate(arms):
            ends = []  # of each seed that has both
            for run in arm.runs:
                curves = [[y for y in run.evaluations.get(name, ()) if y is not None] for name in measures[:2]]
                ends += [(curves[0][-1], curves[1][-1])] if all(curves) else []
            points.append(Point(arm.name, ends, colour))
        title = f"{heading(measures[0])} against {heading(measures[1])}{where}"
        found.append(plots.pareto(title, caption, points, (heading(measures[0]), heading(measures[1]))))

    # ---- Each over floating-point operations
    known = [run.flops for arm in arms for run in arm.runs if run.flops]
    # The unit in which the largest number has one to three digits before the point.
    most = max((sum(flops) for flops in known), default=0.0)
    units = {"GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18, "ZFLOP": 1e21}
    unit, per = next(((unit, per) for unit, per in reversed(units.items()) if most >= per), ("GFLOP", 1e9))
    for name in measures:
        lines = []
        for colour, arm in enumerate(arms):
            curves = []
            for run in arm.runs:
                if run.flops and name in run.evaluations:
                    steps = run.evaluations["step"]
                    last = max([*run.training.get("step", ()), *steps], default=0) or 1
                    before, training = run.flops  # the curve begins at what was spent before the first step
                    spent = [(before + training * step / last) / per for step in steps]
                    curves.append((spent, run.evaluations[name]))
            lines.append(mean_line(arm.name, curves, colour))
        caption = f"{counted} counted." + " Mean over seeds; band: lowest to highest." * several
        title = f"{heading(name)} over {unit}{where}"
        found.append(plots.curves(title, caption, [line for line in lines if line], (unit, heading(name))))

    # ---- What was selected
    for arm in arms:
        training = arm.runs[0].training if arm.runs else {}
        names = sorted(name for name in training if name.startswith("selected_share/"))
        lines = [
            Line(name.removeprefix("selected_share/"), training["step"], training[name], colour)
            for colour, name in enumerate(names)
        ]
        caption = "Share of each source's tokens that trained: faint per step, bold a running mean."
        caption += " First seed." * (len(arm.runs) > 1)
        title = f"Selected by source, {arm.name}{where}"
        found.append(plots.curves(title, caption, lines, ("step", "share selected"), smooth=True))
    return [figure for figure in found if figure]


def over_steps(
    arms: Sequence[Arm], name: str, title: str, caption: str, axes: tuple[str, str], smooth: bool
) -> Figure | None:
    """A number of the evaluators or of training over the steps, one line for each arm: the mean over its seeds."""
    lines = []
    for colour, arm in enumerate(arms):
        tables = [table for run in arm.runs for table in (run.evaluations, run.training) if name in table]
        if line := mean_line(arm.name, [(table["step"], table[name]) for table in tables], colour):
            lines.append(line)
    return plots.curves(title, caption, lines, axes, smooth)


def mean_line(label: str, runs: Sequence[tuple[Any, Any]], colour: int) -> Line | None:
    """The mean over seeds of curves (x, y), with its range.

    Each seed is interpolated to every x that any seed has. After the end of a seed the mean is over the remaining ones,
    so that no curve is cut to the shortest.
    """
    curves = [(np.asarray(x, float), np.asarray(y, float)) for x, y in runs]
    curves = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return None
    at = np.unique(np.concatenate([x for x, _ in curves]))
    values = np.stack([np.interp(at, x, y, left=np.nan, right=np.nan) for x, y in curves])  # [seeds, points]
    if len(curves) == 1:
        return Line(label, at.tolist(), values[0].tolist(), colour)
    low, high = np.nanmin(values, axis=0).tolist(), np.nanmax(values, axis=0).tolist()
    return Line(label, at.tolist(), np.nanmean(values, axis=0).tolist(), colour, low, high)


def heading(measure: str) -> str:
    """`target/bits_per_byte` as words."""
    return measure.replace("/", " ").replace("_per_", " per ").replace("_", " ")
