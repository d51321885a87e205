"""Step sums -> metric rows, counters and the stop on NaN."""

import time
from typing import Any

import numpy as np

from slm_jax.errors import UserError
from slm_jax.metrics import MetricsWriter, mean
from slm_jax.score.selection import CombinedSelection, Selection


class Record:
    """Counts tokens and time of a run and writes one row per logged step.

    `tokens_seen` counts tokens that have a loss, `tokens_per_second` all positions of the rows; `seconds` is the time
    of the steps, the compilation in the first one of a start included. Counters go into every checkpoint (`counters()`)
    and come back from it, so that they survive a restart.
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
        """Time runs from here: what happened since the last step (evaluation, a checkpoint) is not training."""
        self._last_time = time.perf_counter()

    def add(self, step: int, phase: int, selection: Selection | CombinedSelection | None, sums: dict[str, Any]) -> None:
        """Takes the sums of the step that made `step` finished steps; waits for the device until they are there.
        `phase` is its number, `selection` what it trains on.

        Raises:
          FloatingPointError: the loss or the gradient is not finite; names the step and the sources.
          UserError: too large a share of the tokens has no usable score.
        """
        sums = {name: np.asarray(value) for name, value in sums.items()}
        self._stop_on_nan(step, sums)
        self._stop_on_unusable(step, sums)
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        self._counters["tokens_seen"] += float(sums["valid_tokens"])
        self._counters["tokens_trained"] += float(sums["trained_tokens"])
        self._counters["seconds"] += seconds
        self.last_row = self._row(phase, selection, sums, seconds)
        if step % self.log_every == 0:
            self.writer.write(step, self.last_row)

    def _row(
        self, phase: int, selection: Selection | CombinedSelection | None, sums: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        valid, trained = sums["valid_tokens"], sums["trained_tokens"]
        row = {"phase": phase, "loss": mean(sums["loss_sum"], valid)}
        if selection:
            row |= {
                "selected_loss": mean(sums["trained_loss_sum"], trained),
                "unselected_loss": mean(sums["untrained_loss_sum"], valid - trained),
                "selected_share": mean(trained, valid),
                "nonfinite_scores": int(sums["nonfinite_scores"]),
                "dropped_tokens": int(sums["dropped_tokens"]),
            }
        row |= {
            "learning_rate": float(sums["learning_rate"]),
            "grad_norm": float(sums["grad_norm"]),
            "tokens_seen": int(self._counters["tokens_seen"]),
            "tokens_trained": int(self._counters["tokens_trained"]),
        }
        row["tokens_per_second"] = float(sums["positions"]) / seconds
        if self.peak_flops:
            # A filtered backward, two thirds of a token's operations, is over the trained tokens only.
            backward = float(trained if selection and selection.gradient == "filtered" else sums["positions"])
            whole_tokens = (float(sums["positions"]) + 2 * backward) / 3
            row["mfu"] = whole_tokens * self.flops_per_token / seconds / self.peak_flops
        if len(self.source_names) > 1:
            for i, name in enumerate(self.source_names):
                row[f"loss/{name}"] = mean(sums["source_loss"][i], sums["source_valid"][i])
                if selection:
                    row[f"selected_share/{name}"] = mean(sums["source_trained"][i], sums["source_valid"][i])
        return row

    def _stop_on_nan(self, step: int, sums: dict[str, Any]) -> None:
        if np.isfinite(sums["trained_loss_sum"]) and np.isfinite(sums["loss_sum"]) and np.isfinite(sums["grad_norm"]):
            return
        counts = sums["source_not_finite"]
        sources = [f"{name} ({int(counts[i])} tokens)" for i, name in enumerate(self.source_names) if counts[i]]
        raise FloatingPointError(
            f"step {step}: the {'loss' if sources else 'gradient'} is not finite"
            f"{', in source ' + ', '.join(sources) if sources else ''}; the last checkpoint is from before it: start "
            "again with a lower peak of the schedule or without that data"
        )

    def _stop_on_unusable(self, step: int, sums: dict[str, Any]) -> None:
        unusable, valid = float(sums["nonfinite_scores"]), float(sums["valid_tokens"])
        if unusable > self.max_nonfinite_scores * max(valid, 1.0):
            raise UserError(
                f"step {step}: {int(unusable)} of {int(valid)} tokens have a score that is not finite: score the "
                f"corpus again, or allow a share with train.max_nonfinite_scores (now {self.max_nonfinite_scores})"
            )
