"""The result of a finished arm: one small JSON file with its numbers, curves, cost and settings. No checkpoint."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.analyze.runs import Run, read_run
from slm_jax.analyze.selected_tokens import passages_of_run
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.experiment.planning import Task
from slm_jax.experiment.worlds.plant import noise_in
from slm_jax.files import read_json, to_json, write_text
from slm_jax.run_directory import RunDirectory

FORMAT_VERSION = 1
CURVE_POINTS = 60  # of the training curves; evaluations are kept whole
SHOWN_SAMPLES, PASSAGES = 8, 4
READ_ROWS = 2048  # of a corpus at a time


def result_path(results: Path, task: Task) -> Path:
    """RESULTS/VARIANT/ARM-seedN.json"""
    return results / task.variant / f"{task.item.name}-seed{task.seed}.json"


def read_result(results: Path, task: Task) -> dict[str, Any] | None:
    """The result of an arm; None before it is written.

    Raises:
      UserError: it is damaged, or was made with other settings.
    """
    path = result_path(results, task)
    if not path.exists():
        return None
    result = read_json(path)
    if result.get("format_version") != FORMAT_VERSION or result.get("digest") != task.digest:
        raise UserError(
            "experiment-result-other-settings",
            f"{path} was made with other settings of the recipe: delete it to run {task.name} again, or give the arm "
            "another name",
        )
    return result


def write_result(results: Path, task: Task, seconds: float) -> dict[str, Any]:
    """Reads a finished run and writes its result; `seconds`: of its command, evaluations and start included."""
    run = read_run(task.product)
    counters, start = run.counters(), run.starts[-1]
    result = {
        "format_version": FORMAT_VERSION,
        "arm": task.item.name,
        "variant": task.variant,
        "seed": task.seed,
        "digest": task.digest,
        "settings": task.text,
        "commit": start.get("commit"),
        "versions": start.get("versions"),
        "device": start.get("device_kind"),
        "parameters": run.summary["parameters"],
        "steps": run.done,
        **{name: counters[name] for name in ("tokens_seen", "tokens_trained")},
        "train_seconds": round(counters["seconds"], 1),
        # A run that was stopped in between took longer than its last command.
        "command_seconds": round(seconds, 1) if len(run.starts) == 1 else None,
        "flops": run.flops()._asdict(),
        "final": {name: _rounded(value) for name, value in run.evaluations().items()},
        "evaluations": _evaluations(run),
        "training": _training(run),
        "selected": _selected(run),
        "samples": _samples(RunDirectory(task.product)),
        "passages": [passage._asdict() for passage in passages_of_run(task.product, PASSAGES)],
    }
    lines = (
        f"  {json.dumps(name)}: {json.dumps(to_json(value), ensure_ascii=False)}" for name, value in result.items()
    )
    write_text(result_path(results, task), "{\n" + ",\n".join(lines) + "\n}\n")
    return result


def remove_run(task: Task) -> None:
    shutil.rmtree(task.product, ignore_errors=True)


def _evaluations(run: Run) -> dict[str, list[Any]]:
    """Name -> a value for each evaluation; 'step' and 'tokens' (seen) among them."""
    rows = [row for row in run.rows if "loss" not in row]
    # Tokens at the steps of evaluations, read off between logged steps.
    seen = {0: 0} | {row["step"]: row["tokens_seen"] for row in run.rows if "tokens_seen" in row}
    seen |= {run.done: run.counters()["tokens_seen"]}
    names = dict.fromkeys(name for row in rows for name in row if name != "step" and name.count("/") == 1)
    columns: dict[str, list[Any]] = {"step": [row["step"] for row in rows]}
    columns["tokens"] = [int(np.interp(row["step"], list(seen), list(seen.values()))) for row in rows]
    return columns | {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _training(run: Run) -> dict[str, list[Any]]:
    """The training curves, thinned: each point is the mean of the logged steps since the one before."""
    rows = [row for row in run.rows if "loss" in row]
    if not rows:  # a run shorter than train.log_every
        return {}
    names = [name for name in rows[-1] if name.startswith(("loss", "selected_", "unselected_", "learning_rate"))]
    groups = np.array_split(np.arange(len(rows)), min(CURVE_POINTS, len(rows)))
    columns: dict[str, list[Any]] = {"step": [rows[group[-1]]["step"] for group in groups]}
    for name in names:
        columns[name] = [_mean([rows[i].get(name) for i in group]) for group in groups]
    return columns


def _selected(run: Run) -> dict[str, Any]:
    """Of each source, over the second half of the run: the share of its tokens that were selected, and its share of the
    corpus' tokens. Empty for a run on all tokens, or on one source."""
    rows = [row for row in run.rows if "selected_loss" in row]
    rows = rows[len(rows) // 2 :]
    names = [name.removeprefix("selected_share/") for name in (rows[-1] if rows else ()) if "selected_share/" in name]
    if not names:
        return {}
    counts: dict[str, int] = dict.fromkeys(names, 0)
    for component in run.settings["phases"][-1]["mixture"]:
        for name, count in _tokens_by_source(Corpus.open(component["corpus"])).items():
            counts[name] = counts.get(name, 0) + count
    total = sum(counts.values())
    shares = {name: _mean([row.get(f"selected_share/{name}") for row in rows]) for name in names}
    return {name: {"selected": shares[name], "of_tokens": _rounded(counts[name] / total)} for name in names}


def _tokens_by_source(corpus: Corpus) -> dict[str, int]:
    """Tokens that carry loss."""
    counts = np.zeros(len(corpus.source_names), np.int64)
    for begin in range(0, corpus.num_rows, READ_ROWS):
        rows = np.arange(begin, min(begin + READ_ROWS, corpus.num_rows))
        read = corpus.read(rows, ["source_ids", "loss_mask"])
        counts += np.bincount(read["source_ids"][read["loss_mask"]], minlength=len(counts))
    return dict(zip(corpus.source_names, counts.tolist(), strict=True))


def _samples(run: RunDirectory) -> dict[str, Any]:
    """Of each evaluator that wrote texts, at its last evaluation: how many, the share that holds noise by the
    generator's own grammar, and a few of them."""
    found = {}
    for folder in sorted(run.samples.glob("*")):
        last = max(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
        rows = [json.loads(line) for line in last.read_text(encoding="utf-8").splitlines()]
        noisy = [bool(noise_in(row["text"])) for row in rows]
        # Evenly from all of them, because the samples of a prompt follow each other.
        some = [rows[i] for i in np.linspace(0, len(rows), min(len(rows), SHOWN_SAMPLES), endpoint=False).astype(int)]
        shown = [{name: row.get(name) for name in ("prompt", "text", "answer") if name in row} for row in some]
        found[folder.name] = {"texts": len(rows), "noisy": _mean(noisy), "shown": shown}
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(float(np.mean(known))) if known else None


def _rounded(value: Any) -> Any:
    """Six significant digits."""
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def selection_quality(selected: Mapping[str, Mapping[str, float]], planted: Sequence[str]) -> dict[str, float] | None:
    """Of what was selected: `precision`, the share that was not planted; `recall`, the share of what was not planted
    that was selected; `planted`, the share of planted tokens that was selected. None where nothing was planted."""
    # A source that was in no batch of these steps has no share.
    kept = {name: (about["selected"] or 0.0) * about["of_tokens"] for name, about in selected.items()}
    bad = [name for name in selected if name in planted]
    all_bad = sum(selected[name]["of_tokens"] for name in bad)
    if not all_bad:
        return None
    kept_bad = sum(kept[name] for name in bad)
    good = sum(kept.values()) - kept_bad
    return {
        "precision": good / max(good + kept_bad, 1e-12),
        "recall": good / max(1 - all_bad, 1e-12),
        "planted": kept_bad / all_bad,
    }
