"""Scalars of the global step, composed from optax schedules."""

import dataclasses

import gin
import optax

from slm_jax.errors import UserError


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up from 0 to `peak`, then `cosine` down to `peak * final`, or `constant`.

    warmup: a share of the run below 1, a number of steps from 1 on.
    """

    peak: float = 3e-4
    kind: str = "cosine"
    warmup: float = 0.01
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "constant"):
            raise UserError(f"Schedule.kind {self.kind!r} is unknown: known are cosine, constant")
        if self.peak <= 0 or self.warmup < 0 or not 0 <= self.final <= 1:
            raise UserError(f"{self}: peak is above 0, warmup not below 0, final a share of peak in [0, 1]")


def learning_rate(schedule: Schedule, total_steps: int) -> optax.Schedule:
    """t -> learning rate, t in [0, total_steps] (PAPERS §3.1 Eq 1, 2). The n-th step, counted from 1, applies t = n.

    Raises:
      UserError: the warm-up does not fit into the run.
    """
    warmup = round(schedule.warmup * total_steps) if schedule.warmup < 1 else round(schedule.warmup)
    if warmup >= total_steps:
        raise UserError(f"Schedule.warmup takes {warmup} steps, the run has {total_steps}: shorten it")
    if schedule.kind == "constant":
        after: optax.Schedule = optax.constant_schedule(schedule.peak)
    else:
        after = optax.cosine_decay_schedule(schedule.peak, total_steps - warmup, alpha=schedule.final)
    return (
        optax.join_schedules([optax.linear_schedule(0.0, schedule.peak, warmup), after], [warmup]) if warmup else after
    )
