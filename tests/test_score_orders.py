"""Scores beyond Rho-1's: own entropy, the difference of two columns, orders, and earlier states of the run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.evaluate.flops import run_flops
from slm_jax.mesh import MeshConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import (
    CombinedSelection,
    Selection,
    histories,
    in_words,
    select,
    selection_of,
    selection_record,
    token_scores,
)
from slm_jax.score.token_loss import batch_loss_and_entropies, predicted
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.state import init_state, state_shapes
from slm_jax.train.step import compile_step, make_step, token_weights

BASE, REFERENCE = "scores/base/loss", "scores/reference/loss"


def test_a_difference_of_two_columns_by_hand():
    columns = {BASE: jnp.array([[3.0, 1.0, 2.0, 5.0]]), REFERENCE: jnp.array([[1.0, 1.0, 3.0, 4.0]])}
    selection = Selection("difference", 0.5, reference="base", minus="reference")
    assert selection.columns() == (BASE, REFERENCE)
    scores = token_scores(selection, jnp.zeros((1, 4)), columns, jax.random.key(0))
    assert scores.tolist() == [[2.0, 0.0, -1.0, 1.0]]
    assert select(selection, scores, jnp.ones((1, 4), bool)).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize(
    ("score", "order", "kept"),
    [
        ("loss", None, [4, 5, 6, 7]),
        ("loss", "low", [0, 1, 2, 3]),
        ("loss", "middle", [2, 3, 4, 5]),
        ("reference", None, [0, 1, 2, 3]),
        ("reference", "high", [4, 5, 6, 7]),
        ("reference", "middle", [2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("scope", ["batch", "sequence", "device"])
def test_orders(score, order, kept, scope):
    """Of 8 values per row, in an order that is not that of the positions; rows alike, so that all scopes agree."""
    values = np.array([4, 0, 7, 2, 6, 1, 5, 3], np.float32)
    losses = jnp.asarray(np.tile(values, (2, 1)))
    selection = Selection(score, 0.5, order=order, scope=scope)
    scores = token_scores(selection, losses, {REFERENCE: losses}, jax.random.key(0))
    chosen = np.asarray(select(selection, scores, jnp.ones((2, 8), bool)))
    for row in chosen:
        assert sorted(values[row].astype(int).tolist()) == kept


@pytest.mark.parametrize("devices", [1, 8])
def test_the_middle_of_ties_has_the_exact_count(devices):
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 4, (8, 16)).astype(np.float32))
    valid = jnp.asarray(np.random.default_rng(1).random((8, 16)) < 0.8)
    with jax.set_mesh(mesh_lib.make_mesh(devices=jax.devices()[:devices])):
        middle = functools.partial(select, Selection("loss", 0.5, order="middle"))
        chosen = np.asarray(jax.jit(middle)(scores, valid))
    order = np.lexsort((np.arange(scores.size), -np.where(valid, scores, -np.inf).reshape(-1)))[: int(valid.sum())]
    count = int(np.floor(len(order) * 0.5 + 0.5))
    above = (len(order) - count) // 2
    assert np.flatnonzero(chosen).tolist() == sorted(order[above : above + count].tolist())


# ---- Own entropy


def _batch():
    rng = np.random.default_rng(0)
    segments = np.ones((8, 16), np.int32)
    segments[1, 5:], segments[2, 9:] = 2, 0
    scores = {REFERENCE: rng.normal(4, 1, (8, 16)).astype(np.float32)}
    return make_batch(rng.integers(0, 250, (8, 16)), segments, rng.random((8, 16)) < 0.8, scores=scores)


@pytest.mark.parametrize("split", ["1 device", "8 devices", "4 micro-batches"])
@pytest.mark.parametrize("gradient", ["exact", "filtered"])
def test_own_entropy_selects_the_same_tokens_on_any_split(split, gradient):
    devices, micro_batches = {"1 device": (1, 1), "8 devices": (8, 1), "4 micro-batches": (1, 4)}[split]
    selection = Selection("own_entropy", 0.5, entropy_top_k=20, gradient=gradient, capacity=1.0)
    mesh, optimizer = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:devices]), make_optimizer(OptimizerConfig())
    with jax.set_mesh(mesh):
        state = init_state(toy.MODEL, optimizer, mesh, seed=0)
        params = jax.tree.map(jnp.asarray, jax.device_get(state.params))  # a copy: the step reuses their memory
        step = make_step(toy.MODEL, selection, optimizer, lambda _: 0.0, 0, micro_batches)
        step = compile_step(step, mesh, state_shapes(toy.MODEL, optimizer, mesh))
        _, sums = step(state, jax.device_put(_batch(), mesh_lib.batch_sharding(mesh)))
    batch = jax.tree.map(jnp.asarray, _batch())
    losses, entropies = batch_loss_and_entropies(params, toy.MODEL, batch, (20,))
    valid = np.asarray(batch.loss_mask & predicted(batch.segment_ids))
    count = int(np.floor(valid.sum() * 0.5 + 0.5))
    kept = np.argsort(-np.where(valid, entropies[20], -1).reshape(-1), kind="stable")[:count]
    assert sums["trained_tokens"] == count
    np.testing.assert_allclose(sums["trained_loss_sum"], np.asarray(losses).reshape(-1)[kept].sum(), rtol=1e-5)


# ---- Earlier states of the run


def _run_of(selection, ema=0.0, lag=0, steps=5):
    """The states after each step on one batch, from the initial one, and the sums of each step."""
    mesh, optimizer = mesh_lib.make_mesh(None, jax.devices()[:1]), make_optimizer(OptimizerConfig())
    batch = jax.tree.map(jnp.asarray, _batch())
    state = init_state(toy.MODEL, optimizer, mesh, seed=0, ema=ema > 0, lagged=lag > 0)
    step = jax.jit(make_step(toy.MODEL, selection, optimizer, lambda _: 1e-2, 0, ema=ema, lag=lag))
    states, sums = [state], []
    for _ in range(steps):
        state, found = step(state, batch)
        states.append(state)
        sums.append(found)
    return batch, states, sums


@pytest.mark.parametrize("history", ["average", "lagged"])
def test_the_reference_is_an_earlier_state(history):
    """Low excess over it trains: the tokens on which the model has learned most."""
    selection = Selection("excess", 0.5, history=history, order="low", lag=2)
    batch, states, sums = _run_of(selection, ema=0.5 * (history == "average"), lag=2 * (history == "lagged"))
    losses = jax.jit(lambda params: batch_loss_and_entropies(params, toy.MODEL, batch, ())[0])
    for number in range(1, 5):
        now = states[number]
        # Steps are 0 to 4. Lagged by 2, the step after `number` steps compares with parameters of 2 or 3 steps before.
        past = now.average if history == "average" else states[max(0, number // 2 * 2 - 2)].params
        column = {"history/" + history + "/loss": losses(past)}
        expected = token_weights(selection, losses(now.params), batch._replace(scores=column), jax.random.key(0))[1]
        np.testing.assert_allclose(sums[number]["trained_loss_sum"], expected["trained_loss_sum"], rtol=1e-5)
        assert expected["trained_loss_sum"] != expected["loss_sum"] / 2


@pytest.mark.parametrize("history", ["average", "lagged"])
def test_a_run_with_a_history_is_resumed_to_the_bit(history, corpus, tmp_path):
    selection = Selection("excess", 0.5, history=history, order="low", lag=3)
    settings = {"optimizer": OptimizerConfig(ema=0.9 if history == "average" else 0.0), "checkpoint_every": 2}
    toy.train_here(tmp_path / "whole", [toy.phase(corpus, steps=8, selection=selection)], **settings)
    for steps in (4, 8):  # the schedule does not depend on the number of steps
        toy.train_here(tmp_path / "halves", [toy.phase(corpus, steps=steps, selection=selection)], **settings)
    assert toy.losses(tmp_path / "halves") == toy.losses(tmp_path / "whole")
    other = [toy.phase(corpus, steps=9, selection=Selection("excess", history="lagged", lag=4))]
    code = "resume-other-history"
    assert "Selection.lag" in toy.refused(code, toy.train_here, tmp_path / "whole", other, **settings)


def test_a_history_costs_a_forward_pass(corpus, tmp_path):
    run = tmp_path / "run"
    optimizer = OptimizerConfig(ema=0.9)
    phases = [toy.phase(corpus, steps=1, selection=Selection("excess", 1.0, history="average"))]
    toy.train_here(run, phases, optimizer=optimizer)
    settings = RunDirectory(run).settings()
    plain = {**settings, "phases": [settings["phases"][0] | {"selection": None}]}
    flops = run_flops(settings)
    assert flops.training == pytest.approx(run_flops(plain).training * 4 / 3) and flops.scoring == 0


# ---- Refusals, records and words


@pytest.mark.parametrize(
    ("code", "named", "make"),
    [
        ("selection-minus", "Selection.minus", lambda: Selection("difference")),
        ("selection-minus", "'base'", lambda: Selection("excess", minus="base")),
        ("selection-history", "'loss'", lambda: Selection("loss", history="average")),
        ("selection-middle", "Selection.order", lambda: Selection("loss", threshold=1.0, order="middle")),
        ("setting-unknown-value", "Selection.order", lambda: Selection("loss", order="up")),
        (
            "selection-parts-differ",
            "lag",
            lambda: CombinedSelection([Selection(history="lagged", lag=n) for n in (1, 2)]),
        ),
    ],
)
def test_selections_that_are_refused(code, named, make):
    assert named in toy.refused(code, make)


def test_a_run_without_an_average_cannot_compare_with_it(corpus, tmp_path):
    phases = [toy.phase(corpus, selection=Selection(history="average"))]
    assert "OptimizerConfig.ema" in toy.refused("selection-no-average", toy.train_here, tmp_path / "run", phases)
    phases = [toy.phase(corpus, selection=Selection(history="lagged", lag=n)) for n in (2, 3)]
    assert "2 and 3" in toy.refused("selection-two-lags", toy.train_here, tmp_path / "run", phases)


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Selection("own_entropy", 0.2), "20% by own entropy, per batch"),
        (Selection("own_entropy", entropy_top_k=20), "60% by own entropy of the 20 likeliest, per batch"),
        (Selection("loss", 0.5, order="middle"), "50% by loss, the middle, per batch"),
        (
            Selection("difference", reference="base", minus="reference"),
            "60% by difference of base minus reference, per batch",
        ),
        (
            Selection(history="average", order="low"),
            "60% by excess over the run's moving average, low first, per batch",
        ),
        (Selection(history="lagged", lag=5), "60% by excess over the run of 5 to 9 steps before, per batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_words_and_records(selection, words):
    """A record leaves out what earlier versions did not have, where it is off, and can be read again."""
    assert in_words(selection) == words
    assert selection_of(selection_record(selection)) == selection
    plain = selection_record(Selection())
    assert plain and not {"order", "minus", "entropy_top_k", "history", "lag"} & set(plain)
    assert selection_of(selection_record(CombinedSelection([selection, selection]))) == CombinedSelection(
        [selection, selection]
    )
    assert histories(None) == ()
