"""Which tokens train: scores, a share of the valid tokens, a scope. Pure functions; no gradient flows through a score.

Rho-1 (arXiv 2404.07965) Eq 3-5: excess loss = own loss - reference loss; the top k % train.
"""

import dataclasses

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slm_jax.errors import UserError

SCORES = ("excess", "loss", "reference", "entropy", "random")
SCOPES = ("batch", "sequence", "device")
RATIO_UNIT = 10_000  # ratios are exact to this fraction, so that counts are integers on every machine


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Selection:
    """The selective objective of a phase.

    score: `excess` (own loss - reference loss, high first; the paper's), `loss` (own, high first), `reference` and
      `entropy` (of the reference, low first: Rho-1 §3.4), `random`.
    ratio: share of the valid tokens that trains, in (0, 1].
    threshold: when given, tokens whose score is above it train instead of a share (scores that are "low first" are
      negated, so -2.0 keeps reference losses below 2.0).
    scope: the tokens that compete: those of the global `batch` (the paper's reading), of a `sequence` (row), or of the
      rows on one `device`.
    reference: name of the corpus' score column.
    """

    score: str = "excess"
    ratio: float = 0.6
    threshold: float | None = None
    scope: str = "batch"
    reference: str = "reference"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"Selection.score {self.score!r} is unknown: known are {', '.join(SCORES)}")
        if self.scope not in SCOPES:
            raise UserError(f"Selection.scope {self.scope!r} is unknown: known are {', '.join(SCOPES)}")
        if not 0 < self.ratio <= 1:
            raise UserError(f"Selection.ratio {self.ratio} is outside (0, 1]: 0.6 keeps 60 % of the valid tokens")

    def columns(self) -> tuple[str, ...]:
        """The score columns of the corpus that this selection reads."""
        statistic = {"excess": "loss", "reference": "loss", "entropy": "entropy"}.get(self.score)
        return (f"scores/{self.reference}/{statistic}",) if statistic else ()


def token_scores(
    selection: Selection, loss: Float[Array, "B L"], columns: dict[str, Float[Array, "B L"]], key: jax.Array
) -> Float[Array, "B L"]:
    """Score of each token in float32, high = train first. `columns` holds what `selection.columns()` names."""
    loss = jax.lax.stop_gradient(loss).astype(jnp.float32)
    read = [columns[name].astype(jnp.float32) for name in selection.columns()]
    if selection.score == "excess":
        return loss - read[0]
    if selection.score == "loss":
        return loss
    if selection.score == "random":
        return jax.random.uniform(key, loss.shape)
    return -read[0]


def kept_count(num_valid: Int[Array, "*G"], ratio: float) -> Int[Array, "*G"]:
    """round(ratio * num_valid) in exact integer arithmetic, at least 1 where anything is valid.

    The paper leaves rounding open; halves round up.
    """
    parts = round(ratio * RATIO_UNIT)
    whole, rest = num_valid // RATIO_UNIT, num_valid % RATIO_UNIT
    count = whole * parts + (rest * parts + RATIO_UNIT // 2) // RATIO_UNIT
    return jnp.minimum(jnp.maximum(count, 1), num_valid)


def select_share(
    scores: Float[Array, "B L"], valid: Bool[Array, "B L"], ratio: float, num_groups: int = 1
) -> Bool[Array, "B L"]:
    """The `kept_count` highest-scored valid tokens of each of `num_groups` equal groups of rows.

    Excluded tokens score -inf and are never selected; ties go to the lower position, so the count is exact.
    """
    grouped = jnp.where(valid, scores, -jnp.inf).reshape(num_groups, -1)
    count = kept_count(jnp.sum(valid.reshape(num_groups, -1), axis=1, dtype=jnp.int32), ratio)
    _, order = jax.lax.top_k(grouped, grouped.shape[1])  # equal values: lower index first
    within = jnp.arange(grouped.shape[1]) < count[:, None]
    group = jnp.arange(num_groups)[:, None]
    return jnp.zeros(grouped.shape, bool).at[group, order].set(within).reshape(scores.shape)


def select(
    selection: Selection, scores: Float[Array, "B L"], valid: Bool[Array, "B L"], num_devices: int = 1
) -> Bool[Array, "B L"]:
    """True for the tokens that train. `valid` must exclude non-finite scores; `num_devices` is the number of shards
    the rows are split into."""
    if selection.threshold is not None:
        return valid & (scores > selection.threshold)
    groups = {"batch": 1, "sequence": scores.shape[0], "device": num_devices}[selection.scope]
    return select_share(scores, valid, selection.ratio, groups)
