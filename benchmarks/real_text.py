"""What the scripts on real text share: stages as commands, runs of several seeds, tables of their last losses."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import numpy as np

from slm_jax.__main__ import main as slm_jax
from slm_jax.run_directory import RunDirectory


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the text that the recipe's gin files name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot of what is there")
    parser.add_argument("--plot", default=None, help="PNG of the curves")
    return parser.parse_args()


def stage(
    name: str, files: Sequence[str], text: dict[str, str] | None = None, bindings: Sequence[str] = (), **settings: Any
) -> None:
    """`slm-jax NAME` with gin files, settings that are text, gin bindings as they are, and values to bind."""
    command = [name, *(f"--gin_file={file}" for file in files)]
    command += [f"--{key}={value}" for key, value in (text or {}).items()]
    command += [f"--gin.{binding}" for binding in bindings]
    command += [f"--gin.{key}={value!r}" for key, value in settings.items()]
    if slm_jax(command):
        raise SystemExit(f"{' '.join(command)} failed")
    if name == "train" and not (Path(gin.query_parameter("train.run_dir")) / "summary.json").exists():
        raise SystemExit("terminated: the same command continues")  # what follows must not start from half a run


def last(run_dir: Path) -> dict[str, float] | None:
    """The last value of each metric of a finished run; None while it is not finished."""
    path = run_dir / "summary.json"
    return json.loads(path.read_text())["last"] if path.exists() else None


def curve(run_dir: Path, metric: str) -> tuple[list[int], list[float]]:
    """(steps, values) of an evaluation."""
    rows = [(row["step"], row[metric]) for row in RunDirectory(run_dir).metrics() if metric in row]
    return [step for step, _ in rows], [value for _, value in rows]


def spread(values: Sequence[float]) -> str:
    """Mean, and lowest to highest where there are several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
