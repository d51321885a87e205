"""Which tokens train: scores, a share of the valid tokens, a scope. Pure functions; no gradient flows through a score.

Rho-1 (arXiv 2404.07965) Eq 3-5: excess loss = own loss - reference loss; the top k % train.
"""

import dataclasses
import math

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slm_jax import mesh
from slm_jax.errors import UserError

SCORES = ("excess", "loss", "reference", "entropy", "random")
SCOPES = ("batch", "micro_batch", "sequence", "device")
GRADIENTS = ("exact", "filtered")
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
    scope: the tokens that compete: those of the global `batch` (the paper's reading), of a `micro_batch` over all
      devices, of a `sequence` (row), or of the rows on one `device`. With micro-batches, `batch` and `device` cost a
      first pass without gradient over all of them; `micro_batch` and `sequence` do not.
    reference: name of the corpus' score column.
    gradient: `exact`, or `filtered`: the whole backward pass runs over the selected tokens only, with the keys and
      values of the others held constant (the idea of Collider, arXiv 2502.00340). Cheaper; not the same gradient.
    capacity: share of a device's positions that a filtered backward has room for; None is `ratio`, and a tenth more
      where several devices share one choice. Beyond it the lowest scores are dropped, and counted.
    """

    score: str = "excess"
    ratio: float = 0.6
    threshold: float | None = None
    scope: str = "batch"
    reference: str = "reference"
    gradient: str = "exact"
    capacity: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("score", SCORES), ("scope", SCOPES), ("gradient", GRADIENTS)):
            if getattr(self, name) not in known:
                raise UserError(f"Selection.{name} {getattr(self, name)!r} is unknown: known are {', '.join(known)}")
        if not 0 < self.ratio <= 1:
            raise UserError(f"Selection.ratio {self.ratio} is outside (0, 1]: 0.6 keeps 60 % of the valid tokens")
        if self.capacity is not None and not 0 < self.capacity <= 1:
            raise UserError(f"Selection.capacity {self.capacity} is outside (0, 1]: it is a share of the positions")
        if self.gradient == "filtered" and self.threshold is not None and self.capacity is None:
            raise UserError(
                "Selection.threshold keeps an unknown share: a filtered gradient needs Selection.capacity, the share "
                "of the positions it has room for"
            )

    def columns(self) -> tuple[str, ...]:
        """The score columns of the corpus that this selection reads."""
        statistic = {"excess": "loss", "reference": "loss", "entropy": "entropy"}.get(self.score)
        return (f"scores/{self.reference}/{statistic}",) if statistic else ()


def row_capacity(selection: Selection, batch_shape: tuple[int, ...], micro_batches: int = 1) -> int:
    """Tokens that a filtered backward holds on each device in each micro-batch of a global batch of [B, L]."""
    shards = mesh.num_shards()
    rows, length = batch_shape[0] // (shards * micro_batches), batch_shape[1]
    if selection.capacity:
        return math.ceil(selection.capacity * rows * length)
    sharing = {"batch": shards * micro_batches, "micro_batch": shards, "device": micro_batches, "sequence": 1}
    share = selection.ratio * (1.1 if sharing[selection.scope] > 1 else 1.0)
    rounding = rows if selection.scope == "sequence" else 1  # each group rounds its count, and keeps at least 1
    return min(rows * length, math.ceil(share * rows * length) + rounding)


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


def kept_count(num_valid: Int[Array, "*G"], ratio: float | Float[Array, ""]) -> Int[Array, "*G"]:
    """round(ratio * num_valid) in exact integer arithmetic, at least 1 where anything is valid.

    The paper leaves rounding open; halves round up.
    """
    parts = jnp.round(jnp.asarray(ratio, jnp.float32) * RATIO_UNIT).astype(jnp.int32)
    whole, rest = num_valid // RATIO_UNIT, num_valid % RATIO_UNIT
    count = whole * parts + (rest * parts + RATIO_UNIT // 2) // RATIO_UNIT
    return jnp.minimum(jnp.maximum(count, 1), num_valid)


def select_share(
    scores: Float[Array, "B L"], valid: Bool[Array, "B L"], ratio: float | Float[Array, ""], scope: str = "batch"
) -> Bool[Array, "B L"]:
    """The `kept_count` highest-scored valid tokens of the batch, of each sequence or of each device's rows.

    Excluded tokens are never selected; ties go to the lower position, so the count is exact.
    """
    keys = _ordered_bits(scores, valid)
    if scope == "sequence":
        return _largest(keys, kept_count(_totals(keys > 0), ratio))
    keys, across = mesh.by_shard(keys), scope != "device"
    return mesh.to_rows(_largest(keys, kept_count(_totals(keys > 0, across), ratio), across), scores.shape[1])


def _ordered_bits(scores: Float[Array, "G N"], valid: Bool[Array, "G N"]) -> jax.Array:
    """uint32 in the order of the scores; 0, below every number, where not valid."""
    scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # -0.0 equals 0.0
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(valid, jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31)), jnp.uint32(0))


def _totals(x: Bool[Array, "G N"], across: bool = False) -> Int[Array, "T 1"]:
    """How many are True in each group, or `across` all of them."""
    return jnp.sum(x, axis=(0, 1) if across else 1, keepdims=True, dtype=jnp.int32)


def _largest(keys: Array, count: Int[Array, "T 1"], across: bool = False) -> Bool[Array, "G N"]:
    """True for the `count` largest keys of each group (or `across` all groups), equal ones in order of position.

    The count-th largest key is found bit by bit, two bits a round, by counting: no sort, and between devices nothing
    but three counts a round travels, and one per device for the ties.
    """

    def two_bits(round_: jax.Array, found: jax.Array) -> jax.Array:
        shift = (30 - 2 * round_).astype(jnp.uint32)
        reached = [_totals(keys >= found + (jnp.uint32(i) << shift), across) >= count for i in (1, 2, 3)]
        return found + (sum(r.astype(jnp.uint32) for r in reached) << shift)

    least = jax.lax.fori_loop(0, 16, two_bits, jnp.zeros(count.shape, jnp.uint32))
    above, equal = keys > least, (keys == least) & (keys > 0)
    earlier = jnp.cumsum(equal, axis=1, dtype=jnp.int32) - equal
    if across:
        ties = _totals(equal)
        earlier += jnp.cumsum(ties, axis=0) - ties
    return above | (equal & (earlier < count - _totals(above, across)))


def select(
    selection: Selection,
    scores: Float[Array, "B L"],
    valid: Bool[Array, "B L"],
    ratio: Float[Array, ""] | None = None,
) -> Bool[Array, "B L"]:
    """True for the tokens that train. `valid` must exclude non-finite scores; `ratio` stands in for selection.ratio."""
    if selection.threshold is not None:
        return valid & (scores > selection.threshold)
    return select_share(scores, valid, selection.ratio if ratio is None else ratio, selection.scope)


def within_capacity(
    selection: Selection, scores: Float[Array, "B L"], chosen: Bool[Array, "B L"], micro_batches: int = 1
) -> Bool[Array, "B L"]:
    """The chosen tokens that a filtered backward has room for on each device in each micro-batch (rows m, m + parts,
    ...): of more than `row_capacity` the highest-scored."""
    shards, length = mesh.num_shards(), scores.shape[1]
    keys = mesh.by_shard(_ordered_bits(scores, chosen))
    keys = keys.reshape(shards, -1, micro_batches, length).swapaxes(1, 2)
    groups = keys.reshape(shards * micro_batches, -1)
    capacity = row_capacity(selection, scores.shape, micro_batches)
    kept = _largest(groups, jnp.full((len(groups), 1), capacity, jnp.int32))
    kept = kept.reshape(keys.shape).swapaxes(1, 2)
    return mesh.to_rows(kept.reshape(shards, -1), length)
