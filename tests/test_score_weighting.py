"""Rules of token weights: their formulas, what they ask for, and what is refused before the first step."""

import dataclasses

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax import config
from slm_jax.data.batches import make_batch
from slm_jax.score import weighting
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import token_loss, token_loss_and_entropies
from slm_jax.score.weighting import (
    DFT,
    EAFT,
    ColumnWeight,
    ExcessSigmoid,
    Focal,
    PositionTanh,
    columns_of,
    depends_on_model,
    entropies_of,
    record_of,
    rule_weights,
    weighting_in_words,
)
from slm_jax.train.phases import Phase

SHAPE = (3, 8)
REFERENCE, MARKS = "scores/reference/loss", "scores/marks/weight"


def _values():
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] * 3, [1] * 8, [1] * 6 + [0] * 2])
    scores = {name: rng.uniform(0, 3, SHAPE).astype(np.float32) for name in (REFERENCE, MARKS)}
    batch = make_batch(rng.integers(0, 9, SHAPE), segments, scores=scores)
    losses, entropies = rng.exponential(2.0, SHAPE).astype(np.float32), rng.uniform(0, 3, SHAPE).astype(np.float32)
    return jax.tree.map(jnp.asarray, (losses, entropies, batch))


def by_step(own_loss, own_entropy, columns, positions, segment_ids, step):
    """A rule that takes everything."""
    return own_loss + own_entropy + columns[MARKS] + positions + segment_ids + step


by_step.columns = (MARKS,)

# name -> rule, and its formula in NumPy: (losses, entropies, batch) -> weights
RULES = {
    "dft": (DFT(), lambda loss, entropy, batch: np.exp(-loss)),
    "eaft": (EAFT(top_k=8, power=2.0), lambda loss, entropy, batch: (entropy / np.log(8)) ** 2),
    "focal": (Focal(1.5), lambda loss, entropy, batch: (1 - np.exp(-loss)) ** 1.5),
    "focal 0": (Focal(0.0), lambda loss, entropy, batch: np.ones(SHAPE)),
    "excess": (
        ExcessSigmoid(temperature=0.5, offset=0.1),
        lambda loss, entropy, batch: 1 / (1 + np.exp(-(loss - batch.scores[REFERENCE] - 0.1) / 0.5)),
    ),
    "position": (PositionTanh(4.0), lambda loss, entropy, batch: np.tanh(batch.positions / 4)),
    "column": (ColumnWeight("marks/weight"), lambda loss, entropy, batch: batch.scores[MARKS]),
    "everything": (
        by_step,
        lambda loss, entropy, b: loss + entropy + b.scores[MARKS] + b.positions + b.segment_ids + 7,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_their_formulas(name):
    rule, formula = RULES[name]
    losses, entropies, batch = _values()
    found = rule_weights(rule, losses, dict.fromkeys(entropies_of(rule), entropies), batch, jnp.asarray(7))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, formula(np.asarray(losses, np.float64), entropies, batch), rtol=2e-6)


def test_only_what_a_rule_names_is_computed():
    assert [depends_on_model(rule) for rule, _ in RULES.values()] == [True] * 5 + [False] * 2 + [True]
    assert [entropies_of(rule) for rule, _ in RULES.values()] == [(), (8,), (), (), (), (), (), (0,)]
    assert columns_of(by_step) == columns_of(ColumnWeight("marks/weight")) == (MARKS,)
    assert Phase(1, mixture=[toy.MixtureComponent("c")], weighting=ExcessSigmoid("web")).score_columns == (
        "scores/web/loss",
    )


def test_no_gradient_flows_through_a_weight():
    losses, _, batch = _values()
    gradient = jax.grad(lambda x: jnp.sum(rule_weights(DFT(), x, {}, batch, jnp.asarray(1))))(losses)
    assert (gradient == 0).all()


@pytest.mark.parametrize("k", [0, 1, 3, 50, 64])
def test_entropies_of_the_likeliest(k):
    """Against NumPy in float64, from one pass with the losses, whose gradient stays what it is. 50 of 64 are words."""
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(2, 6, 16)).astype(np.float32), rng.normal(size=(16, 64)).astype(np.float32)
    tokens, segments = rng.integers(0, 50, (2, 6)), np.ones((2, 6), np.int32)
    arrays = hidden[:, :-1].astype(np.float64), head[:, :50]
    hidden, head, tokens, segments = map(jnp.asarray, (hidden, head, tokens, segments))
    losses, entropies = token_loss_and_entropies(hidden, head, tokens, segments, 50, (k, 2))
    logits = np.sort(arrays[0] @ arrays[1])[..., ::-1][..., : k or 50]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropies[k][:, 1:], -(p * np.log(p)).sum(-1), rtol=1e-4, atol=1e-5)
    assert (entropies[k][:, 0] == 0).all()

    def total(hidden, *top_ks):
        return jnp.sum(token_loss_and_entropies(hidden, head, tokens, segments, 50, top_ks)[0] ** 2)

    np.testing.assert_array_equal(losses, token_loss(hidden, head, tokens, segments, 50))
    np.testing.assert_array_equal(jax.grad(total)(hidden, k), jax.grad(total)(hidden))


# ---- What is refused


def with_power(own_loss, power=0.5):
    return own_loss**power


def reads_columns(columns):
    return 1.0


@pytest.mark.parametrize(
    ("code", "named", "make"),
    [
        ("weighting-parameter", "'power'", lambda: Phase(1, weighting=with_power)),
        ("weighting-no-columns", "reads_columns", lambda: Phase(1, weighting=reads_columns)),
        ("weighting-top-k", "EAFT.top_k", lambda: EAFT(1)),
        ("setting-out-of-range", "Focal.gamma", lambda: Focal(-1.0)),
        ("setting-out-of-range", "ExcessSigmoid.temperature", lambda: ExcessSigmoid(temperature=0.0)),
        ("corpus-no-column", "scores/marks", lambda: Phase(1, weighting=ColumnWeight("marks"))),
        ("setting-type", "with brackets: @NAME()", lambda: Phase(1, weighting=Focal)),
        ("setting-unknown-value", "Phase.normalise", lambda: Phase(1, normalise="rows")),
        ("phase-unselected-weight", "0.1", lambda: Phase(1, unselected_weight=0.1)),
        (
            "phase-unselected-weight",
            "filtered",
            lambda: Phase(1, unselected_weight=0.1, selection=Selection("loss", gradient="filtered")),
        ),
        (
            "weighting-shape",
            "(3, 7)",
            lambda: rule_weights(lambda own_loss: own_loss[:, 1:], _values()[0], {}, _values()[2], jnp.asarray(1)),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules_that_are_refused(code, named, make):
    assert named in toy.refused(code, make)


# ---- In words and records


def test_the_record_and_the_words_of_a_phase():
    corpus = [toy.MixtureComponent("c")]
    plain = Phase(1, mixture=corpus).record()
    assert not {"weighting", "normalise", "unselected_weight"} & set(plain)  # as in runs of earlier versions
    assert weighting_in_words(plain) == []
    phase = Phase(1, mixture=corpus, weighting=EAFT(), normalise="tokens").record()
    assert phase["weighting"] == {"rule": "EAFT", "settings": {"top_k": 20, "power": 1.0}, "columns": []}
    assert weighting_in_words(phase) == ["weights EAFT(top_k=20, power=1.0), divided by the number of tokens"]
    floor = Phase(1, mixture=corpus, selection=Selection("loss"), unselected_weight=0.1).record()
    assert weighting_in_words(floor) == ["weight 0.1 for tokens that are not selected, divided by their sum"]
    assert record_of(by_step) == {"rule": f"{__name__}.by_step", "settings": {}, "columns": [MARKS]}
    assert weighting.name_of(DFT()) == "DFT"


MY_RULES = """
import dataclasses
import gin
import jax.numpy as jnp
from slm_jax.configurable import configurable

@gin.configurable
def rare(own_loss):
    return jnp.sqrt(own_loss)

@configurable
@dataclasses.dataclass(frozen=True)
class Power:
    power: float = 0.5

    def __call__(self, own_loss):
        return own_loss**self.power
"""


def test_a_rule_of_another_module_by_gin_reference(tmp_path, monkeypatch):
    """A function, or a dataclass with settings; the file that imports it needs the flag."""
    (tmp_path / "weights_of_mine.py").write_text(MY_RULES)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "run.gin"
    settings = ["Phase.steps = 1", "Power.power = 0.25"]
    for reference, expected, words in (
        ("@rare", 2.0, "weights weights_of_mine.rare, divided by their sum"),
        ("@Power()", 4.0**0.25, "weights weights_of_mine.Power(power=0.25), divided by their sum"),
    ):
        file.write_text("\n".join(["import weights_of_mine", f"Phase.weighting = {reference}", *settings]))
        toy.refused("gin-import", config.load, [str(file)])
        config.load([str(file)], allow_imports=True)
        phase = gin.get_configurable("Phase")(mixture=[toy.MixtureComponent("c")])
        assert np.isclose(phase.weighting(jnp.asarray(4.0)), expected)
        assert weighting_in_words(phase.record()) == [words]
    gin.clear_config()
    assert dataclasses.is_dataclass(phase.weighting)
