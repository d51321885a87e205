"""From sums on devices to numbers people read: JSONL, TensorBoard, progress bar."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slm_jax import processes
from slm_jax.renamed import with_new_keys


def mean(total: Any, count: Any) -> float | None:
    """total / count as a Python float; None where nothing was counted."""
    return float(total) / float(count) if float(count) > 0 else None


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard.

    A resumed run starts at `first_step`: rows from there on were written by a process that died after its last
    checkpoint, and are cut, so that every step stands in the file once. Of several processes only the first writes.
    """

    def __init__(self, run_dir: str | Path, first_step: int = 0):
        self._writes = processes.first()
        if not self._writes:
            return
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(run_dir) if row["step"] <= first_step] if first_step else []
        partial = self.path.with_name("metrics.jsonl.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        import tensorboardX  # here: it imports PyTorch where that is installed, three seconds for those who only read

        self._file = self.path.open("a")
        self._board = tensorboardX.SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One row: `step` is the number of finished steps. None and NaN become null."""
        if not self._writes:
            return
        row = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "dtype"):
        value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All rows of a run; a last line that a kill cut in the middle is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(with_new_keys(json.loads(line)))
            except json.JSONDecodeError:
                break
    return rows


def progress(total: int, done: int, what: str, unit: str = "step") -> tqdm:
    """A progress bar with rate and ETA, of the first process."""
    hidden = not processes.first()
    return tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, mininterval=0.5, disable=hidden)
