"""What a run will do, phase by phase, as a table and as a picture."""

from pathlib import Path

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from slm_jax import processes
from slm_jax.data.mixture import MixtureComponent
from slm_jax.files import replacing
from slm_jax.models.model_config import ModelConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import in_words, share_bounds
from slm_jax.score.weighting import weighting_in_words
from slm_jax.train.phases import Phase
from slm_jax.train.plan import Plan

COLUMNS = ("phase", "steps", "tokens", "learning rate", "trains on", "rows from")
POINTS = 1000  # of a curve


def describe(run: RunDirectory, model: ModelConfig, plan: Plan, devices: Mesh | AbstractMesh, step: int) -> str:
    """What the run will do: its size, its devices, and the table of its phases."""
    mesh = " x ".join(f"{name} {size}" for name, size in devices.shape.items())
    kind = devices.devices.flat[0].device_kind if isinstance(devices, Mesh) else "devices, more than are here"
    several = f" of {processes.count()} processes" if processes.count() > 1 else ""
    return (
        f"train: {model.parameter_count():,} parameters, {plan.total_steps} steps from step {step}, on {mesh} "
        f"{kind}{several} -> {run}\n{table(plan)}"
    )


def table(plan: Plan) -> str:
    """One line per phase: steps, tokens, learning rate after its first, middle and last step, objective, mixture."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for number, phase in enumerate(plan.phases):
        first, last = int(plan.first_steps[number]) + 1, int(plan.first_steps[number + 1])
        rates = [f"{np.asarray(plan.learning_rate(t)):.3g}" for t in sorted({first, (first + last) // 2, last})]
        tokens = phase.num_steps * phase.batch_size * plan.corpus.sequence_length
        components = []
        for component, (begin, end) in zip(phase.mixture, plan.shares(number)[[0, -1]].T, strict=True):
            replay = f" (replay, {component.replay.replace('_', ' ')})" if component.replay else ""
            components.append(f"{_range(begin, end, '.4g')} {component.corpus}{replay}")
        steps, mixture = f"{first}-{last} of {phase.batch_size} rows", " + ".join(components)
        rows.append((str(number), steps, f"{tokens:,}", " > ".join(rates), _objective(phase), mixture))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join("  " + line.rstrip() for line in lines)


def _range(begin: float, end: float, digits: str) -> str:
    return f"{begin:{digits}}" if begin == end else f"{begin:{digits}} > {end:{digits}}"


def _objective(phase: Phase) -> str:
    ratios = phase.ratios() if phase.keep_ratio else None
    ratio = None if ratios is None else _range(float(ratios[0]), float(ratios[-1]), ".0%")
    parts = [in_words(phase.selection, ratio) if phase.selection else "all tokens"]
    parts += weighting_in_words(phase.record())
    if phase.reset_optimizer:
        parts.append("optimizer state reset")
    if phase.l2_to_init:
        parts.append(f"L2 penalty {phase.l2_to_init:g} towards the parameters at the start of the phase")
    return ", ".join(parts)


def draw(plan: Plan, path: Path) -> None:
    """Draws a PNG: learning rate, share of each corpus, and share of tokens that train, over the tokens of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("tableau-colorblind10")

    # --- Values at each step, [steps] or [steps, corpora]
    rows = np.concatenate([np.full(phase.num_steps, phase.batch_size) for phase in plan.phases])
    tokens = np.cumsum(rows) * plan.corpus.sequence_length / 1e6
    names = list(dict.fromkeys(_name(component) for phase in plan.phases for component in phase.mixture))
    shares, bounds = np.zeros((plan.total_steps, len(names))), np.ones((plan.total_steps, 2))
    for number, phase in enumerate(plan.phases):
        mine = slice(plan.first_steps[number], plan.first_steps[number + 1])
        for component, share in zip(phase.mixture, plan.shares(number).T, strict=True):
            shares[mine, names.index(_name(component))] += share
        if phase.selection:
            bounds[mine] = phase.ratios()[:, None] if phase.keep_ratio else share_bounds(phase.selection)
    low, high = bounds.T
    kept = np.where(low == high, high, np.nan)  # unknown where it depends on the scores

    # --- Curves, of at most POINTS steps
    step = np.unique(np.linspace(0, plan.total_steps - 1, POINTS).astype(int))
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(9, 7), layout="constrained")
    top.plot(tokens[step], np.asarray(plan.learning_rate(step + 1)) * np.ones(len(step)), color="C0")
    top.set_ylabel("learning rate")
    top.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    middle.stackplot(tokens[step], shares[step].T, labels=names, step="pre", alpha=0.85)
    middle.set(ylabel="share of the rows", ylim=(0, 1))
    middle.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    bottom.plot(tokens[step], kept[step], color="C3", drawstyle="steps-pre")
    bottom.fill_between(tokens[step], low[step], high[step], color="C3", alpha=0.2, linewidth=0, step="pre")
    bottom.set(ylabel="share that trains", ylim=(0, 1.05), xlabel="million tokens")

    # --- Phase boundaries
    for axes in (top, middle, bottom):
        axes.margins(x=0)
        axes.spines[["top", "right"]].set_visible(False)
        for boundary in plan.first_steps[1:-1]:
            axes.axvline(tokens[boundary - 1], color="0.4", linewidth=0.8, linestyle="--")
    for number, first in enumerate(plan.first_steps[:-1]):
        place = (tokens[first], 1.02)
        top.annotate(f"phase {number}", place, xycoords=("data", "axes fraction"), fontsize=8, color="0.3")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def _name(component: MixtureComponent) -> str:
    return f"{component.corpus} (replay)" if component.replay else component.corpus
