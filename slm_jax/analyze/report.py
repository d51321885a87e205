"""One HTML file that shows what a comparison of runs found: numbers, curves, and text shaded by selection."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from slm_jax.analyze.curves import Line, curve_svg

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


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Any]],
    passages: Sequence[Mapping[str, Any]],
) -> None:
    """Writes a self-contained page: no script, style, font or image comes from elsewhere.

    summary: what `summary.json` of a comparison holds; a number that was not measured is None.
    curves: for each run `steps` with `target_loss` and `general_loss`, `train_steps` with `loss`, `selected_loss` and
      `unselected_loss`; lists that are missing, and values that are None, are left out.
    passages: `{"title", "url", "source", "tokens"}`; each token has `text`, `loss`, `ref_loss`, `excess`, `selected`
      (share of the evaluations in which it was selected), `valid` (whether it takes part), `noise` (None when unknown).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        runs=list(summary["runs"]),
        rows=list(_rows(summary["runs"])),
        headings=[heading for _, heading, _, _ in COLUMNS],
        findings=list(_findings(summary)),
        kept=_kept(summary.get("selection") or {}),
        figures=[figure for figure in _figures(curves) if figure["svg"]],
        passages=[_passage(passage) for passage in passages],
        facts={name: list(_facts(summary.get(name) or {})) for name in ("corpus", "reference")},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")


def _number(value: Any, digits: int, signed: bool = False) -> str:
    """A number for reading, with thousands separated; an en dash for what was not measured."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    sign = "+" if signed else ""
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def _difference(values: Mapping[str, Any], baseline: Mapping[str, Any], field: str) -> float | None:
    here, there = values.get(field), baseline.get(field)
    if here is None or there is None or not math.isfinite(here - there):
        return None
    return here - there


def _baseline(name: str, runs: Mapping[str, Any]) -> str:
    """The run that another is compared with: `causal`, or `continual_causal` for those that begin where it began."""
    return "continual_causal" if name.startswith("continual_") and "continual_causal" in runs else "causal"


def _rows(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for name, values in runs.items():
        baseline = _baseline(name, runs)
        cells = []
        for field, heading, digits, compared in COLUMNS:
            change = _difference(values, runs.get(baseline, {}), field) if compared and name != baseline else None
            cells.append(
                {
                    "heading": heading,
                    "value": _number(values.get(field), digits),
                    "change": "" if change is None else _number(change, digits, signed=True),
                    "kind": "" if change is None else _kind(change),
                }
            )
        yield {"name": name, "cells": cells}


def _kind(change: float) -> str:
    """Of a change in loss."""
    return "better" if change < -0.0005 else "worse" if change > 0.0005 else "same"


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
                    _kind(change),
                    f"{name} is {VERDICT[_kind(change)]} {baseline} on {text}: "
                    f"{_number(values[field], 3)} against {_number(causal[field], 3)} nats per token "
                    f"({_number(change, 3, signed=True)}).",
                )
        steps, total = reached.get(name), causal.get("steps")
        if steps and total:
            yield (
                "better" if steps < total else "note",
                f"{name} reaches {baseline}'s final target loss at step {_number(steps, 0)} of {_number(total, 0)}: "
                f"{baseline} takes {_number(total / steps, 2)} times as many. Steps are not time: training the "
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
            f"The reference, trained on the clean text, stands at {_number(reference, 3)} on the target text, "
            f"{order} selective's {_number(selective, 3)}.",
        )


def _kept(selection: Mapping[str, Any]) -> list[dict[str, Any]]:
    shares = (("clean text", selection.get("clean_selected_share")), ("noise", selection.get("noise_selected_share")))
    return [{"name": name, "share": share, "percent": _percent(share)} for name, share in shares if share is not None]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _figures(curves: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    def lines(field: str) -> list[Line]:
        named = enumerate(curves.items())  # a run has its colour in every figure
        return [
            Line(name, run["steps"], run[field], i) for i, (name, run) in named if run.get("steps") and run.get(field)
        ]

    target = lines("target_loss")
    final = {line.label: line.points()[1] for line in target}.get("causal")
    end = float(final[-1]) if final is not None and len(final) else None
    yield {
        "title": "Target text",
        "caption": "Loss on held-out target text. The dotted line is where causal ends.",
        "svg": curve_svg("Loss on target text over steps, one line for each run", target, reached=end),
    }
    yield {
        "title": "General text",
        "caption": "Loss on held-out text of other kinds: what selection gives up.",
        "svg": curve_svg("Loss on general text over steps, one line for each run", lines("general_loss")),
    }
    for name, run in curves.items():
        if run.get("train_steps") and any(value is not None for value in run.get("unselected_loss") or ()):
            fields = (("selected_loss", "selected", 3), ("unselected_loss", "unselected", 4), ("loss", "all", 5))
            parts = [Line(label, run["train_steps"], run[field], i) for field, label, i in fields if run.get(field)]
            description = f"Loss on selected and unselected tokens of the run {name} over steps"
            yield {
                "title": f"Training tokens, {name}",
                "caption": "Loss on the tokens of the batches: faint as measured, bold a running mean.",
                "svg": curve_svg(description, parts, smooth=True),
            }


def _passage(passage: Mapping[str, Any]) -> dict[str, Any]:
    tokens = passage["tokens"]
    parts = []
    for noise, words in ((False, "of the clean tokens"), (True, "of the noise")):
        shares = [token["selected"] for token in tokens if token["noise"] is noise and _counts(token)]
        if shares:
            parts.append(f"{_percent(sum(shares) / len(shares))} {words}")
    heading = {name: _shown(str(passage[name] or "")) for name in ("title", "url", "source")}
    return {**heading, "tokens": [_token(token) for token in tokens], "selected": ", ".join(parts)}


def _counts(token: Mapping[str, Any]) -> bool:
    return token["valid"] and token["selected"] is not None


def _token(token: Mapping[str, Any]) -> dict[str, Any]:
    share = float(token["selected"]) if _counts(token) else None
    marks = {"skip": share is None, "noise": token["noise"], "line": "\n" in token["text"]}
    return {
        "text": _shown(token["text"]),
        "classes": " ".join(name for name, on in marks.items() if on),
        "share": f"{share or 0:.2f}",
        "selected": "takes no part" if share is None else _percent(share),
        "loss": _number(token["loss"], 2),
        "reference": _number(token["ref_loss"], 2),
        "excess": _number(token["excess"], 2, signed=True),
    }


def _shown(text: str) -> str:
    """Control characters, which HTML drops or refuses, as their pictures; tabs and line ends stay."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\t\n" else c for c in text)


def _facts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every leaf, for a plain list at the end."""
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _facts(value, f"{label}, ")
        elif isinstance(value, float):
            yield label, f"{value:,.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield label, f"{value:,}"
        else:
            yield label, "–" if value is None else str(value)
