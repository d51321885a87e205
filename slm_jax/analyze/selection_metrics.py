"""What the metrics of runs say of selection: losses over training, shares by source, how much to keep, and fits.

Rho-1 (arXiv 2404.07965) Figures 6, 7 and 9, Eq 7 and App F.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from slm_jax.analyze.plots import running_mean
from slm_jax.analyze.runs import Run
from slm_jax.errors import UserError
from slm_jax.score.selection import Selection, selection_of

ALL = "all tokens"  # what a run without selection trains on
POINTS = 400  # of a curve that is recorded
SMOOTHED = 20  # a running mean covers this fraction of a curve: one 20th
LEAST = 1e-12  # lower bound inside the logarithm, so that a search may pass where the line is negative


def of_runs(runs: Sequence[Run], downstream: str) -> dict[str, Any]:
    """For each run its curves, the share it kept, its last downstream result and fits of its own training losses; and
    the results by score and share (Figure 9).

    Raises:
      UserError: `selection-unknown-metric`: no run has the downstream metric.
    """
    found = {run.name: _of_run(run, downstream) for run in runs}
    if all(about["last_downstream"] is None for about in found.values()):
        known = sorted({name for run in runs for row in run.rows for name in row if "/" in name})
        known = [name for name in known if not name.startswith(("loss/", "selected_share/"))]
        raise UserError(
            "selection-unknown-metric",
            f"analyze_selection.downstream: no run has measured {downstream!r}; their metrics are "
            f"{', '.join(known) or 'none'}",
        )
    groups: dict[tuple[str, float], list[str]] = {}
    for name, about in found.items():
        if about["ratio"] is not None and about["last_downstream"] is not None:
            groups.setdefault((about["score"] or ALL, about["ratio"]), []).append(name)
    sweep = []
    for (score, ratio), names in sorted(groups.items()):
        values = [float(found[name]["last_downstream"]) for name in names]
        spread = {"mean": float(np.mean(values)), "lowest": min(values), "highest": max(values)}
        sweep.append({"score": score, "ratio": ratio, "runs": names, **spread})
    return {"runs": found, "ratio_sweep": sweep}


def _of_run(run: Run, downstream: str) -> dict[str, Any]:
    phase = run.selective_phase()
    selection = selection_of(phase["selection"]) if phase else None
    ratio: float | None = None if phase else 1.0
    if phase and isinstance(selection, Selection) and selection.threshold is None and not phase.get("keep_ratio"):
        ratio = selection.ratio  # else it is not one number
    counters = {name: (run.curve(name)[1][-1:].tolist() or [None])[0] for name in ("tokens_seen", "tokens_trained")}
    seen, trained = (None if value is None else int(value) for value in counters.values())

    # ---- Running means of the noisy losses of training, thinned, and the result at the same losses
    steps, values = run.curve(downstream, with_evaluated=True)
    training, fits = {}, {}
    for name in ("selected_loss", "unselected_loss", "loss"):
        at, losses = run.curve(name)
        losses = running_mean(losses, max(1, len(losses) // SMOOTHED))
        kept = np.unique(np.linspace(0, len(at) - 1, POINTS).astype(int)) if len(at) else np.array([], int)
        at, losses = at[kept], losses[kept]
        training[name] = {"steps": at, "values": losses}
        if name != "loss":
            # No loss before the first selective step; the log may end a step before the last evaluation.
            known = np.interp(steps, at, losses, left=np.nan) if len(at) else np.full(len(steps), np.nan)
            fits[name.removesuffix("_loss")] = fitted(known, steps, values)

    # ---- Shares by source, over the second half of the selective steps; every logged step counts alike
    rows = [row for row in run.rows if row.get("selected_share") is not None]
    rows, by_source = rows[len(rows) // 2 :], {}
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith("selected_share/")):
        if shares := [row[name] for row in rows if row.get(name) is not None]:
            by_source[name.removeprefix("selected_share/")] = float(np.mean(shares))
    return {
        "path": run.path,
        "steps": max((row["step"] for row in run.rows), default=0),
        "tokens_seen": seen,
        "tokens_trained": trained,
        "kept": trained / seen if trained is not None and seen else None,
        "score": " and ".join(part.score for part in selection.parts) if selection else None,
        "ratio": ratio,
        "downstream": {"steps": steps, "values": values},
        "last_downstream": values[-1] if len(values) else None,
        "training": training,
        "fits": fits,
        "selected_by_source": by_source,
    }


def fitted(loss: np.ndarray, steps: np.ndarray, results: np.ndarray) -> dict[str, Any]:
    """Points (loss, result) after the first step, and their LogFit."""
    trained = (steps > 0) & np.isfinite(loss) & np.isfinite(results)
    fit = fit_log(loss[trained], results[trained])
    points = {"steps": steps[trained], "loss": loss[trained], "result": results[trained]}
    return points | {"fit": fit._asdict() if fit else None}


class LogFit(NamedTuple):
    """result = log(a * loss + c). error: root of the mean squared distance; r_squared: share of the variance explained,
    at most 1, None where the results do not vary."""

    a: float
    c: float
    error: float
    r_squared: float | None
    points: int


def fit_log(loss: Float[np.ndarray, "P"], result: Float[np.ndarray, "P"]) -> LogFit | None:
    """Least squares in the result (Rho-1 Eq 7); the sign of a is fitted, because the paper's text and axes disagree.

    Non-finite points are left out; None for fewer than three, or where all losses are equal.
    """
    shown = np.isfinite(loss) & np.isfinite(result)
    loss, result = loss[shown].astype(np.float64), result[shown].astype(np.float64)
    if len(loss) < 3 or np.ptp(loss) == 0:
        return None
    from scipy import optimize  # here: half a second at the start of every stage

    mean, scale, level = loss.mean(), loss.std(), result.mean()
    z, y = (loss - mean) / scale, result - level

    def distances(p: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(p[0] * z + p[1], LEAST)) - y

    # exp(y) = p0 z + p1 is linear. Solved with the weights that turn its errors into those of y, it starts the search.
    weights = np.exp(-y)
    start = np.linalg.lstsq(np.stack([z * weights, weights], axis=1), np.exp(y) * weights, rcond=None)[0]
    if (start[0] * z + start[1]).min() <= 0:
        start = np.array([0.0, np.exp(y).mean()])
    slope, middle = optimize.least_squares(distances, start, xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    residual = distances(np.array([slope, middle]))
    return LogFit(
        a=float(np.exp(level) * slope / scale),
        c=float(np.exp(level) * (middle - slope * mean / scale)),
        error=float(np.sqrt(np.mean(residual**2))),
        r_squared=1 - float(np.sum(residual**2)) / float(np.sum(y**2)) if np.ptp(result) > 0 else None,
        points=len(loss),
    )
