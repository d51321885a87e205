"""How much each token that trains counts: a rule computes its weight from its loss, entropy, position or columns.

A rule is a pure function, or a dataclass with `__call__`, whose parameters are some of `VALUES`. It gets these values
by name and returns weights [B, L], 0 or more. Only what it names is computed: a rule without `own_loss` and
`own_entropy` costs nothing, because its weights are known before the losses. No gradient flows through a weight.
A rule of your own goes into your own module and Phase.weighting: see docs/tutorials/new_idea.md.

A rule may have two attributes: `columns`, the names of the score columns that it reads, as `scores/NAME/STATISTIC`, and
`entropy_top_k`, the k if its `own_entropy` is over the k likeliest tokens.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slm_jax.configurable import Count, NotNegative, Positive, configurable
from slm_jax.data.batches import Batch
from slm_jax.data.scores import ScoreName
from slm_jax.errors import UserError
from slm_jax.files import to_json

Rule = Callable[..., Any]
OF_THE_MODEL = ("own_loss", "own_entropy")
# columns is a dict of [B, L] arrays, step a scalar, the others are [B, L]; see `rule_weights`.
VALUES = (*OF_THE_MODEL, "columns", "positions", "segment_ids", "step")
NORMALISERS = ("weights", "tokens")


class Weighting(NamedTuple):
    """The weights of a phase.

    rule: None gives every trained token weight 1.
    normalise: divisor of the sum of weight * loss: the sum of the `weights`, or the number of `tokens`.
    unselected: weight of the valid tokens that a selection drops.
    """

    rule: Rule | None = None
    normalise: str = "weights"
    unselected: float = 0.0

    @property
    def on(self) -> bool:
        """Whether weights other than 0 and 1 are possible."""
        return self.rule is not None or self.unselected > 0


ALIKE = Weighting()  # every trained token has weight 1


# ---- Rules from papers.


@configurable
@dataclasses.dataclass(frozen=True)
class DFT:
    """w = p(token), the model's own probability: dynamic fine-tuning (arXiv 2508.05629, Eq 9).

    The paper divides by the number of tokens: Phase.normalise = 'tokens'.
    """

    def __call__(self, own_loss: Float[Array, "B L"]) -> Float[Array, "B L"]:
        return jnp.exp(-own_loss)


@configurable
@dataclasses.dataclass(frozen=True)
class EAFT:
    """w = (H_k / ln k)^power, with H_k the entropy over the model's k likeliest next tokens, whose probabilities are
    scaled to sum to 1: entropy-adaptive fine-tuning (arXiv 2601.02151, §3).

    The paper divides by the number of tokens: Phase.normalise = 'tokens'.

    Attributes:
      top_k: number of tokens, k, at least 2; 20 in the paper.
      power: exponent, 1 in the paper; 0 gives every token weight 1.
    """

    top_k: Count = 20
    power: NotNegative = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 2:
            raise UserError("weighting-top-k", "EAFT.top_k is 1: one token has no entropy; set it to 2 or more")

    @property
    def entropy_top_k(self) -> int:
        return self.top_k

    def __call__(self, own_entropy: Float[Array, "B L"]) -> Float[Array, "B L"]:
        # Rounding can make the entropy of a certain prediction a little less than 0.
        return jnp.maximum(own_entropy / math.log(self.top_k), 0.0) ** self.power


@configurable
@dataclasses.dataclass(frozen=True)
class Focal:
    """w = (1 - p(token))^gamma: the focal loss (arXiv 1708.02002, Eq 4), here without gradient through the weight.

    Attributes:
      gamma: how strongly tokens that the model predicts well are down-weighted; 0 gives every token weight 1.
    """

    gamma: NotNegative = 2.0

    def __call__(self, own_loss: Float[Array, "B L"]) -> Float[Array, "B L"]:
        # Rounding can make the loss of a certain token a little less than 0.
        return (-jnp.expm1(-jnp.maximum(own_loss, 0.0))) ** self.gamma


@configurable
@dataclasses.dataclass(frozen=True)
class ExcessSigmoid:
    """w = sigmoid((own loss - reference loss - offset) / temperature): Rho-1's selection (arXiv 2404.07965, Eq 3-5)
    without a hard threshold. As the temperature falls, it becomes Selection.threshold = offset.

    Attributes:
      reference: name of the corpus' score column.
      temperature: in nats; the weight is 0.27 one temperature below the offset, and 0.73 one above.
      offset: excess loss at which the weight is one half, in nats.
    """

    reference: str = "reference"
    temperature: Positive = 1.0
    offset: float = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        return (str(ScoreName(self.reference)),)

    def __call__(self, own_loss: Float[Array, "B L"], columns: Mapping[str, Array]) -> Float[Array, "B L"]:
        excess = own_loss - columns[self.columns[0]]
        return jax.nn.sigmoid((excess - self.offset) / self.temperature)


@configurable
@dataclasses.dataclass(frozen=True)
class PositionTanh:
    """w = tanh(position / scale), with positions counted from 0 in each document: the first tokens, which have little
    context, get a lower weight (marin-community/marin, issue 5306, with scale 10).

    Attributes:
      scale: position at which the weight is 0.76, in tokens.
    """

    scale: Positive = 10.0

    def __call__(self, positions: Int[Array, "B L"]) -> Float[Array, "B L"]:
        return jnp.tanh(positions / self.scale)


@configurable
@dataclasses.dataclass(frozen=True)
class ColumnWeight:
    """w = a column of the corpus: weights computed elsewhere, for example 0.01 on repeats (marin-community/marin, pull
    request 2310).

    Attributes:
      column: NAME/STATISTIC of the score column; its values must be 0 or more wherever a token has a loss.
    """

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (str(ScoreName.parse(f"scores/{self.column}")),)

    def __call__(self, columns: Mapping[str, Array]) -> Float[Array, "B L"]:
        return columns[self.columns[0]]


# ---- What a rule reads, and the weights it returns.


def takes(rule: Rule) -> tuple[str, ...]:
    """Names of the parameters of a rule."""
    return tuple(inspect.signature(rule).parameters)


def depends_on_model(rule: Rule | None) -> bool:
    """Whether the weights depend on the model's own losses or entropies; otherwise they are known before the losses."""
    return rule is not None and any(name in OF_THE_MODEL for name in takes(rule))


def entropies_of(rule: Rule | None) -> tuple[int, ...]:
    """The k of the entropy that a rule reads, or (); k = 0 means the whole vocabulary."""
    return (entropy_top_k(rule),) if rule is not None and "own_entropy" in takes(rule) else ()


def entropy_top_k(rule: Rule) -> int:
    return getattr(rule, "entropy_top_k", 0)


def columns_of(rule: Rule | None) -> tuple[str, ...]:
    """The score columns that a rule reads."""
    return tuple(getattr(rule, "columns", ()))


def check_rule(rule: Rule) -> None:
    """Refuses a rule with a parameter that is not one of VALUES, or one that reads columns without naming them.

    Raises:
      UserError: `weighting-parameter`, `weighting-no-columns`.
    """
    for name in takes(rule):
        if name not in VALUES:
            raise UserError(
                "weighting-parameter",
                f"Phase.weighting: {name_of(rule)} has a parameter {name!r}: use {', '.join(VALUES)}; for settings, "
                "make the rule a dataclass with __call__",
            )
    if "columns" in takes(rule) and not columns_of(rule):
        raise UserError(
            "weighting-no-columns",
            f"Phase.weighting: {name_of(rule)} has a parameter 'columns' but names none: set its attribute "
            "columns = ('scores/NAME/STATISTIC',)",
        )


def rule_weights(
    rule: Rule,
    losses: Float[Array, "B L"] | None,
    entropies: Mapping[int, Float[Array, "B L"]],
    batch: Batch,
    step: Int[Array, ""],
) -> Float[Array, "B L"]:
    """The weights of a rule, float32, for all tokens, trained or not.

    Args:
      rule: see the module docstring.
      losses: the model's own; None if the rule does not depend on them.
      entropies: by k, at least those of `entropies_of(rule)`.
      batch: the batch or micro-batch of these losses, with the score columns of `columns_of(rule)`.
      step: number of the step in the run, from 1.

    Raises:
      UserError: `weighting-shape`, while the step is traced.
    """
    values = {
        "own_loss": losses,
        "own_entropy": entropies.get(entropy_top_k(rule)),
        "columns": {name: batch.scores[name] for name in columns_of(rule)},
        "positions": batch.positions,
        "segment_ids": batch.segment_ids,
        "step": step,
    }
    weights = jnp.asarray(rule(**{name: values[name] for name in takes(rule)}))
    if weights.shape != batch.tokens.shape:
        raise UserError(
            "weighting-shape",
            f"Phase.weighting: {name_of(rule)} returns weights of shape {weights.shape} for a batch of "
            f"{batch.tokens.shape}: return one weight per token",
        )
    return jax.lax.stop_gradient(weights.astype(jnp.float32))


# ---- A rule by name and in words, for run.json, the plan and reports.


def name_of(rule: Rule) -> str:
    """The rule's name, with its module unless that is this one."""
    owner = rule if inspect.isfunction(rule) else type(rule)
    return owner.__qualname__ if owner.__module__ == __name__ else f"{owner.__module__}.{owner.__qualname__}"


def record_of(rule: Rule | None) -> dict[str, Any] | None:
    """A rule as run.json keeps it: its name, its settings, and the columns that it reads."""
    if rule is None:
        return None
    settings = {name: to_json(getattr(rule, name)) for name in getattr(rule, "__dataclass_fields__", ())}
    return {"rule": name_of(rule), "settings": settings, "columns": list(columns_of(rule))}


def weighting_in_words(phase: Mapping[str, Any]) -> Sequence[str]:
    """The weighting of a phase of run.json, for example `weights Focal(gamma=2.0), divided by their sum`; empty if
    every trained token has weight 1."""
    words, rule = [], phase.get("weighting")
    if rule:
        settings = ", ".join(f"{name}={value!r}" for name, value in rule["settings"].items())
        words.append(f"weights {rule['rule']}" + f"({settings})" * bool(settings))
    if unselected := phase.get("unselected_weight"):
        words.append(f"weight {unselected:g} for tokens that are not selected")
    divisor = "the number of tokens" if phase.get("normalise") == "tokens" else "their sum"
    return [", ".join(words) + f", divided by {divisor}"] if words else []
