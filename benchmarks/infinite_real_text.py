"""Infinite schedules against a cosine per split, over three splits without a shift: the table of docs/results.md.

    python benchmarks/infinite_real_text.py --data FOLDER --plot splits.png

Runs the recipe `splits` (configs/runs/splits) with one seed: cosine with re-warming, and infinite schedules with either
cooldown, each annealed over the last 12 steps of each split in a branch of its own. What is finished is not run again.
"""

from pathlib import Path

from continual_real_text import CONFIGS as SHIFT
from real_text import arguments, curve, last, stage

CONFIGS, ROOT = "configs/runs/splits", Path("runs/splits")
SPLIT, ANNEAL = 60, 12
SHAPES = {"cosine": "infinite, cosine cooldown", "inverse_sqrt": "infinite, inverse square root"}
PHASES = ("one", "two", "three")


def main() -> None:
    options = arguments(__doc__ or "")
    if not options.report:
        for corpus in ("web", "held_web"):
            stage("prepare", [f"{SHIFT}/{corpus}.gin"], **{"Source.directory": options.data})
        stage("train", [f"{CONFIGS}/cosine.gin"], {"run_dir": str(ROOT / "cosine_run")})
        for shape in SHAPES:
            stage("train", [f"{CONFIGS}/infinite.gin"], {"run_dir": str(ROOT / shape)}, **rate(shape))
            for number in range(1, 4):
                annealed(shape, number)
    print(table())
    if options.plot:
        plot(options.plot)


def rate(shape: str) -> dict[str, str]:
    return {"infinite_schedule.shape": shape}


def annealed(shape: str, splits: int) -> None:
    """What could be released after this number of splits."""
    where = {"run_dir": str(ROOT / f"{shape}_annealed_{splits}"), "init_from": str(ROOT / shape)}
    steps = splits * SPLIT - ANNEAL
    settings = rate(shape) | {"train.init_step": steps, "short/Phase.steps": SPLIT - ANNEAL}
    phases = ", ".join([*(f"@{name}/Phase()" for name in PHASES[: splits - 1]), "@short/Phase()", "@anneal/Phase()"])
    stage("train", [f"{CONFIGS}/anneal.gin"], where, bindings=[f"train.phases=[{phases}]"], **settings)


def table() -> str:
    """Markdown: held-out loss at the end of each split, and of what was annealed there."""
    lines = ["| schedule | after split 1 | 2 | 3 |", "|---|---|---|---|"]
    rows = {"cosine, re-warmed for each split": at_ends("cosine_run")}
    for shape, what in SHAPES.items():
        rows[what] = at_ends(shape)
        ends = [last(ROOT / f"{shape}_annealed_{splits}") for splits in range(1, 4)]
        rows[f"{what}, annealed"] = [end["web/loss"] if end else None for end in ends]
    for what, values in rows.items():
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_ends(name: str) -> list[float | None]:
    if not last(ROOT / name):
        return [None] * 3
    found = dict(zip(*curve(ROOT / name, "web/loss"), strict=True))
    return [found[SPLIT * number] for number in range(1, 4)]


def plot(path: str) -> None:
    """Loss and learning rate over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("tableau-colorblind10")
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained", height_ratios=[1, 2])
    for number, (name, what) in enumerate({"cosine_run": "cosine, re-warmed", **SHAPES}.items()):
        top.plot(*curve(ROOT / name, "learning_rate"), color=f"C{number}")
        bottom.plot(*curve(ROOT / name, "web/loss"), color=f"C{number}", label=what)
        for splits in range(1, 4):
            path_ = ROOT / f"{name}_annealed_{splits}"
            if last(path_):
                top.plot(*curve(path_, "learning_rate"), color=f"C{number}", linestyle=":")
                bottom.plot(*curve(path_, "web/loss"), color=f"C{number}", linestyle=":")
    top.set(ylabel="learning rate")
    bottom.set(ylabel="held-out loss", xlabel="steps")
    bottom.legend(frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
