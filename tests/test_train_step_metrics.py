"""From the sums of a step to a row of metrics."""

import numpy as np
import pytest

from slm_jax.metrics import MetricsWriter
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import Selection
from slm_jax.train import step_metrics
from slm_jax.train.step_metrics import StepMetrics

COUNTS = {"positions": 100, "valid_tokens": 80, "trained_tokens": 40, "loss_sum": 160, "trained_loss_sum": 100}
COUNTS |= {"untrained_loss_sum": 60, "nonfinite_scores": 0, "dropped_tokens": 0, "grad_norm": 1, "learning_rate": 0.1}
SUMS = {name: np.float32(value) for name, value in COUNTS.items()}


@pytest.mark.parametrize(
    ("selection", "whole_tokens"),
    [(None, 100), (Selection(score="loss"), 100), (Selection(score="loss", gradient="filtered"), (100 + 2 * 40) / 3)],
)
def test_mfu_counts_the_backward_pass_that_is_made(selection, whole_tokens, tmp_path, monkeypatch):
    now = iter([0.0, 4.0])  # the step takes four seconds
    monkeypatch.setattr(step_metrics.time, "perf_counter", lambda: next(now))
    writer = MetricsWriter(tmp_path, 0)
    StepMetrics(writer, ("a",), 0.0, 1, 6.0, 600.0, {}).add(1, 0, selection, SUMS)
    writer.close()
    (row,) = RunDirectory(tmp_path).metrics()
    assert row["mfu"] == pytest.approx(whole_tokens * 6.0 / 4.0 / 600.0)
    assert row["loss"] == 2.0 and row.get("selected_loss", 2.5) == 2.5
