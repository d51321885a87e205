"""MeCo with selective training on real text: the table of docs/results.md.

    python benchmarks/metadata_selective_real_text.py --data FOLDER

Runs the recipe `urls_selective` (configs/runs/urls_selective): with and without metadata for 90 % of the steps, each
causal and selective, equal tokens. What is finished is not run again.
"""

from pathlib import Path

from real_text import arguments, last, spread, stage

CONFIGS, ROOT = "configs/runs/urls_selective", Path("runs/urls_selective")
RUNS = {
    "standard_causal": "no metadata, causal",
    "standard_selective": "no metadata, selective 60 %",
    "meco_causal": "URL for 90 %, then cooldown, causal",
    "meco_selective": "URL for 90 %, then cooldown, selective 60 %",
}
MEASURES = {"target": "target loss", "plain": "loss on the twelve sources"}


def main() -> None:
    options = arguments(__doc__ or "")
    if not options.report:
        run(options.data, options.seeds)
    print(table(options.seeds))


def run(data: str, seeds: list[int]) -> None:
    for corpus in ("standard", "conditioned", "held", "clean", "target"):
        stage("prepare", [f"{CONFIGS}/{corpus}_text.gin"], **{"Source.directory": data})
    stage("train", [f"{CONFIGS}/reference.gin"])
    for corpus in ("standard", "plain", "conditioned"):
        removed = {"score.strip_metadata": corpus == "conditioned"}
        stage("score", [f"{CONFIGS}/common.gin"], {"corpus": str(ROOT / corpus)}, **removed)
    for seed in seeds:
        for name in RUNS:
            file, objective = name.split("_")
            bindings = ["Phase.selection=@Selection()"] if objective == "selective" else []
            where = {"run_dir": str(ROOT / f"seed{seed}/{name}")}
            stage("train", [f"{CONFIGS}/{file}.gin"], where, bindings, **{"train.seed": seed})


def table(seeds: list[int]) -> str:
    """Markdown: held-out loss at the end of each run."""
    lines = [f"| run | seeds | {' | '.join(MEASURES.values())} |", "|---|---|" + "---|" * len(MEASURES)]
    for name, what in RUNS.items():
        found = [end for seed in seeds if (end := last(ROOT / f"seed{seed}/{name}"))]
        if found:
            cells = [spread([end[f"{measure}/loss"] for end in found]) for measure in MEASURES]
            lines.append(f"| {what} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
