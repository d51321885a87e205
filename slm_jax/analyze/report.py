"""One HTML file that shows what a comparison of runs found: numbers, curves, and text shaded by selection."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.analyze.curves import Line, curve_svg
from slm_jax.analyze.page import render, script_json, visible
from slm_jax.analyze.tables import Cell, Table, kind_of, number
from slm_jax.files import write_text

# Row in the table of runs: (field of the summary, heading, digits, whether the difference to causal is shown).
COLUMNS = (
    ("target_loss", "target loss", 3, True),
    ("target_bits_per_byte", "bits per byte", 3, False),
    ("general_loss", "general loss", 3, True),
    ("tokens_seen", "tokens seen", 0, False),
    ("tokens_trained", "tokens trained", 0, False),
    ("steps", "steps", 0, False),
    ("seconds", "seconds", 0, False),
)

VERDICT = {"better": "better than", "worse": "worse than", "same": "equal to"}


INTRO = (
    "A reference model, trained on clean text, gave every token of a corpus a loss. The runs below then trained on the "
    "corpus and differ in which of its tokens count: causal takes them all, selective those whose loss exceeds the "
    "reference's the most, random as many by chance."
)


class Figure(NamedTuple):
    """svg: stands in the page. links: kind of file -> address that holds it; file: its name without the ending."""

    title: str
    caption: str
    svg: str
    links: Mapping[str, str] = {}
    file: str = ""


class Report(NamedTuple):
    """What stands in a report, from top to bottom; what is empty is left out.

    findings: (better, worse, same or note; a sentence). kept: shares as bars. passages: as of `write_report`. facts:
    heading -> (name, value).
    """

    title: str
    heading: str
    intro: Sequence[str]
    tables: Sequence[Table] = ()
    findings: Sequence[tuple[str, str]] = ()
    kept: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Figure] = ()
    more_tables: Sequence[Table] = ()
    passages: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Sequence[tuple[str, str]]] = {}


def report_page(report: Report) -> str:
    """The report as HTML that needs nothing else."""
    files = [table for table in (*report.tables, *report.more_tables) if table.file]
    copies = {table.file: {"Markdown": table.markdown(), "CSV": table.csv()} for table in files}
    scripts = ["report_passages.js.html.j2"] * bool(report.passages) + ["report_copy.js.html.j2"] * bool(copies)
    return render("report.html.j2", scripts, report=report, copies=script_json(copies) if copies else "")


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Any]],
    passages: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the page about a demo: no script, style, font or image comes from elsewhere.

    summary: what `summary.json` of a comparison holds; a number that was not measured is None.
    curves: for each run `steps` with `target_loss` and `general_loss`, `train_steps` with `loss`, `selected_loss` and
      `unselected_loss`; lists that are missing, and values that are None, are left out.
    passages: `{"title", "url", "source", "tokens"}`; each token has `text`, `loss`, `ref_loss`, `excess`, `selected`
      (share of the evaluations in which it was selected), `valid` (whether it takes part), `noise` (None when unknown).
    """
    report = Report(
        title=f"slm_jax: {', '.join(summary['runs'])}",
        heading="Which tokens a model trains on",
        intro=[INTRO],
        tables=[_table(summary["runs"])],
        findings=list(_findings(summary)),
        kept=_kept(summary.get("selection") or {}),
        figures=[figure for figure in _figures(curves) if figure.svg],
        passages=[_passage(passage) for passage in passages],
        facts={name.capitalize(): list(leaves(summary.get(name) or {})) for name in ("corpus", "reference")},
    )
    write_text(path, report_page(report))


def _difference(values: Mapping[str, Any], baseline: Mapping[str, Any], field: str) -> float | None:
    here, there = values.get(field), baseline.get(field)
    if here is None or there is None or not math.isfinite(here - there):
        return None
    return here - there


def _baseline(name: str, runs: Mapping[str, Any]) -> str:
    """The run that another is compared with: `causal`, or `continual_causal` for those that begin where it began."""
    return "continual_causal" if name.startswith("continual_") and "continual_causal" in runs else "causal"


def _table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, values in runs.items():
        baseline = _baseline(name, runs)
        cells = []
        for field, _, digits, compared in COLUMNS:
            change = _difference(values, runs.get(baseline, {}), field) if compared and name != baseline else None
            signed = ("", "") if change is None else (number(change, digits, signed=True), kind_of(change))
            cells.append(Cell(number(values.get(field), digits), *signed))
        rows.append((name, cells))
    note = "Losses in nats per token, lower is better; small: the difference to causal, for continual runs to "
    return Table("Runs", ["run", *(heading for _, heading, _, _ in COLUMNS)], rows, f"{note}continual_causal.")


def _findings(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(better, worse or note; a sentence) for what the numbers say, favourable or not."""
    runs = summary["runs"]
    reached = {
        name: steps for key in summary if key.startswith("steps_to_") for name, steps in (summary[key] or {}).items()
    }
    for name, values in runs.items():
        baseline = _baseline(name, runs)
        causal = runs.get(baseline, {})
        for field, text in (("target_loss", "the target text"), ("general_loss", "general text")):
            change = _difference(values, causal, field)
            if name != baseline and change is not None:
                yield (
                    kind_of(change),
                    f"{name} is {VERDICT[kind_of(change)]} {baseline} on {text}: "
                    f"{number(values[field], 3)} against {number(causal[field], 3)} nats per token "
                    f"({number(change, 3, signed=True)}).",
                )
        steps, total = reached.get(name), causal.get("steps")
        if steps and total:
            yield (
                "better" if steps < total else "note",
                f"{name} reaches {baseline}'s final target loss at step {number(steps, 0)} of {number(total, 0)}: "
                f"{baseline} takes {number(total / steps, 2)} times as many. Steps are not time: training the "
                "reference and scoring the corpus come on top.",
            )
        elif name in reached:
            yield "worse", f"{name} does not reach {baseline}'s final target loss."
    yield from _reference_finding(summary)


def _reference_finding(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the reference itself is ahead, the reader is told."""
    reference = (summary.get("reference") or {}).get("target_loss")
    selective = summary["runs"].get("selective", {}).get("target_loss")
    if reference is not None and selective is not None:
        order = "lower than" if reference < selective else "no lower than"
        yield (
            "note",
            f"The reference, trained on the clean text, stands at {number(reference, 3)} on the target text, "
            f"{order} selective's {number(selective, 3)}.",
        )


def _kept(selection: Mapping[str, Any]) -> list[dict[str, Any]]:
    shares = (("clean text", selection.get("clean_selected_share")), ("noise", selection.get("noise_selected_share")))
    return [{"name": name, "share": share, "percent": _percent(share)} for name, share in shares if share is not None]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _figures(curves: Mapping[str, Mapping[str, Any]]) -> Iterator[Figure]:
    def lines(field: str) -> list[Line]:
        named = enumerate(curves.items())  # a run has its colour in every figure
        return [
            Line(name, run["steps"], run[field], i) for i, (name, run) in named if run.get("steps") and run.get(field)
        ]

    target = lines("target_loss")
    final = {line.label: line.points()[1] for line in target}.get("causal")
    end = float(final[-1]) if final is not None and len(final) else None
    yield Figure(
        "Target text",
        "Loss on held-out target text. The dotted line is where causal ends.",
        curve_svg("Loss on target text over steps, one line for each run", target, reached=end),
    )
    yield Figure(
        "General text",
        "Loss on held-out text of other kinds: what selection gives up.",
        curve_svg("Loss on general text over steps, one line for each run", lines("general_loss")),
    )
    for name, run in curves.items():
        if run.get("train_steps") and any(value is not None for value in run.get("unselected_loss") or ()):
            fields = (("selected_loss", "selected", 3), ("unselected_loss", "unselected", 4), ("loss", "all", 5))
            parts = [Line(label, run["train_steps"], run[field], i) for field, label, i in fields if run.get(field)]
            description = f"Loss on selected and unselected tokens of the run {name} over steps"
            caption = "Loss on the tokens of the batches: faint as measured, bold a running mean."
            yield Figure(f"Training tokens, {name}", caption, curve_svg(description, parts, smooth=True))


def _passage(passage: Mapping[str, Any]) -> dict[str, Any]:
    tokens = passage["tokens"]
    parts = []
    for noise, words in ((False, "of the clean tokens"), (True, "of the noise")):
        shares = [token["selected"] for token in tokens if token["noise"] is noise and _counts(token)]
        if shares:
            parts.append(f"{_percent(sum(shares) / len(shares))} {words}")
    heading = {name: visible(str(passage[name] or "")) for name in ("title", "url", "source")}
    return {**heading, "tokens": [_token(token) for token in tokens], "selected": ", ".join(parts)}


def _counts(token: Mapping[str, Any]) -> bool:
    return token["valid"] and token["selected"] is not None


def _token(token: Mapping[str, Any]) -> dict[str, Any]:
    share = float(token["selected"]) if _counts(token) else None
    marks = {"skip": share is None, "noise": token["noise"], "line": "\n" in token["text"]}
    return {
        "text": visible(token["text"]),
        "classes": " ".join(name for name, on in marks.items() if on),
        "share": f"{share or 0:.2f}",
        "selected": "takes no part" if share is None else _percent(share),
        "loss": number(token["loss"], 2),
        "reference": number(token["ref_loss"], 2),
        "excess": number(token["excess"], 2, signed=True),
    }


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every leaf, for a plain list at the end."""
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from leaves(value, f"{label}, ")
        elif isinstance(value, float):
            yield label, f"{value:,.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield label, f"{value:,}"
        else:
            yield label, "–" if value is None else str(value)
