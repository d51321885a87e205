"""The layout of a run directory: the path of each file, and readers of their contents. Imports no JAX.

    run.json        identity, settings, and one entry per start: versions, machine, command
    config.gin      the operative gin configuration, which is enough to repeat the run
    vocabulary/     the vocabulary of the corpora
    checkpoints/    STEP/: parameters, optimizer state, counters
    metrics.jsonl   one row per logged step or evaluation
    tensorboard/    the same numbers
    token_losses/   EVALUATOR/STEP.npy: per-token losses [rows, L] of evaluators of earlier versions; now score columns
    samples/        EVALUATOR/STEP.jsonl: texts that evaluators generated
    summary.json    written at the end of the run
    plan.png        drawn by `train --dry_run`
    evaluate/       STEP*.json, written by the stage `evaluate`
    math/           STEP/, with tools STEP_tools/, written by `evaluate math`

Directories made by `import` or `average` have run.json or none, checkpoints/ and vocabulary/.
"""

import os
from pathlib import Path
from typing import Any

from slm_jax.errors import UserError
from slm_jax.files import parse_json_lines, read_json
from slm_jax.renamed import with_new_keys

_mentioned: set[tuple[str, int]] = set()  # damaged lines already reported by this process


class RunDirectory:
    """Paths and readers of a run directory, which may not exist yet.

    Raises:
      UserError: `run-dir-remote`: a URL; `run-dir-wildcard`: its path holds `[`, `]`, `*`, `?` or a backslash, which
        Orbax would read as a pattern for other directories.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if "://" in os.fspath(path):
            raise UserError("run-dir-remote", f"run directory {path} is a URL: name a local directory")
        if found := set(str(self.path.absolute())) & set("[]*?\\"):
            raise UserError(
                "run-dir-wildcard",
                f"run directory {self.path.absolute()}: checkpoints cannot be read where the path holds "
                f"{' '.join(sorted(found))}: rename it or choose another",
            )
        self.run_json = self.path / "run.json"
        self.config_gin = self.path / "config.gin"
        self.vocabulary = self.path / "vocabulary"
        self.checkpoints = self.path / "checkpoints"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.token_losses = self.path / "token_losses"
        self.samples = self.path / "samples"
        self.summary_json = self.path / "summary.json"
        self.plan_png = self.path / "plan.png"
        self.lock = self.path / "lock"
        self.evaluate = self.path / "evaluate"

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def token_losses_files(self, evaluator: str) -> dict[int, Path]:
        """Step -> file of the per-token losses that an evaluator of an earlier version kept, in the order of steps."""
        return dict(sorted((int(file.stem), file) for file in (self.token_losses / evaluator).glob("*.npy")))

    def samples_file(self, evaluator: str, step: int) -> Path:
        return self.samples / evaluator / f"{step}.jsonl"

    def math(self, step: int, tools: bool = False) -> Path:
        """Folder of the results of `evaluate math` at a step; solve/STEP if an earlier version wrote it."""
        name = f"{step}_tools" if tools else str(step)
        old = self.path / "solve" / name
        return old if old.is_dir() else self.path / "math" / name

    def record(self) -> dict[str, Any]:
        """run.json with current keys; {} if the file is missing.

        Raises:
          UserError: `file-damaged`.
        """
        record = read_json(self.run_json) if self.run_json.is_file() else {}
        for name, kind in (("identity", dict), ("settings", dict), ("starts", list)):
            if not isinstance(record.get(name, kind()), kind):
                raise UserError("file-damaged", f"{self.run_json} is damaged ({name}): restore it or train again")
        return record

    def settings(self) -> dict[str, Any]:
        """Settings of the run, `model`, `phases` and so on, as JSON; {} without a run.json."""
        return self.record().get("settings", {})

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same experiment: model, seed, corpora, references, where it started from."""
        return self.record().get("identity", {})

    def starts(self) -> list[dict[str, Any]]:
        """One entry per start: versions, commit, command, devices."""
        return self.record().get("starts", [])

    def planned_steps(self) -> int | None:
        """Steps of all phases; None before the run began, or if it is not a train run."""
        phases = self.settings().get("phases")
        return sum(phase["steps"] for phase in phases) if phases else None

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, each with its `step`. A last row that a kill cut short is left out; a damaged line
        before the end is skipped and, once per process, reported with its number."""
        rows = []
        content = self.metrics_jsonl.read_bytes() if self.metrics_jsonl.is_file() else b""
        for number, row in parse_json_lines(content):
            if row is not None and "step" in row:
                rows.append(with_new_keys(row))
            elif (place := (str(self.metrics_jsonl.absolute()), number)) not in _mentioned:
                _mentioned.add(place)
                print(f"{self.metrics_jsonl}, line {number}, is damaged: it is skipped")
        return rows

    def summary(self) -> dict[str, Any] | None:
        """summary.json; None until the run is finished.

        Raises:
          UserError: `file-damaged`.
        """
        summary = read_json(self.summary_json) if self.summary_json.is_file() else None
        if summary is not None and not isinstance(summary.get("steps"), int):
            raise UserError("file-damaged", f"{self.summary_json} is damaged (no steps): delete it and train again")
        return summary

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints, ascending; judged by the names of their folders."""
        return sorted(int(path.name) for path in self.checkpoints.glob("*") if path.name.isdecimal())

    def evaluations(self) -> list[dict[str, Any]]:
        """Results of the stage `evaluate` for this run, in the order of file names: `step`, `results` and more.

        Raises:
          UserError: `file-damaged`.
        """
        return [read_json(file) for file in sorted(self.evaluate.glob("*.json"))]
