"""What a demo found: summary.json, and the curves and passages of its report, read from corpora and run directories."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.analyze.report import Arm, ArmRun, Passage, Report, arm_figures, write_report
from slm_jax.analyze.selected_tokens import passages_of_run
from slm_jax.analyze.tables import Cell, Table, kind_of, number
from slm_jax.data.corpus import Corpus
from slm_jax.evaluate.flops import run_flops
from slm_jax.files import write_json
from slm_jax.run_directory import RunDirectory

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


def write_summary(here: Path, trained: Sequence[str]) -> dict[str, Any]:
    """Writes `summary.json` and `report.html` into `here` from the runs `trained` in it; returns the summary."""
    rows = {name: RunDirectory(here / name).metrics() for name in trained if name != "base"}
    compared = [name for name in rows if name != "reference"]
    curves = {name: _curves(rows[name]) for name in compared}
    summary: dict[str, Any] = {"runs": {name: _run(here / name, rows[name]) for name in compared}}
    if "causal" in compared:
        goal = summary["runs"]["causal"]["target_loss"]
        others = [name for name in compared if name != "causal" and not name.startswith("continual")]
        summary["steps_to_causal_target_loss"] = {name: steps_to(curves[name], goal) for name in others}
    if "continual_causal" in compared:
        goal = summary["runs"]["continual_causal"]["target_loss"]
        others = [name for name in compared if name.startswith("continual") and name != "continual_causal"]
        summary["steps_to_continual_causal_target_loss"] = {name: steps_to(curves[name], goal) for name in others}
    corpus = Corpus.open(_settings(here / [*compared, *rows][0])["phases"][0]["mixture"][0]["corpus"])
    if "selective" in compared and (shares := _shares(rows["selective"], corpus)):
        summary["selection"] = shares
    summary["corpus"] = {
        "path": str(corpus.path),
        "fingerprint": corpus.fingerprint,
        "rows": corpus.num_rows,
        "sequence_length": corpus.sequence_length,
        "vocabulary": corpus.vocab_size,
        "sources": list(corpus.source_names),
    }
    summary["reference"] = _run(here / "reference", rows["reference"]) if "reference" in rows else None
    write_json(here / "summary.json", summary)
    passages = passages_of_run(str(here / "selective")) if "selective" in compared else []
    write_demo_report(here, summary, rows, passages)
    return summary


def _run(run_dir: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    finished = json.loads((run_dir / "summary.json").read_text())
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    flops = run_flops(_settings(run_dir))
    return {
        "target_loss": last.get("target/loss"),
        "target_bits_per_byte": last.get("target/bits_per_byte"),
        "general_loss": last.get("general/loss"),
        "tokens_seen": int(finished["tokens_seen"]),
        "tokens_trained": int(finished["tokens_trained"]),
        "steps": finished["steps"],
        "seconds": round(finished["seconds"], 1),
        "training_flops": flops.training,
        "scoring_flops": flops.scoring,
    }


def _settings(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())["settings"]


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    evaluated = [row for row in rows if "target/loss" in row]
    trained = [row for row in rows if "loss" in row]
    return {
        "steps": [row["step"] for row in evaluated],
        "target_loss": [row["target/loss"] for row in evaluated],
        "general_loss": [row.get("general/loss") for row in evaluated],
        "train_steps": [row["step"] for row in trained],
        "loss": [row["loss"] for row in trained],
        "selected_loss": [row.get("selected_loss") for row in trained],
        "unselected_loss": [row.get("unselected_loss") for row in trained],
    }


def steps_to(curve: dict[str, list[Any]], goal: float) -> int | None:
    """The first step at which the curve, read as straight lines between evaluations, is at `goal` or below; None if
    it never is."""
    points = list(zip(curve["steps"], curve["target_loss"], strict=True))
    for (step, loss), (next_step, next_loss) in itertools.pairwise(points):
        if next_loss <= goal:
            return round(step + (next_step - step) * (loss - goal) / (loss - next_loss)) if loss > goal else step
    return None


def _shares(rows: Sequence[dict[str, Any]], corpus: Corpus) -> dict[str, float] | None:
    """Shares kept over the second half of the run, of noise and of the text around it; None without noise.

    Every logged step counts alike; steps hold nearly equal numbers of each kind.
    """
    noise = [name for name in corpus.source_names if name.endswith("/noise")]
    if not noise:
        return None
    logged = [row for row in rows if "selected_loss" in row]
    clean_name = "crawl/noisy_stories"

    def share(name: str, part: Sequence[dict[str, Any]]) -> float:
        return float(
            np.mean([row[f"selected_share/{name}"] for row in part if row[f"selected_share/{name}"] is not None])
        )

    first, second = logged[: max(1, len(logged) // 10)], logged[len(logged) // 2 :]
    return {
        "noise_selected_share": share(noise[0], second),
        "clean_selected_share": share(clean_name, second),
        "noise_selected_share_first_tenth": share(noise[0], first),
        "clean_selected_share_first_tenth": share(clean_name, first),
    }


def write_demo_report(
    here: Path, summary: Mapping[str, Any], rows: Mapping[str, Sequence[dict[str, Any]]], passages: Sequence[Passage]
) -> None:
    runs = summary["runs"]
    arms = []
    for name, about in runs.items():
        flops = (about.get("scoring_flops"), about.get("training_flops"))
        arms.append(Arm(name, [ArmRun.of_rows(rows.get(name, ()), None if None in flops else flops)]))
    report = Report(
        title=f"slm_jax: {', '.join(runs)}",
        heading="Which tokens a model trains on",
        intro=[INTRO],
        table=_table(runs),
        findings=list(_findings(summary)),
        figures=arm_figures(arms, ("target/loss", "general/loss")),
        passages=passages,
        facts={name.capitalize(): list(_leaves(summary.get(name) or {})) for name in ("corpus", "reference")},
    )
    write_report(here, report)


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
    """The reference's own loss beside the selective run's."""
    reference = (summary.get("reference") or {}).get("target_loss")
    selective = summary["runs"].get("selective", {}).get("target_loss")
    if reference is not None and selective is not None:
        order = "lower than" if reference < selective else "no lower than"
        yield (
            "note",
            f"The reference, trained on the clean text, has a loss of {number(reference, 3)} on the target text, "
            f"{order} selective's {number(selective, 3)}.",
        )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every leaf, for a plain list at the end."""
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{label}, ")
        elif isinstance(value, float):
            yield label, f"{value:,.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield label, f"{value:,}"
        else:
            yield label, "–" if value is None else str(value)
