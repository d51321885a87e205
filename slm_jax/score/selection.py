"""Which tokens train: losses to scores to a mask. Pure functions; no gradient flows through a score.

Rho-1 (arXiv 2404.07965) Eq 3-5: excess loss = own loss - reference loss; the top k % train. Appendix H: the
intersection or union of two selections.

With the default scope the selected set is that of `jax.lax.top_k` over the flattened global batch, ties included (tests
compare it with `top_k_oracle`). top_k would gather all scores on every device; the bisection used here (`_largest`)
exchanges three counts in each of 16 rounds. Shapes: G groups (shards or rows) of N tokens; T totals, G of them or 1.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slm_jax import mesh
from slm_jax.configurable import Count, Natural, OneOf, PositiveShare, configurable
from slm_jax.data.scores import ScoreName
from slm_jax.errors import UserError
from slm_jax.files import to_json

SCORES = ("excess", "loss", "own_entropy", "difference", "reference", "entropy", "random")
LOW_FIRST = ("reference", "entropy")  # scores whose low values train first, unless Selection.order says otherwise
ORDERS = ("high", "low", "middle")
HISTORIES = ("average", "lagged")
SCOPES = ("batch", "micro_batch", "sequence", "device")
GRADIENTS = ("exact", "filtered")
COMBINE = {
    "mean": lambda x: jnp.mean(x, axis=0),
    "min": lambda x: jnp.min(x, axis=0),
    "max": lambda x: jnp.max(x, axis=0),
}
KEEPS = {"intersection": jnp.logical_and, "union": jnp.logical_or}
RATIO_UNIT = 10_000  # ratios are exact to this fraction, so that counts are the same integers on every machine


@configurable
@dataclasses.dataclass(frozen=True)
class Selection:
    """The rule that decides which tokens of a batch train.

    Attributes:
      score: `excess` (own loss minus reference loss, high first; the paper's), `loss` (own loss, high first),
        `own_entropy` (of the model's own prediction, high first: ESLM, arXiv 2505.19893), `difference` (the loss of
        `reference` minus that of `minus`, high first: Token Cleaning, arXiv 2502.01968), `reference` and `entropy` (the
        reference's loss and entropy, low first: Rho-1 §3.4), or `random`.
      ratio: fraction of the valid tokens that trains, in (0, 1].
      threshold: if given, tokens whose score is above it train instead of a fraction. Scores that are low first are
        negated, so -2.0 keeps reference losses below 2.0.
      order: which values of the score train first: `high`, `low`, or those in the `middle`, with as many tokens left
        out above as below. None uses the score's own order.
      scope: which tokens compete: those of the global `batch` (the paper's reading), of a `micro_batch` over all
        devices, of a `sequence` (row), or of the rows on one `device`. With gradient accumulation, `batch` and
        `device` need an additional forward pass over all micro-batches; `micro_batch` and `sequence` do not.
      reference: name of the corpus' score column, or a list of names for several references.
      combine: how several references are combined per token: the `mean`, `min` or `max` of their losses (for
        `entropy`, of their entropies). `min` uses the best-predicting reference, `max` the worst.
      gradient: `exact`, or `filtered`: the backward pass runs over the selected tokens only, with the keys and values
        of the other tokens held constant (the idea of Collider, arXiv 2502.00340). Cheaper, and an approximate
        gradient.
      capacity: fraction of a device's positions that a filtered backward pass has room for; None is `ratio`, plus a
        tenth where several devices share one selection. Beyond it the lowest scores are dropped, and counted.
      minus: for `difference`, the score column whose loss is subtracted.
      entropy_top_k: for `own_entropy`, the number of likeliest tokens to compute it over, with probabilities scaled to
        sum to 1; 0 uses all tokens.
      history: for `excess`, an earlier state of the run as the reference, instead of a column: its moving `average`
        (OptimizerConfig.ema), or `lagged` parameters (Selection.lag). Costs one more forward pass per step. In a run's
        first step both models are equal and the selection arbitrary. ssToken (arXiv 2510.18250) keeps `low` values.
      lag: for a `lagged` history, N: the parameters of N to 2N - 1 steps ago, renewed every N steps. The training state
        holds two copies of the parameters for it.
    """

    score: Annotated[str, OneOf(SCORES)] = "excess"
    ratio: PositiveShare = 0.6
    threshold: float | None = None
    scope: Annotated[str, OneOf(SCOPES)] = "batch"
    reference: str | Sequence[str] = "reference"
    combine: Annotated[str, OneOf(COMBINE)] = "mean"
    gradient: Annotated[str, OneOf(GRADIENTS)] = "exact"
    capacity: PositiveShare | None = None
    order: Annotated[str, OneOf(ORDERS)] | None = None
    minus: str | None = None
    entropy_top_k: Natural = 0
    history: Annotated[str, OneOf(HISTORIES)] | None = None
    lag: Count = 100

    def __post_init__(self) -> None:
        names = self.references
        if (self.minus is not None) != (self.score == "difference"):
            raise UserError(
                "selection-minus",
                f"Selection.score is {self.score!r} and Selection.minus {self.minus!r}: set Selection.minus, the "
                "column to subtract, for the score 'difference' and for no other",
            )
        if self.history and self.score != "excess":
            raise UserError(
                "selection-history",
                f"Selection.history is {self.history!r} and Selection.score {self.score!r}: an earlier state of the "
                "run is a reference for 'excess'; to keep low values, set Selection.order",
            )
        if self.order == "middle" and self.threshold is not None:
            raise UserError(
                "selection-middle", "Selection.order is 'middle', which has no threshold: set Selection.ratio alone"
            )
        if not names or len(set(names)) < len(names):
            raise UserError(
                "selection-references", f"Selection.reference {names}: give at least one name, and each name once"
            )
        if paths := [name for name in names if "/" in name]:
            raise UserError(
                "selection-references",
                f"Selection.reference {paths[0]!r}: give the name of a score column alone, as score.name had it",
            )
        if self.gradient == "filtered" and self.threshold is not None and self.capacity is None:
            raise UserError(
                "selection-needs-capacity",
                "Selection.threshold keeps an unknown number of tokens: set Selection.capacity, the share of the "
                "positions that a filtered gradient has room for",
            )

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the score columns, whether one or several."""
        return (self.reference,) if isinstance(self.reference, str) else tuple(self.reference)

    @property
    def parts(self) -> "tuple[Selection, ...]":
        """(self,): code that loops over parts serves a Selection and a CombinedSelection alike."""
        return (self,)

    def columns(self) -> tuple[str, ...]:
        """The columns of the corpus that this selection reads; of a `difference`, the last is subtracted."""
        losses = ("excess", "difference", "reference")
        statistic = "entropy" if self.score == "entropy" else "loss" if self.score in losses else None
        names = (*self.references, *([self.minus] if self.minus else []))
        return tuple(str(ScoreName(name, statistic)) for name in names) if statistic and not self.history else ()

    @property
    def low_first(self) -> bool:
        return self.order == "low" or (self.order is None and self.score in LOW_FIRST)


@configurable
@dataclasses.dataclass(frozen=True)
class CombinedSelection:
    """The intersection or union of several selections from one batch, in place of a Selection (Rho-1, appendix H).

    Without a capacity, a filtered backward pass has room for the smallest part of an intersection, or for all parts of
    a union. Beyond it the lowest scores of the first part are dropped.

    Attributes:
      parts: the selections, each with its own score and ratio. All have the same scope, gradient, capacity and lag.
      keeps: `intersection`, the tokens that all of them choose, or `union`, the tokens that any of them chooses. The
        number of tokens follows from the scores: in the paper, the lowest 70 % by loss and by entropy share 60 % of
        all tokens. A token without a finite score for one of the selections is in neither.
    """

    parts: Sequence[Selection]
    keeps: Annotated[str, OneOf(KEEPS)] = "intersection"

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise UserError(
                "selection-parts", f"CombinedSelection.parts has {len(self.parts)} Selection: give two or more"
            )
        # One backward pass serves all parts, so what shapes it cannot differ between them.
        for name in ("scope", "gradient", "capacity", "lag"):
            values = [getattr(part, name) for part in self.parts]
            if len(set(values)) > 1:
                raise UserError(
                    "selection-parts-differ",
                    f"CombinedSelection.parts differ in {name} ({', '.join(map(str, values))}): set Selection.{name} "
                    "for all of them",
                )

    @property
    def gradient(self) -> str:
        return self.parts[0].gradient

    @property
    def ratio(self) -> float:
        """The largest share of the valid tokens that can be selected."""
        ratios = [part.ratio for part in self.parts]
        return min(ratios) if self.keeps == "intersection" else min(1.0, sum(ratios))

    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for part in self.parts for column in part.columns()))


class SelectionMask(NamedTuple):
    """The tokens that a selection chose in a batch, and from what."""

    selected: Bool[Array, "B L"]  # tokens that train
    usable: Bool[Array, "B L"]  # the candidates: valid tokens with a finite score
    scores: Float[Array, "B L"]  # of the first part, high first; where capacity runs out, the lowest are dropped


def select_tokens(
    selection: Selection | CombinedSelection,
    losses: Float[Array, "B L"],
    columns: dict[str, Float[Array, "B L"]],
    valid: Bool[Array, "B L"],
    key: PRNGKeyArray,
    ratio: Float[Array, ""] | None = None,
    entropies: Mapping[int, Float[Array, "B L"]] | None = None,
) -> SelectionMask:
    """Losses -> scores -> selected tokens. `ratio` replaces the ratio of a single selection; `entropies` are the
    model's own, by k, at least those of `selection_entropies`."""
    # Parts with random scores must not draw the same numbers.
    keys = [key] if len(selection.parts) == 1 else jax.random.split(key, len(selection.parts))
    scores = [token_scores(part, losses, columns, k, entropies) for part, k in zip(selection.parts, keys, strict=True)]
    # Excluded tokens must not score 0: with negative excess around, 0 would outrank valid tokens.
    usable = functools.reduce(jnp.logical_and, map(jnp.isfinite, scores), valid)
    sets = [select(part, x, usable, ratio) for part, x in zip(selection.parts, scores, strict=True)]
    # A Selection has one set: there is nothing to reduce, and the operator is never called.
    together = KEEPS[selection.keeps] if isinstance(selection, CombinedSelection) else jnp.logical_and
    return SelectionMask(functools.reduce(together, sets), usable, scores[0])


def token_scores(
    selection: Selection,
    losses: Float[Array, "B L"],
    columns: dict[str, Float[Array, "B L"]],
    key: PRNGKeyArray,
    entropies: Mapping[int, Float[Array, "B L"]] | None = None,
) -> Float[Array, "B L"]:
    """Score of each token in float32; high scores train first. `columns` holds the columns of `selection.columns()`."""
    losses = jax.lax.stop_gradient(losses).astype(jnp.float32)
    if selection.score == "loss":
        score = losses
    elif selection.score == "random":
        score = jax.random.uniform(key, losses.shape)
    elif selection.score == "own_entropy":
        assert entropies is not None
        score = entropies[selection.entropy_top_k]
    else:
        # The other scores read the references' losses, or their entropies: [references, B, L] -> [B, L]
        names = (history_name(selection.history),) if selection.history else selection.columns()
        read = [columns[name].astype(jnp.float32) for name in names]
        subtracted = read.pop() if selection.score == "difference" else 0.0
        reference = COMBINE[selection.combine](jnp.stack(read))
        score = {"excess": lambda: losses - reference, "difference": lambda: reference - subtracted}.get(
            selection.score, lambda: reference
        )()
    return -score if selection.low_first else score


def select(
    selection: Selection,
    scores: Float[Array, "B L"],
    valid: Bool[Array, "B L"],
    ratio: Float[Array, ""] | None = None,
) -> Bool[Array, "B L"]:
    """True for the tokens above the threshold, or for the highest-scored share.

    `valid` must exclude non-finite scores; `ratio`, from a schedule, replaces selection.ratio.
    """
    if selection.threshold is not None:
        return valid & (scores > selection.threshold)
    share = selection.ratio if ratio is None else ratio
    return select_share(scores, valid, share, selection.scope, selection.order == "middle")


def select_share(
    scores: Float[Array, "B L"],
    valid: Bool[Array, "B L"],
    ratio: float | Float[Array, ""],
    scope: str = "batch",
    middle: bool = False,
) -> Bool[Array, "B L"]:
    """The `kept_count` highest-scored valid tokens of the batch, of each sequence, or of each device's rows; or as many
    from the `middle`, with half of the others above them (rounded down).

    With scope `batch` this is the same set as `top_k_oracle`. Of equal scores those at lower positions are taken, so
    that the count is exact.
    """
    keys, across = _ordered_bits(scores, valid), False
    if scope != "sequence":
        # `batch` and `micro_batch` are the same here: the train step passes the one or the other.
        # [B, L] -> [S, N]: the tokens of each device as one row. Devices then exchange counts, never scores.
        keys, across = mesh.by_shard(keys), scope != "device"
    total = _totals(keys > 0, across)
    count = kept_count(total, ratio)
    if middle:
        above = (total - count) // 2
        kept = _largest(keys, above + count, across) & ~_largest(keys, above, across)
    else:
        kept = _largest(keys, count, across)
    return kept if scope == "sequence" else mesh.to_rows(kept, scores.shape[1])


def top_k_oracle(
    scores: Float[Array, "B L"], valid: Bool[Array, "B L"], ratio: float | Float[Array, ""]
) -> Bool[Array, "B L"]:
    """`select_share` over the batch in the obvious way, top_k of the flattened scores. For tests and readers."""
    scores = jnp.where(jnp.abs(scores) < jnp.finfo(jnp.float32).tiny, 0.0, scores)  # top_k orders -0.0 below 0.0
    flat = jnp.where(valid, scores, -jnp.inf).reshape(-1)
    _, order = jax.lax.top_k(flat, flat.size)  # equal values in order of position
    kept = jnp.arange(flat.size) < kept_count(jnp.sum(valid, dtype=jnp.int32), ratio)
    return jnp.zeros(flat.shape, bool).at[order].set(kept).reshape(scores.shape)


def kept_count(num_valid: Int[Array, "*G"], ratio: float | Float[Array, ""]) -> Int[Array, "*G"]:
    """round(ratio * num_valid) in exact integer arithmetic, at least 1 where anything is valid.

    The paper leaves the rounding open; here halves round up.
    """
    # num_valid * parts exceeds int32 from 214,749 tokens on, so the quotient and the rest are multiplied separately.
    parts = jnp.round(jnp.asarray(ratio, jnp.float32) * RATIO_UNIT).astype(jnp.int32)
    whole, rest = num_valid // RATIO_UNIT, num_valid % RATIO_UNIT
    count = whole * parts + (rest * parts + RATIO_UNIT // 2) // RATIO_UNIT
    return jnp.minimum(jnp.maximum(count, 1), num_valid)


def _ordered_bits(scores: Float[Array, "G N"], valid: Bool[Array, "G N"]) -> jax.Array:
    """uint32 keys in the order of the scores. Where not valid the key is 0, lower than that of any number."""
    scores = scores.astype(jnp.float32)
    # Equal scores need equal keys: -0.0 becomes 0.0, and so do subnormals, which only some machines tell from 0.
    scores = jnp.where(jnp.abs(scores) < jnp.finfo(jnp.float32).tiny, 0.0, scores)
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    negative = bits >> 31 == 1
    # Read as integers, positive floats ascend and negative ones descend. So all bits of a negative one are inverted,
    # and the top bit of a positive one is set, which puts it above them.
    return jnp.where(valid, jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31)), jnp.uint32(0))


def _totals(x: Bool[Array, "G N"], across: bool = False) -> Int[Array, "T 1"]:
    """Number of True in each group (T = G), or `across` all groups (T = 1)."""
    return jnp.sum(x, axis=(0, 1) if across else 1, keepdims=True, dtype=jnp.int32)


def _largest(keys: Array, count: Int[Array, "T 1"], across: bool = False) -> Bool[Array, "G N"]:
    """True for the `count` largest keys of each group, or `across` all groups; of equal ones, the first by position.

    Bisection finds the count-th largest key without sorting: each round settles two of its bits, by counting the keys
    that reach three candidates. Devices exchange three counts per round, and one each for the ties.
    """

    def two_bits(round_: jax.Array, found: jax.Array) -> jax.Array:
        # The next two bits of `found` [T, 1] are the number of candidates that at least `count` keys reach.
        shift = (30 - 2 * round_).astype(jnp.uint32)
        reached = [_totals(keys >= found + (jnp.uint32(i) << shift), across) >= count for i in (1, 2, 3)]
        return found + (sum(r.astype(jnp.uint32) for r in reached) << shift)

    least = jax.lax.fori_loop(0, 16, two_bits, jnp.zeros(count.shape, jnp.uint32))
    above, equal = keys > least, (keys == least) & (keys > 0)
    # Of the keys equal to the least one selected, the first are taken until the count is exact. `earlier` [G, N]: equal
    # keys before this one, in its own group and, if groups compete, in those before it.
    earlier = jnp.cumsum(equal, axis=1, dtype=jnp.int32) - equal
    if across:
        ties = _totals(equal)
        earlier += jnp.cumsum(ties, axis=0) - ties
    return above | (equal & (earlier < count - _totals(above, across)))


# ---- What a selection needs of the model and the run, besides the losses.


def selection_entropies(selection: Selection | CombinedSelection | None) -> tuple[int, ...]:
    """The k of each own entropy that selection reads; 0 means the whole vocabulary."""
    return tuple(part.entropy_top_k for part in selection.parts if part.score == "own_entropy") if selection else ()


def histories(selection: Selection | CombinedSelection | None) -> tuple[str, ...]:
    """Which earlier states of the run selection compares with, each once."""
    return tuple(dict.fromkeys(part.history for part in selection.parts if part.history)) if selection else ()


def history_name(history: str) -> str:
    """The name under which a batch holds the losses of an earlier state, beside the score columns."""
    return f"history/{history}/loss"


# ---- With gradient accumulation and filtered gradients.


def competes_across_micro_batches(selection: Selection | CombinedSelection) -> bool:
    """Whether selection needs the losses of all micro-batches before the first gradient."""
    return any(part.threshold is None and part.scope in ("batch", "device") for part in selection.parts)


def filtered_capacity(
    selection: Selection | CombinedSelection, batch_shape: tuple[int, ...], num_micro_batches: int = 1
) -> int:
    """How many tokens a filtered backward pass has room for, per device and micro-batch of a global batch [B, L]."""
    shards = mesh.num_shards()
    rows, length = batch_shape[0] // (shards * num_micro_batches), batch_shape[1]
    if isinstance(selection, CombinedSelection):
        # An intersection is no larger than its smallest part, a union no larger than all of them together.
        capacities = [filtered_capacity(part, batch_shape, num_micro_batches) for part in selection.parts]
        if selection.keeps == "intersection" or selection.parts[0].capacity:
            return min(capacities)
        return min(rows * length, sum(capacities))
    if selection.capacity:
        return math.ceil(selection.capacity * rows * length)
    # Number of pieces, each one micro-batch on one device, that share a count. If several do, their parts of it vary:
    # each has a tenth more room.
    sharing = {"batch": shards * num_micro_batches, "micro_batch": shards, "device": num_micro_batches, "sequence": 1}
    share = selection.ratio * (1.1 if sharing[selection.scope] > 1 else 1.0)
    rounding = rows if selection.scope == "sequence" else 1  # each group rounds its count, and keeps at least 1
    return min(rows * length, math.ceil(share * rows * length) + rounding)


def within_capacity(
    selection: Selection | CombinedSelection,
    scores: Float[Array, "B L"],
    selected: Bool[Array, "B L"],
    num_micro_batches: int = 1,
) -> Bool[Array, "B L"]:
    """The selected tokens that a filtered backward pass has room for: the highest-scored `filtered_capacity` of each
    device and micro-batch (micro-batch m has the rows m, m + num_micro_batches, ...)."""
    shards, length = mesh.num_shards(), scores.shape[1]
    # [B, L] -> [S, N] -> [S, micro-batches, rows, L] -> [G, N], one group for each device and micro-batch
    keys = mesh.by_shard(_ordered_bits(scores, selected))
    keys = keys.reshape(shards, -1, num_micro_batches, length).swapaxes(1, 2)
    groups = keys.reshape(shards * num_micro_batches, -1)
    capacity = filtered_capacity(selection, scores.shape, num_micro_batches)
    kept = _largest(groups, jnp.full((len(groups), 1), capacity, jnp.int32))
    # [G, N] -> [S, micro-batches, rows, L] -> [S, N] -> [B, L]
    kept = kept.reshape(keys.shape).swapaxes(1, 2)
    return mesh.to_rows(kept.reshape(shards, -1), length)


# ---- A selection in run.json.


def selection_record(selection: Selection | CombinedSelection | None) -> dict[str, Any] | None:
    """A selection as run.json keeps it. Settings that earlier versions did not have are left out where they are at
    their defaults, so that the runs of those versions can be continued."""

    def without_defaults(fields: dict[str, Any]) -> dict[str, Any]:
        later = {"order": None, "minus": None, "entropy_top_k": 0, "history": None}
        later |= {} if fields["history"] == "lagged" else {"lag": fields["lag"]}
        return {name: value for name, value in fields.items() if name not in later or value != later[name]}

    if isinstance(selection, CombinedSelection):
        return {"parts": [without_defaults(to_json(part)) for part in selection.parts], "keeps": selection.keeps}
    return without_defaults(to_json(selection)) if selection else None


def selection_of(fields: Mapping[str, Any] | None) -> Selection | CombinedSelection | None:
    """The selection that a phase in a run.json records; None where all tokens train."""
    if fields is None:
        return None
    if "parts" in fields:
        return CombinedSelection([Selection(**part) for part in fields["parts"]], fields["keeps"])
    return Selection(**fields)


def recorded_lag(phases: Sequence[dict[str, Any]]) -> int:
    """Selection.lag of recorded phases that have a lagged history, else 0."""
    selections = [phase["selection"] for phase in phases if phase.get("selection")]
    parts = [part for selection in selections for part in selection.get("parts", [selection])]
    return next((part["lag"] for part in parts if part.get("history") == "lagged"), 0)


# ---- A selection in words, for the plan and reports.


def share_bounds(selection: Selection | CombinedSelection) -> tuple[float, float]:
    """The smallest and the largest fraction of the valid tokens that can train; equal where ratios determine it."""
    # A threshold may keep anything from 0 to 1.
    ratios = [part.ratio if part.threshold is None else None for part in selection.parts]
    low, high = [ratio or 0.0 for ratio in ratios], [ratio or 1.0 for ratio in ratios]
    if isinstance(selection, CombinedSelection) and selection.keeps == "union":
        return max(low), min(1.0, sum(high))
    # Sets of shares a and b have at least a + b - 1 in common.
    return max(0.0, sum(low) - (len(low) - 1)), min(high)


def in_words(selection: Selection | CombinedSelection, ratio: str | None = None) -> str:
    """For example `60% by excess, per batch, column reference`, or `70% by reference and 70% by entropy (40% to 70% of
    all), per batch`. `ratio` replaces Selection.ratio, for a schedule."""
    each = []
    for part in selection.parts:
        amount = ratio or f"{100 * part.ratio:.4g}%"
        amount = amount if part.threshold is None else f"above {part.threshold:g}"
        several = f" ({part.combine} of {', '.join(part.references)})" if len(part.references) > 1 else ""
        score = {"own_entropy": "own entropy"}.get(part.score, part.score)
        score += f" of the {part.entropy_top_k} likeliest" if part.entropy_top_k and part.score == "own_entropy" else ""
        score += f" of {part.reference} minus {part.minus}" if part.minus else ""
        score += {"average": " over the run's moving average", None: ""}.get(
            part.history, f" over the run of {part.lag} to {2 * part.lag - 1} steps before"
        )
        order = f", {part.order} first" if part.order in ("high", "low") else ", the middle" if part.order else ""
        each.append(f"{amount} by {score}{several}{order}")
    words = each[0]
    if isinstance(selection, CombinedSelection):
        low, high = share_bounds(selection)
        words = (" or " if selection.keeps == "union" else " and ").join(each) + f" ({low:.0%} to {high:.0%} of all)"
    words += f", per {selection.parts[0].scope}"
    columns = {name.split("/")[1] for name in selection.columns()}
    if len(columns) == 1:
        words += f", column {columns.pop()}"
    return words + (", filtered gradient" if selection.gradient == "filtered" else "")
