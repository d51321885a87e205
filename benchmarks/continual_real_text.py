"""Continual pre-training on real text under a weak and a strong shift: the tables of docs/results.md.

    python benchmarks/continual_real_text.py --data FOLDER --plot shift.png

Runs the recipe `shift` (configs/runs/shift): a base model on the web, then books (weak) or German (strong) with no
replay and several shares of it, not re-warmed, and both from scratch. Three seeds for the pairs that carry a claim, one
for the rest. What is finished is not run again.
"""

from pathlib import Path

from real_text import arguments, curve, last, spread, stage

CONFIGS, ROOT = "configs/runs/shift", Path("runs/shift")
CORPORA = ("web", "books", "german", "held_web", "held_books", "held_german")
SHIFTS = {"weak": "books", "strong": "german"}
PAPERS_SHARE = {"weak": 5, "strong": 25}  # what the paper takes for each
SHARES = (1, 5, 25, 50)
BASE_STEPS, STEPS = 150, 120


def main() -> None:
    options = arguments(__doc__ or "")
    if not options.report:
        run(options.data, options.seeds)
    for shift in SHIFTS:
        print(f"\n{shift}\n{table(shift, options.seeds)}")
    if options.plot:
        plot(options.plot)


def run(data: str, seeds: list[int]) -> None:
    for corpus in CORPORA:
        stage("prepare", [f"{CONFIGS}/{corpus}.gin"], **{"Source.directory": data})
    for seed in seeds:
        stage("train", [f"{CONFIGS}/base.gin"], {"run_dir": str(ROOT / f"seed{seed}/base")}, **{"train.seed": seed})
        for shift in SHIFTS:
            for share in (0, PAPERS_SHARE[shift]):
                continued(shift, seed, f"{shift}_{share}", share)
            union(shift, seed, f"{shift}_union", BASE_STEPS + STEPS)
    for shift in SHIFTS:
        for share in SHARES:
            continued(shift, seeds[0], f"{shift}_{share}", share)
        continued(shift, seeds[0], f"{shift}_constant", 0, rewarmed=False)
        union(shift, seeds[0], f"{shift}_union_short", STEPS)


def continued(shift: str, seed: int, name: str, share: int, rewarmed: bool = True) -> None:
    """The branch of the seed's base run that continues with the second data and `share` percent of replay."""
    file = "replay" if share else "weak" if rewarmed else "constant"
    settings = {"train.seed": seed, "second/MixtureComponent.corpus": str(ROOT / SHIFTS[shift])}
    settings |= {"replayed/MixtureComponent.weight": share / 100} if share else {}
    where = {"run_dir": str(ROOT / f"seed{seed}/{name}"), "init_from": str(ROOT / f"seed{seed}/base")}
    stage("train", [f"{CONFIGS}/{file}.gin"], where, **settings)


def union(shift: str, seed: int, name: str, steps: int) -> None:
    settings = {"train.seed": seed, "Phase.steps": steps, "second/MixtureComponent.corpus": str(ROOT / SHIFTS[shift])}
    stage("train", [f"{CONFIGS}/union.gin"], {"run_dir": str(ROOT / f"seed{seed}/{name}")}, **settings)


def table(shift: str, seeds: list[int]) -> str:
    """Markdown: loss on both, and how much the web's rose over the base model's."""
    new = SHIFTS[shift]
    lines = [
        f"| run | seeds | steps after the base | web loss | {new} loss | mean of both | web forgotten |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"base": ("base: web alone", 0)}
    names |= {f"{shift}_{share}": (f"then {new}, replay {share} %", STEPS) for share in (0, *SHARES)}
    names |= {f"{shift}_constant": (f"then {new}, replay 0 %, not re-warmed", STEPS)}
    names |= {f"{shift}_union": (f"both from scratch, {BASE_STEPS + STEPS} steps", BASE_STEPS + STEPS)}
    names |= {f"{shift}_union_short": (f"both from scratch, {STEPS} steps", STEPS)}
    for name, (what, steps) in names.items():
        found = [(last(ROOT / f"seed{seed}/{name}"), last(ROOT / f"seed{seed}/base")) for seed in seeds]
        found = [(end, base) for end, base in found if end and base]
        if not found:
            continue
        web, other = ([end[f"{metric}/loss"] for end, _ in found] for metric in ("web", new))
        forgotten = [end["web/loss"] - base["web/loss"] for end, base in found]
        mean = [(a + b) / 2 for a, b in zip(web, other, strict=True)]
        cells = [spread(values) for values in (web, other, mean, forgotten)]
        lines.append(f"| {what} | {len(found)} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: str) -> None:
    """For each shift, the first seed: loss on the web and on the new data over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = (0, *SHARES)
    lines = {str(share): {"color": plt.get_cmap("viridis")(i / len(shares))} for i, share in enumerate(shares)}
    lines |= {"constant": {"color": "C1", "linestyle": "--"}, "union": {"color": "black", "linestyle": ":"}}
    names = {str(share): f"replay {share} %" for share in shares}
    names |= {"constant": "replay 0 %, not re-warmed", "union": "both from scratch"}
    figure, grid = plt.subplots(2, 2, sharex=True, figsize=(10, 7), layout="constrained")
    for row, (shift, new) in zip(grid, SHIFTS.items(), strict=True):
        for axes, metric in zip(row, ("web", new), strict=True):
            steps, base = curve(ROOT / "seed0/base", f"{metric}/loss")
            axes.plot(steps, base, color="0.4", label="web alone")
            for name, style in lines.items():
                if last(ROOT / f"seed0/{shift}_{name}"):
                    at, values = curve(ROOT / f"seed0/{shift}_{name}", f"{metric}/loss")
                    if name != "union":  # a branch begins where the base ends
                        at, values = [steps[-1], *at], [base[-1], *values]
                    axes.plot(at, values, label=names[name], **style)
            axes.set(title=f"{shift} shift: loss on {metric}", xlabel="steps")
            axes.spines[["top", "right"]].set_visible(False)
            axes.axvline(BASE_STEPS, color="0.7", linewidth=0.8, linestyle="--")
        row[1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
