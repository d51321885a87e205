"""What run directories say of their runs: settings, metrics over training, results of `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.errors import UserError
from slm_jax.files import read_json
from slm_jax.run_directory import RunDirectory


class RunRecord(NamedTuple):
    """A run: the name of its folder, where it lies, what it was told, its rows of metrics.jsonl."""

    name: str
    path: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric: as logged in training, and as `evaluate` found it afterwards."""
        found = {row["step"]: row[metric] for row in self.rows if row.get(metric) is not None}
        for path in sorted((Path(self.path) / "evaluate").glob("*.json")):
            record = _json(path)
            value = record.get("results", {}).get(metric)
            if isinstance(value, int | float) and "step" in record:
                found[record["step"]] = value
        steps = sorted(found)
        return np.array(steps, float), np.array([found[step] for step in steps], float)

    def selective_phase(self) -> dict[str, Any] | None:
        """The last phase that selects, as JSON; None for a run that trained on every token."""
        phases = self.settings.get("phases") or []
        return next((phase for phase in reversed(phases) if phase.get("selection")), None)

    def counted(self, name: str) -> int | None:
        """`tokens_seen` or `tokens_trained`, as far as the run has come."""
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)


def read_run(run: str) -> dict[str, Any]:
    """run.json of a run directory; {} for a model directory without one."""
    path = Path(run) / "run.json"
    return _json(path) if path.exists() else {}


def read_records(runs: Sequence[str]) -> list[RunRecord]:
    """Reads runs, finished or not.

    Raises:
      UserError: there is no run, or two have one name.
    """
    records = []
    for run in runs:
        rows = RunDirectory(run).metrics()
        if not rows:
            raise UserError(f"{run} holds no metrics.jsonl: name the run directory of a train that has begun")
        records.append(RunRecord(Path(run).name, run, read_run(run).get("settings", {}), rows))
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called {max(names, key=names.count)!r}: give their folders different names")
    return records


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged (not JSON): restore it, or delete it and make it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (not an object): restore it, or delete it and make it again")
    return value
