"""MeCo against standard training on real text, equal tokens, three seeds: the table of docs/results.md.

    python benchmarks/metadata_real_text.py --data FOLDER --plot urls.png

Runs the recipe `urls` (configs/runs/urls) for each seed: no metadata, the host before each document for 90 % of the
steps, and to the end. Held-out documents are evaluated as they are, behind their own host, another document's, and one
for all. What is finished is not run again.
"""

from pathlib import Path

from real_text import arguments, curve, last, spread, stage

CONFIGS, ROOT = "configs/runs/urls", Path("runs/urls")
RUNS = {"standard_run": "standard", "meco": "meco", "no_cooldown": "no_cooldown"}
SHOWN = {"standard_run": "standard", "meco": "URL for 90 %, then cooldown", "no_cooldown": "URL to the end"}
MEASURES = {"plain": "no prefix", "own_url": "own host", "other_url": "another's host", "same_url": "one host for all"}


def main() -> None:
    options = arguments(__doc__ or "")
    if not options.report:
        for corpus in ("standard", "conditioned", "held"):
            stage("prepare", [f"{CONFIGS}/{corpus}_text.gin"], **{"Source.directory": options.data})
        for seed in options.seeds:
            for name, file in RUNS.items():
                where = {"run_dir": str(ROOT / f"seed{seed}/{name}")}
                stage("train", [f"{CONFIGS}/{file}.gin"], where, **{"train.seed": seed})
    print(table(options.seeds))
    if options.plot:
        plot(options.plot)


def table(seeds: list[int]) -> str:
    """Markdown: held-out loss with each prefix at the end of each run."""
    lines = [f"| run | seeds | {' | '.join(MEASURES.values())} |", "|---|---|" + "---|" * len(MEASURES)]
    for name, what in SHOWN.items():
        found = [end for seed in seeds if (end := last(ROOT / f"seed{seed}/{name}"))]
        if found:
            cells = [spread([end[f"{measure}/loss"] for end in found]) for measure in MEASURES]
            lines.append(f"| {what} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: str) -> None:
    """The first seed's losses over the steps, without a prefix and with the own host."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("tableau-colorblind10")
    figure, row = plt.subplots(1, 2, sharex=True, sharey=True, figsize=(10, 4), layout="constrained")
    for axes, measure in zip(row, ("plain", "own_url"), strict=True):
        for name, what in SHOWN.items():
            if last(ROOT / "seed0" / name):
                axes.plot(*curve(ROOT / "seed0" / name, f"{measure}/loss"), label=what)
        axes.set(title=f"held-out loss, {MEASURES[measure]}", xlabel="steps")
        axes.spines[["top", "right"]].set_visible(False)
    row[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
