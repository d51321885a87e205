"""Metrics for people: rows of metrics.jsonl, TensorBoard, a progress bar."""

import math
import os
import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from slm_jax import messages, processes
from slm_jax.files import write_json_lines
from slm_jax.jsonl import ResumableJsonl
from slm_jax.run_directory import RunDirectory


def mean(total: Any, count: Any) -> float | None:
    """total / count as a Python float; None if nothing was counted."""
    return float(total) / float(count) if float(count) > 0 else None


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard. Of several processes only the first writes.

    A run that resumes at `first_step` drops later rows, written by a process that died after its last checkpoint, so
    that every step is in the file once.
    """

    def __init__(self, run_dir: str | os.PathLike, first_step: int = 0):
        self._writes = processes.first()
        if not self._writes:
            return
        directory = RunDirectory(run_dir)
        rows = directory.metrics() if first_step else []
        write_json_lines(directory.metrics_jsonl, [row for row in rows if row["step"] <= first_step])
        self._file = ResumableJsonl(directory.metrics_jsonl)
        self._board = _tensorboard().SummaryWriter(str(directory.tensorboard), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row; `step` is the number of finished steps. None and values that are not finite become null."""
        if not self._writes:
            return
        row = {name: _plain(value) for name, value in values.items()}
        self._file.append([{"step": step, **row}])
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writes:
            self._board.close()


def _tensorboard() -> Any:
    """The module tensorboardX, imported without PyTorch, which takes three seconds to import and is not needed."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] (Python's way to say: not installed)
    try:
        import tensorboardX
    finally:
        if absent:
            del sys.modules["torch"]
    return tensorboardX


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "dtype"):
        value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress(total: int, done: int, what: str, unit: str = "step") -> tqdm:
    """A progress bar with rate and remaining time, shown by the first process."""
    return messages.progress_bar(total=total, initial=done, desc=what, unit=unit, disable=not processes.first())
