"""What a step and an evaluation measured: rows of metrics, counters, and the stop when a loss is not finite."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from slm_jax import processes
from slm_jax.errors import UserError
from slm_jax.files import write_json_lines
from slm_jax.metrics import MetricsWriter, mean
from slm_jax.run_directory import RunDirectory
from slm_jax.score.kept_losses import KeptLosses, write_kept_losses
from slm_jax.score.selection import CombinedSelection, Selection, histories


class StepMetrics:
    """Counts tokens and time of a run and writes one row per logged step.

    `tokens_seen` counts tokens that have a loss, `tokens_per_second` all positions of the rows; `seconds` is the time
    of the steps, including compilation in the first one after a start. Checkpoints hold the counters (`counters()`), so
    that they survive a restart.

    Args:
      writer: of metrics.jsonl.
      source_names: what index i of the sums by source means.
      max_nonfinite_scores: maximum fraction of non-finite scores in a batch before the run stops.
      log_every: steps between rows.
      flops_per_token: of forward and backward pass together.
      peak_flops: of all devices, in FLOP/s; None leaves `mfu` out.
      counters: of the checkpoint that the run starts from.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        source_names: tuple[str, ...],
        max_nonfinite_scores: float,
        log_every: int,
        flops_per_token: float,
        peak_flops: float | None,
        counters: dict[str, float],
    ):
        self.writer, self.source_names = writer, source_names
        self.max_nonfinite_scores, self.log_every = max_nonfinite_scores, log_every
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._counters = {"tokens_seen": 0.0, "tokens_trained": 0.0, "seconds": 0.0} | counters
        self._last_time = time.perf_counter()
        self.last_row: dict[str, Any] = {}

    def counters(self) -> dict[str, float]:
        return dict(self._counters)

    def start_clock(self) -> None:
        """Starts timing anew: an evaluation or a checkpoint since the last step was not training."""
        self._last_time = time.perf_counter()

    def add(
        self,
        step: int,
        phase: int,
        selection: Selection | CombinedSelection | None,
        metric_sums: dict[str, Any],
    ) -> None:
        """Adds the sums of a step, waiting for the device until they are computed.

        Args:
          step: number of finished steps, this one included.
          phase: its number.
          selection: what the phase trains on.
          metric_sums: what the step returned beside the state.

        Raises:
          FloatingPointError: the loss or the gradient is not finite; names the step and the sources.
          UserError: `weights-unusable`: a weight is negative or not finite, although all losses are finite.
            `scores-not-finite`: more than `max_nonfinite_scores` of the tokens have no usable score.
        """
        sums = {name: np.asarray(value) for name, value in metric_sums.items()}
        self._stop_if_not_finite(step, sums)
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        self._counters["tokens_seen"] += float(sums["valid_tokens"])
        self._counters["tokens_trained"] += float(sums["trained_tokens"])
        self._counters["seconds"] += seconds
        self.last_row = self._row(phase, selection, sums, seconds)
        if step % self.log_every == 0:
            self.writer.write(step, self.last_row)

    def _row(
        self, phase: int, selection: Selection | CombinedSelection | None, sums: dict[str, np.ndarray], seconds: float
    ) -> dict[str, Any]:
        valid, trained, positions = sums["valid_tokens"], sums["trained_tokens"], float(sums["positions"])
        row = {"phase": phase, "loss": mean(sums["loss_sum"], valid)}
        if selection:
            row |= {
                "selected_loss": mean(sums["trained_loss_sum"], trained),
                "unselected_loss": mean(sums["untrained_loss_sum"], valid - trained),
                "selected_share": mean(trained, valid),
                "nonfinite_scores": int(sums["nonfinite_scores"]),
                "dropped_tokens": int(sums["dropped_tokens"]),
            }
        if "weight_sum" in sums:
            row |= {
                "weighted_loss": mean(sums["weighted_loss_sum"], sums["weight_sum"]),
                "weight_sum": float(sums["weight_sum"]),
            }
        row |= {
            "learning_rate": float(sums["learning_rate"]),
            "grad_norm": float(sums["grad_norm"]),
            "tokens_seen": int(self._counters["tokens_seen"]),
            "tokens_trained": int(self._counters["tokens_trained"]),
            "tokens_per_second": positions / seconds,
        }
        if self.peak_flops:
            # The backward pass is two thirds of a token's operations; the filtered one visits trained tokens only. Each
            # earlier state that selection compares with is one more forward pass.
            backward = float(trained) if selection and selection.gradient == "filtered" else positions
            forward = positions * (1 + len(histories(selection)))
            row["mfu"] = (forward + 2 * backward) / 3 * self.flops_per_token / seconds / self.peak_flops
        if len(self.source_names) > 1:
            for i, name in enumerate(self.source_names):
                row[f"loss/{name}"] = mean(sums["source_loss"][i], sums["source_valid"][i])
                if selection:
                    row[f"selected_share/{name}"] = mean(sums["source_trained"][i], sums["source_valid"][i])
                if "weight_sum" in sums:
                    row[f"mean_weight/{name}"] = mean(sums["source_weight"][i], sums["source_valid"][i])
        return row

    def _stop_if_not_finite(self, step: int, sums: dict[str, np.ndarray]) -> None:
        bad_weights = int(sums.get("bad_weights", 0))
        if bad_weights and np.isfinite(sums["loss_sum"]):  # otherwise the loss is to blame, from which weights follow
            raise UserError(
                "weights-unusable",
                f"step {step}: {bad_weights} of {int(sums['valid_tokens'])} tokens have a weight that is negative or "
                "not finite: correct Phase.weighting, or the column that it reads; the last checkpoint is from before "
                "this step",
            )
        if not all(np.isfinite(sums[name]) for name in ("trained_loss_sum", "loss_sum", "grad_norm")):
            counts = sums["source_not_finite"]
            sources = [f"{name} ({int(counts[i])} tokens)" for i, name in enumerate(self.source_names) if counts[i]]
            raise FloatingPointError(
                f"step {step}: the {'loss' if sources else 'gradient'} is not finite"
                f"{', in source ' + ', '.join(sources) if sources else ''}; the last checkpoint is from before this "
                "step: start again with a lower peak of the schedule or without that data"
            )
        nonfinite, valid = float(sums["nonfinite_scores"]), float(sums["valid_tokens"])
        if nonfinite > self.max_nonfinite_scores * max(valid, 1.0):
            raise UserError(
                "scores-not-finite",
                f"step {step}: {int(nonfinite)} of {int(valid)} tokens have a score that is not finite: score the "
                f"corpus again, or allow more with train.max_nonfinite_scores (now {self.max_nonfinite_scores})",
            )


def write_evaluation(run: RunDirectory, writer: MetricsWriter, step: int, results: Iterable[tuple[str, Any]]) -> None:
    """Writes what evaluators found: numbers as one row of metrics, token losses as a score column, a list as the lines
    of samples/EVALUATOR/STEP.jsonl. All processes evaluate, the first writes."""
    row = {}
    for name, value in results:
        evaluator = name.split("/")[0]
        if not processes.first():
            continue
        if isinstance(value, KeptLosses):
            write_kept_losses(str(run), evaluator, step, value)
        elif isinstance(value, list):
            write_json_lines(run.samples_file(evaluator, step), value)
        else:
            row[name] = value
    if row:
        writer.write(step, row)
