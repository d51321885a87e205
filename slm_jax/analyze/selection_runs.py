"""What the metrics of runs say of selection: losses over training, shares by source, how much to keep, and fits.

Rho-1 (arXiv 2404.07965) Figures 6, 7 and 9.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from slm_jax.analyze.fit import LogFit, fit_log
from slm_jax.analyze.records import RunRecord
from slm_jax.errors import UserError
from slm_jax.score.selection import Selection, selection_of

ALL = "all tokens"  # what a run that does not select trains on
POINTS = 400  # of a curve that is recorded
SMOOTHED = 20  # a running mean is over so many-th of a curve


def of_runs(records: Sequence[RunRecord], downstream: str) -> dict[str, Any]:
    """Of each run its curves, what it kept, and its last downstream result; and the fits of its own training losses.

    Raises:
      UserError: no run has the downstream metric.
    """
    results = {record.name: record.series(downstream) for record in records}
    if not any(len(steps) for steps, _ in results.values()):
        known = sorted({name for record in records for row in record.rows for name in row if "/" in name})
        raise UserError(
            f"analyze_selection.downstream: no run has measured {downstream!r}; their metrics are "
            f"{', '.join(name for name in known if not name.startswith(('loss/', 'selected_share/'))) or 'none'}"
        )
    runs = {record.name: _run(record, *results[record.name]) for record in records}
    return {"runs": runs, "ratio_sweep": ratio_sweep(runs)}


def _run(record: RunRecord, steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    phase = record.selective_phase()
    selection = selection_of(phase["selection"]) if phase else None
    seen, trained = record.counted("tokens_seen"), record.counted("tokens_trained")
    training = {name: running(record, name) for name in ("selected_loss", "unselected_loss", "loss")}
    fits = {}
    for part in ("selected", "unselected"):
        at, smooth = training[f"{part}_loss"]
        # No loss before the first selective step; the log may end a step before the last evaluation.
        known = np.interp(steps, at, smooth, left=np.nan) if len(at) else np.full(len(steps), np.nan)
        fits[part] = fitted(known, steps, values)
    return {
        "path": record.path,
        "steps": max(row["step"] for row in record.rows),
        "tokens_seen": seen,
        "tokens_trained": trained,
        "kept": trained / seen if trained is not None and seen else None,
        "score": " and ".join(part.score for part in selection.parts) if selection else None,
        "ratio": _ratio(phase),
        "downstream": {"steps": steps, "values": values},
        "last_downstream": values[-1] if len(values) else None,
        "training": {name: {"steps": at, "values": smooth} for name, (at, smooth) in training.items()},
        "fits": fits,
        "selected_by_source": _by_source(record),
    }


def _ratio(phase: dict[str, Any] | None) -> float | None:
    """The share that a run keeps; None where it is not one number."""
    if phase is None:
        return 1.0
    selection = selection_of(phase["selection"])
    if not isinstance(selection, Selection) or selection.threshold is not None or phase.get("keep_ratio"):
        return None
    return selection.ratio


def running(record: RunRecord, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, running mean) of a noisy metric of training, thinned to POINTS."""
    steps, values = record.series(metric)
    values = running_mean(values, max(1, len(values) // SMOOTHED))
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int)) if len(steps) else np.array([], int)
    return steps[kept], values[kept]


def running_mean(values: Float[np.ndarray, "N"], width: int) -> Float[np.ndarray, "N"]:
    """The mean of up to `width` values that end at each value, so that no point looks ahead."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def fitted(loss: np.ndarray, steps: np.ndarray, results: np.ndarray) -> dict[str, Any]:
    """Points (loss, result) after the first step, and their LogFit."""
    trained = (steps > 0) & np.isfinite(loss) & np.isfinite(results)
    fit: LogFit | None = fit_log(loss[trained], results[trained])
    points = {"steps": steps[trained], "loss": loss[trained], "result": results[trained]}
    return points | {"fit": fit._asdict() if fit else None}


def _by_source(record: RunRecord) -> dict[str, float]:
    """The share of each source's tokens that was selected over the second half of training; every logged step counts
    alike."""
    rows = [row for row in record.rows if row.get("selected_share") is not None]
    rows, found = rows[len(rows) // 2 :], {}
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith("selected_share/")):
        shares = [row[name] for row in rows if row.get(name) is not None]
        if shares:
            found[name.removeprefix("selected_share/")] = float(np.mean(shares))
    return found


def ratio_sweep(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each score and share that runs kept (Figure 9): mean, lowest and highest last downstream result.

    Runs that trained on every token are those of share 1.
    """
    groups: dict[tuple[str, float], list[tuple[str, float]]] = {}
    for name, about in runs.items():
        if about["ratio"] is not None and about["last_downstream"] is not None:
            key = (about["score"] or ALL, about["ratio"])
            groups.setdefault(key, []).append((name, float(about["last_downstream"])))
    return [
        {
            "score": score,
            "ratio": ratio,
            "runs": [name for name, _ in members],
            "mean": float(np.mean([value for _, value in members])),
            "lowest": min(value for _, value in members),
            "highest": max(value for _, value in members),
        }
        for (score, ratio), members in sorted(groups.items())
    ]
