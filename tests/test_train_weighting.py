"""Weighted steps: the definition in float64, any split of the batch, and a run that keeps its weighting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.mesh import MeshConfig
from slm_jax.models.model_config import ModelConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import batch_loss_and_entropies, predicted
from slm_jax.score.weighting import DFT, EAFT, ColumnWeight, Focal, PositionTanh, Weighting
from slm_jax.train.state import init_state, state_shapes
from slm_jax.train.step import compile_step, make_step

MODEL = ModelConfig(vocab_size=64, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48)
REFERENCE, GIVEN, ZERO_ONE = "scores/reference/loss", "scores/given/weight", "scores/zero_one/weight"
ROWS, LENGTH = 8, 16
# An optimizer that keeps the gradient as its state.
KEEP = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, params: (g, g))


def _batch():
    """Rows with uneven masks: one fully masked, one nearly so, packed segments, padding; three sources."""
    rng = np.random.default_rng(0)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 5:], segments[2, 9:] = 2, 0
    mask = rng.random((ROWS, LENGTH)) < np.linspace(0.1, 1, ROWS)[:, None]
    mask[3] = False
    scores = {
        REFERENCE: rng.normal(4, 1, (ROWS, LENGTH)).astype(np.float32),
        GIVEN: rng.exponential(1.0, (ROWS, LENGTH)).astype(np.float32),
    }
    scores[GIVEN][~mask] = np.nan  # weights of tokens that do not count are never read
    scores[ZERO_ONE] = (scores[REFERENCE] < 4).astype(np.float32)
    return make_batch(rng.integers(0, 64, (ROWS, LENGTH)), segments, mask, rng.integers(0, 3, (ROWS, LENGTH)), scores)


def _run(weighting, selection=None, config=None, devices=1, micro_batches=1, batch=None, model=MODEL):
    """Gradient and metric sums of one step."""
    mesh = mesh_lib.make_mesh(config or MeshConfig(), jax.devices()[:devices])
    batch = _batch() if batch is None else batch
    with jax.set_mesh(mesh):
        state = init_state(model, KEEP, mesh, seed=0)
        step = make_step(model, selection, KEEP, lambda _: 0.0, 0, micro_batches, weighting=weighting)
        step = compile_step(step, mesh, state_shapes(model, KEEP, mesh))
        state, sums = step(state, jax.device_put(batch, mesh_lib.batch_sharding(mesh)))
    return jax.device_get(state.opt_state), jax.device_get(sums)


@functools.cache
def _model():
    """What the definition needs, in float64: losses, entropies of the 20 likeliest, valid tokens, and the derivative of
    each loss in the scale of the final norm, [B, L, D]."""
    batch, params = (
        jax.tree.map(jnp.asarray, _batch()),
        init_state(MODEL, KEEP, mesh_lib.make_mesh(None, jax.devices()[:1]), 0).params,
    )

    def losses(scale):
        return batch_loss_and_entropies(params | {"final_norm": {"scale": scale}}, MODEL, batch, (20,))

    jacobian, entropies = jax.jit(jax.jacrev(losses, has_aux=True))(params["final_norm"]["scale"])
    found, _ = jax.jit(losses)(params["final_norm"]["scale"])
    valid = batch.loss_mask & predicted(batch.segment_ids)
    return tuple(np.asarray(x, np.float64) for x in (found, entropies[20], valid, jacobian))


def _kept(losses, valid):
    """The 60 % of the valid tokens with the highest excess loss."""
    excess = np.where(valid, losses - _batch().scores[REFERENCE], -np.inf).reshape(-1)
    kept = np.zeros(excess.shape)
    kept[np.argsort(-excess, kind="stable")[: int(valid.sum() * 0.6 + 0.5)]] = 1
    return kept.reshape(valid.shape)


def _p(loss):
    return np.exp(-loss)


# name -> weighting, selection, and the weights in NumPy, from losses and entropies
ARMS = {
    "column": (Weighting(ColumnWeight("given/weight")), None, lambda *_: np.nan_to_num(_batch().scores[GIVEN])),
    "focal, by tokens": (Weighting(Focal(), "tokens"), None, lambda loss, _: (1 - _p(loss)) ** 2),
    "eaft, floor": (Weighting(EAFT(), unselected=0.25), Selection(), lambda _, entropy: entropy / np.log(20)),
    "dft, filtered": (Weighting(DFT()), Selection(gradient="filtered", capacity=1.0), lambda loss, _: _p(loss)),
}
SPLITS = {
    "1 device": {},
    "8 devices": {"devices": 8, "config": MeshConfig(data=8)},
    "2 devices, 4 micro-batches": {"devices": 2, "config": MeshConfig(fsdp=2), "micro_batches": 4},
}


@functools.cache
def _found(name, split):
    weighting, selection, _ = ARMS[name]
    return _run(weighting, selection, **SPLITS[split])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ARMS)
def test_weighted_steps_are_their_definition(name, split):
    """sum(w * dl) / sum(w), or by the number of tokens, in float64; and one gradient however the batch is split."""
    weighting, selection, formula = ARMS[name]
    losses, entropies, valid, jacobian = _model()
    trained = valid if selection is None else _kept(losses, valid)
    weights = np.where(trained > 0, formula(losses, entropies), weighting.unselected) * valid
    divisor = weights.sum() if weighting.normalise == "weights" else trained.sum()

    gradient, sums = _found(name, split)
    if "filtered" not in name:  # in the last layer's norm it would be exact too; its own tests say what it leaves out
        expected = np.einsum("bl,bld->d", weights, jacobian) / divisor
        np.testing.assert_allclose(gradient["final_norm"]["scale"], expected, rtol=1e-4, atol=1e-6)
    assert sums["trained_tokens"] == trained.sum() and sums["bad_weights"] == 0
    np.testing.assert_allclose(sums["weight_sum"], weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["weighted_loss_sum"], (weights * losses).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["source_weight"].sum(), weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss_sum"], (losses * valid).sum(), rtol=1e-5)  # unweighted
    one, _ = _found(name, "1 device")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), gradient, one)


def known_one(segment_ids):
    return jnp.ones(segment_ids.shape)


def one(own_loss):
    return own_loss * 0 + 1


@pytest.mark.parametrize(
    ("rule", "selection"),
    [(known_one, None), (one, Selection(ratio=0.6)), (one, Selection(ratio=0.6, gradient="filtered"))],
    ids=["causal", "selective", "filtered"],
)
def test_weight_one_is_no_weighting(rule, selection):
    """To the bit where weights are known before the losses; else up to the order in which XLA adds."""
    plain, plain_sums = _run(Weighting(), selection)
    found, sums = _run(Weighting(rule), selection)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if selection else {"rtol": 0, "atol": 0}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, plain)
    for name, value in plain_sums.items():
        np.testing.assert_allclose(sums[name], value, **tolerance, err_msg=name)
    assert sums["weight_sum"] == plain_sums["trained_tokens"]


def zero_one(own_loss, columns):
    return columns[ZERO_ONE] + 0 * own_loss


zero_one.columns = (ZERO_ONE,)


@pytest.mark.parametrize("rule", [ColumnWeight("zero_one/weight"), zero_one], ids=["known before", "with the losses"])
def test_weights_of_zero_and_one_are_a_selection(rule):
    """The reported loss is still that of all valid tokens, also where one pass computes losses and gradient."""
    selected, selected_sums = _run(Weighting(), Selection("reference", threshold=-4.0))
    found, sums = _run(Weighting(rule))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, selected)
    assert sums["weight_sum"] == selected_sums["trained_tokens"] < sums["valid_tokens"]
    np.testing.assert_allclose(sums["loss_sum"], selected_sums["loss_sum"], rtol=1e-6)
    np.testing.assert_allclose(sums["weighted_loss_sum"], selected_sums["trained_loss_sum"], rtol=1e-6)


def test_small_weights_are_divided_by_their_sum_and_none_by_one():
    """A sum of weights below 1 is no empty batch, and an empty batch has gradient 0."""
    plain, _ = _run(Weighting())
    tiny, sums = _run(Weighting(lambda segment_ids: jnp.full(segment_ids.shape, 1e-6)))
    assert sums["weight_sum"] < 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), tiny, plain)
    nothing, sums = _run(Weighting(lambda segment_ids: jnp.zeros(segment_ids.shape)))
    assert sums["weight_sum"] == 0 and sums["loss_sum"] > 0 and all((x == 0).all() for x in jax.tree.leaves(nothing))


# ---- Runs


@pytest.fixture(scope="module")
def weighted(corpus, tmp_path_factory):
    """Four steps weighted by position, with the loss of held-out rows; beside it, the same without weights."""
    folder = tmp_path_factory.mktemp("weighted")
    for name, rule in (("weighted", PositionTanh(3.0)), ("plain", None)):
        held = HeldOut("held", corpus.path, rows=8)
        phases = [toy.phase(corpus, steps=4, weighting=rule)]
        toy.train_here(folder / name, phases, evaluators=[held], evaluate_every=4, checkpoint_every=2)
    return folder


def test_a_run_keeps_its_weighting(weighted, corpus):
    run, plain = RunDirectory(weighted / "weighted"), RunDirectory(weighted / "plain")
    assert run.record()["settings"]["phases"][0]["weighting"] == {
        "rule": "PositionTanh",
        "settings": {"scale": 3.0},
        "columns": [],
    }
    rows, plain_rows = ([row for row in r.metrics() if "loss" in row] for r in (run, plain))
    assert all(0 < row["weight_sum"] < row["tokens_seen"] for row in rows) and "weight_sum" not in plain_rows[0]
    assert {"weighted_loss", "mean_weight/a", "mean_weight/b"} <= set(rows[0])
    assert rows[0]["loss"] == plain_rows[0]["loss"] and rows[-1]["loss"] != plain_rows[-1]["loss"]
    # Evaluators know no weights.
    first, plain_first = (next(row for row in r.metrics() if "held/loss" in row) for r in (run, plain))
    assert first["held/loss"] == plain_first["held/loss"]


@pytest.mark.parametrize("rule", [None, PositionTanh(4.0), DFT()], ids=["none", "other setting", "other rule"])
def test_a_run_is_not_continued_with_another_weighting(weighted, corpus, rule):
    phases = [toy.phase(corpus, steps=6, weighting=rule)]
    line = toy.refused("resume-other-weighting", toy.train_here, weighted / "weighted", phases)
    assert "PositionTanh" in line and "phase 0" in line


def test_the_plan_says_how_tokens_are_weighted(weighted, corpus, capsys):
    toy.train_here(weighted / "never", [toy.phase(corpus, weighting=Focal(1.0), normalise="tokens")], dry_run=True)
    assert "all tokens, weights Focal(gamma=1.0), divided by the number of tokens" in capsys.readouterr().out


def negative(segment_ids):
    return jnp.where(jnp.arange(segment_ids.shape[1]) == 3, -1.0, 1.0) * jnp.ones(segment_ids.shape)


def infinite(own_loss):
    return 1 / (0 * own_loss)


@pytest.mark.parametrize("rule", [negative, infinite], ids=["negative", "infinite"])
def test_a_weight_that_is_none_stops_the_run(rule, corpus, tmp_path):
    phases = [toy.phase(corpus, steps=2, weighting=rule)]
    line = toy.refused("weights-unusable", toy.train_here, tmp_path / "run", phases, checkpoint_every=1)
    assert line.startswith("step 1: ") and "tokens have a weight that is negative or not finite" in line
    assert RunDirectory(tmp_path / "run").checkpoint_steps() == [0]
    assert toy.losses(tmp_path / "run") == []


def test_a_column_that_is_absent_is_one_line(corpus, tmp_path):
    phases = [toy.phase(corpus, weighting=ColumnWeight("nowhere/weight"))]
    assert "'nowhere'" in toy.refused("score-not-found", toy.train_here, tmp_path / "run", phases)
