"""Selective against causal training on real text, three seeds: the table of docs/results.md.

    python benchmarks/selective_real_text.py --data FOLDER --output results.json

Runs the recipe `math_web` (configs/runs/math_web) for each seed, every stage of it, and prints a Markdown table of
means and ranges. What is finished is not run again. About an hour and a half on two cores.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from slm_jax.demo.pipeline import demo

SCRATCH = (
    *("reference", "score", "score_clean", "causal", "selective", "filtered", "random", "selective_short"),
    *("mixed_causal", "mixed_selective"),
)
MEASURES = ("target_loss", "target_bits_per_byte", "general_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    for stages in (SCRATCH, ()):  # all seeds from scratch first, then the rest of the recipe: the continual runs
        for seed in arguments.seeds:
            demo(recipe="math_web", data=arguments.data, stages=stages, seed=seed)
    root = Path("runs/math_web")
    files = [(root if seed == 0 else root / f"seed{seed}") / "summary.json" for seed in arguments.seeds]
    summaries = [json.loads(file.read_text()) for file in files]
    print(table(summaries))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(summaries, indent=2) + "\n")


def table(summaries: list[dict]) -> str:
    """Markdown: a run a line; mean over seeds and (lowest to highest)."""
    lines = [
        "| run | target loss | bits per byte | general loss | steps to causal's target loss | tokens seen, trained (M) "
        "| TFLOP training + scoring |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in summaries[0]["runs"]:
        cells = [_spread([s["runs"][name][measure] for s in summaries], 3) for measure in MEASURES]
        crossings = [s[key].get(name) for s in summaries for key in s if key.startswith("steps_to") and name in s[key]]
        lines.append(f"| {name} | {' | '.join(cells)} | {_steps(crossings)} | {_cost(summaries[0]['runs'][name])} |")
    cells = [_spread([s["reference"][measure] for s in summaries], 3) for measure in MEASURES]
    return "\n".join([*lines, f"| the reference itself | {' | '.join(cells)} | | {_cost(summaries[0]['reference'])} |"])


def _cost(run: dict) -> str:
    tokens = f"{run['tokens_seen'] / 1e6:.2f}, {run['tokens_trained'] / 1e6:.2f}"
    return f"{tokens} | {run['training_flops'] / 1e12:.1f} + {run['scoring_flops'] / 1e12:.1f}"


def _spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _steps(crossings: list[int | None]) -> str:
    return ", ".join("never" if step is None else str(step) for step in crossings)


if __name__ == "__main__":
    main()
