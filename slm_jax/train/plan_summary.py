"""What a run will do, phase by phase: as a table, and drawn."""

from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from slm_jax import processes
from slm_jax.data.mixture import MixtureComponent
from slm_jax.models.model_config import ModelConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import CombinedSelection, Selection
from slm_jax.train.phases import Phase
from slm_jax.train.plan import Plan

COLUMNS = ("phase", "steps", "tokens", "learning rate", "trains on", "rows from")
POINTS = 1000  # of a curve


def describe(run: RunDirectory, model: ModelConfig, plan: Plan, devices: Mesh, step: int) -> str:
    """What the run will do: its size, its devices, and the table of its phases."""
    mesh = " x ".join(f"{name} {size}" for name, size in devices.shape.items())
    several = f" of {processes.count()} processes" if processes.count() > 1 else ""
    return (
        f"train: {model.parameter_count():,} parameters, {plan.total_steps} steps from step {step}, on {mesh} "
        f"{devices.devices.flat[0].device_kind}{several} -> {run}\n{table(plan)}"
    )


def table(plan: Plan) -> str:
    """One line per phase: its steps, tokens, learning rate after its first, its middle and its last step, objective and
    mixture."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for number, phase in enumerate(plan.phases):
        first, last = int(plan.first_steps[number]) + 1, int(plan.first_steps[number + 1])
        rates = [f"{np.asarray(plan.learning_rate(t)):.3g}" for t in sorted({first, (first + last) // 2, last})]
        tokens = phase.num_steps * phase.batch_size * plan.corpus.sequence_length
        rows.append(
            (
                str(number),
                f"{first}-{last} of {phase.batch_size} rows",
                f"{tokens:,}",
                " > ".join(rates),
                _objective(phase),
                _mixture(plan, number),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join("  " + line.rstrip() for line in lines)


def _objective(phase: Phase) -> str:
    parts = ["all tokens"]
    if isinstance(phase.selection, CombinedSelection):
        each = [_choice(part, np.array([part.ratio])) for part in phase.selection.parts]
        together = {"intersection": " and ", "union": " or "}[phase.selection.keeps].join(each)
        low, high = (bound[0] for bound in _bounds(phase))
        parts = [f"{together} ({low:.0%} to {high:.0%} of all), per {phase.selection.parts[0].scope}"]
    elif phase.selection:
        parts = [f"{_choice(phase.selection, _keep_ratio(phase))}, per {phase.selection.scope}"]
    if phase.reset_optimizer:
        parts.append("moments forgotten")
    if phase.l2_to_init:
        parts.append(f"pulled back by {phase.l2_to_init:g}")
    return ", ".join(parts)


def _choice(selection: Selection, ratio: np.ndarray) -> str:
    amount = f"{ratio[0]:.0%}" if ratio[0] == ratio[-1] else f"{ratio[0]:.0%} > {ratio[-1]:.0%}"
    amount = f"above {selection.threshold:g}" if selection.threshold is not None else amount
    several = f" ({selection.combine} of {', '.join(selection.references)})" if len(selection.columns()) > 1 else ""
    return f"{amount} by {selection.score}{several}"


def _keep_ratio(phase: Phase) -> np.ndarray:
    """Share of the valid tokens that trains at each step of the phase; NaN where only the scores tell."""
    low, high = _bounds(phase)
    return np.where(low == high, high, np.nan)


def _bounds(phase: Phase) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most of the valid tokens that can train at each step, as shares."""
    low, high = 1.0, 1.0
    if isinstance(phase.selection, CombinedSelection):
        ratios = [part.ratio if part.threshold is None else None for part in phase.selection.parts]
        least, most = [ratio or 0.0 for ratio in ratios], [ratio or 1.0 for ratio in ratios]
        if phase.selection.keeps == "intersection":
            low, high = max(0.0, sum(least) - (len(least) - 1)), min(most)
        else:
            low, high = max(least), min(1.0, sum(most))
    elif phase.selection and phase.selection.threshold is not None:
        low, high = 0.0, 1.0
    elif phase.selection and phase.keep_ratio:
        return phase.ratios(), phase.ratios()
    elif phase.selection:
        low = high = phase.selection.ratio
    return np.full(phase.num_steps, low), np.full(phase.num_steps, high)


def _mixture(plan: Plan, number: int) -> str:
    first, last = plan.shares(number)[[0, -1]]
    parts = []
    for draw, begin, end in zip(plan.phases[number].mixture, first, last, strict=True):
        share = f"{begin:.4g}" if begin == end else f"{begin:.4g} > {end:.4g}"
        parts.append(f"{share} {draw.corpus}" + (f" (replay, {draw.replay.replace('_', ' ')})" if draw.replay else ""))
    return " + ".join(parts)


def draw(plan: Plan, path: Path) -> None:
    """Learning rate, share of each corpus, and share of the tokens that train, over the tokens of the run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("tableau-colorblind10")

    step = np.unique(np.linspace(0, plan.total_steps - 1, POINTS).astype(int))
    rows = np.concatenate([np.full(phase.num_steps, phase.batch_size) for phase in plan.phases])
    tokens = np.cumsum(rows) * plan.corpus.sequence_length / 1e6
    sources = list(dict.fromkeys(_name(d) for phase in plan.phases for d in phase.mixture))
    shares = np.zeros((plan.total_steps, len(sources)))
    for number, phase in enumerate(plan.phases):
        mine = slice(plan.first_steps[number], plan.first_steps[number + 1])
        for d, share in zip(phase.mixture, plan.shares(number).T, strict=True):
            shares[mine, sources.index(_name(d))] += share
    kept = np.concatenate([_keep_ratio(phase) for phase in plan.phases])
    low, high = (np.concatenate(bound) for bound in zip(*map(_bounds, plan.phases), strict=True))

    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(9, 7), layout="constrained")
    top.plot(tokens[step], np.asarray(plan.learning_rate(step + 1)) * np.ones(len(step)), color="C0")
    top.set_ylabel("learning rate")
    top.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    middle.stackplot(tokens[step], shares[step].T, labels=sources, step="pre", alpha=0.85)
    middle.set(ylabel="share of the rows", ylim=(0, 1))
    middle.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    bottom.plot(tokens[step], kept[step], color="C3", drawstyle="steps-pre")
    bottom.fill_between(tokens[step], low[step], high[step], color="C3", alpha=0.2, linewidth=0, step="pre")
    bottom.set(ylabel="share that trains", ylim=(0, 1.05), xlabel="million tokens")
    for axes in (top, middle, bottom):
        axes.margins(x=0)
        axes.spines[["top", "right"]].set_visible(False)
        for boundary in plan.first_steps[1:-1]:
            axes.axvline(tokens[boundary - 1], color="0.4", linewidth=0.8, linestyle="--")
    for number, first in enumerate(plan.first_steps[:-1]):
        top.annotate(
            f"phase {number}", (tokens[first], 1.02), xycoords=("data", "axes fraction"), fontsize=8, color="0.3"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _name(draw: MixtureComponent) -> str:
    return f"{draw.corpus} (replay)" if draw.replay else draw.corpus
