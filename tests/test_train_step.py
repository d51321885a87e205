"""The train step: one device = eight devices = four micro-batches; what counts, what stops, what decays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.mesh import MeshConfig
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import batch_loss, predicted
from slm_jax.train.optimizer import OptimizerConfig, decay_mask, make_optimizer
from slm_jax.train.state import init_state, state_shapes
from slm_jax.train.step import compile_step, make_step, token_weights

MODEL = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48)
COLUMN = "scores/reference/loss"
ROWS, LENGTH = 8, 16
RATE = 1e-2


def _batch(seed=0):
    """Rows with masks as uneven as they come: one fully masked, one nearly so, packed segments, padding."""
    rng = np.random.default_rng(seed)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 5:] = 2
    segments[2, 9:] = 0
    mask = rng.random((ROWS, LENGTH)) < np.linspace(0.1, 1, ROWS)[:, None]
    mask[3] = False
    scores = {COLUMN: rng.normal(4, 1, (ROWS, LENGTH)).astype(np.float32)}
    return make_batch(rng.integers(0, 64, (ROWS, LENGTH)), segments, mask, rng.integers(0, 3, (ROWS, LENGTH)), scores)


def _run(selection, mesh_config=None, devices=None, gradient_accumulation_steps=1, batch=None, steps=1):
    mesh = mesh_lib.make_mesh(mesh_config or MeshConfig(), devices or jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig())
    batch = _batch() if batch is None else batch
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, mesh, seed=0)
        step = make_step(MODEL, selection, optimizer, lambda _: RATE, 0, gradient_accumulation_steps)
        step = compile_step(step, mesh, state_shapes(MODEL, optimizer, mesh))
        for _ in range(steps):
            state, sums = step(state, jax.device_put(batch, mesh_lib.batch_sharding(mesh)))
    return jax.device_get(state), jax.device_get(sums)


SELECTIONS = {
    "causal": None,
    "batch": Selection(ratio=0.6),
    "sequence": Selection(ratio=0.6, scope="sequence"),
    "random": Selection(score="random", ratio=0.6),
    "filtered": Selection(ratio=0.6, gradient="filtered", capacity=1.0),
}


@functools.cache
def _one_device(name):
    """What a selection makes of one step on one device, in one piece."""
    return _run(SELECTIONS[name])


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("split", ["8 data", "2x2x2", "2 devices, 4 micro-batches"])
def test_equal_on_any_split(name, split):
    """Loss, counts and gradients (seen through Adam's first moment) equal those of one device in one piece."""
    if split == "8 data":
        arguments = {"mesh_config": MeshConfig(data=8), "devices": jax.devices()}
    elif split == "2x2x2":
        arguments = {"mesh_config": MeshConfig(data=2, fsdp=2, model=2), "devices": jax.devices()}
    else:
        arguments = {"mesh_config": MeshConfig(fsdp=2), "devices": jax.devices()[:2], "gradient_accumulation_steps": 4}
    expected, expected_sums = _one_device(name)
    state, sums = _run(SELECTIONS[name], **arguments)
    for key in expected_sums:
        np.testing.assert_allclose(sums[key], expected_sums[key], rtol=1e-6, atol=1e-6, err_msg=key)
    moments, expected_moments = state.opt_state[1].mu, expected.opt_state[1].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), moments, expected_moments)


def test_the_loss_is_divided_by_the_number_selected_in_the_global_batch():
    """Against the definition, computed outside: a gradient step on sum(selected losses) / number selected."""
    optimizer = make_optimizer(OptimizerConfig())
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    batch = jax.tree.map(jnp.asarray, _batch())
    params = init_state(MODEL, optimizer, mesh, seed=0).params
    loss = jax.jit(lambda params: batch_loss(params, MODEL, batch))(params)
    valid = np.asarray(batch.loss_mask & predicted(batch.segment_ids))
    excess = np.where(valid, np.asarray(loss) - batch.scores[COLUMN], -np.inf).reshape(-1)
    count = int(np.floor(valid.sum() * 0.6 + 0.5))
    chosen = np.zeros(excess.shape, bool)
    chosen[np.argsort(-excess, kind="stable")[:count]] = True
    chosen = chosen.reshape(valid.shape)

    def objective(params):
        return jnp.sum(jnp.where(chosen, batch_loss(params, MODEL, batch), 0)) / count

    gradient = jax.jit(jax.grad(objective))(params)
    _, expected = optimizer.update(gradient, optimizer.init(params), params)
    _, sums = _one_device("batch")
    assert sums["trained_tokens"] == count
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-5)
    # Seen through the first moment: Adam's first update is nearly the sign of a gradient, however small that is.
    state, _ = _one_device("batch")
    moments, expected_moments = state.opt_state[1].mu, expected[1].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), moments, expected_moments)


def test_device_scope_selects_on_each_shard():
    _, sums = _run(Selection(ratio=0.5, scope="device"), MeshConfig(data=4), jax.devices()[:4])
    batch = _batch()
    valid = np.asarray(batch.loss_mask & predicted(batch.segment_ids)).reshape(4, -1).sum(axis=1)
    assert sums["trained_tokens"] == sum(min(v, max(1, np.floor(v * 0.5 + 0.5))) for v in valid)


def test_micro_batch_scope_selects_in_each():
    """Each micro-batch, of every fourth row, keeps its share; the loss is over all that were kept."""
    _, sums = _run(Selection(ratio=0.5, scope="micro_batch"), gradient_accumulation_steps=4)
    batch = _batch()
    valid = np.asarray(batch.loss_mask & predicted(batch.segment_ids)).sum(axis=1).reshape(-1, 4).sum(axis=0)
    assert sums["trained_tokens"] == np.floor(valid * 0.5 + 0.5).sum()
    _, whole = _one_device("causal")
    np.testing.assert_allclose(sums["loss_sum"], whole["loss_sum"], rtol=1e-6)


def test_ratio_one_is_causal():
    state, sums = _run(Selection(ratio=1.0))
    expected, expected_sums = _one_device("causal")
    assert sums["trained_tokens"] == expected_sums["valid_tokens"]
    np.testing.assert_allclose(sums["loss_sum"], expected_sums["loss_sum"], rtol=1e-6)
    moments, expected_moments = state.opt_state[1].mu, expected.opt_state[1].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), moments, expected_moments)


def test_a_fully_masked_batch_changes_nothing_but_decay():
    """No valid token: gradient 0, no NaN; weight decay alone moves matrices, norms stay."""
    batch = _batch()._replace(loss_mask=np.zeros((ROWS, LENGTH), bool))
    state, sums = _run(Selection(), batch=batch)
    assert sums["trained_tokens"] == 0 and sums["grad_norm"] == 0
    assert (state.params["final_norm"]["scale"] == 1).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_scores_that_are_not_finite_drop_out_and_are_counted():
    batch = _batch()
    valid = np.asarray(batch.loss_mask & predicted(batch.segment_ids))
    scores = batch.scores[COLUMN].copy()
    rows, columns = np.nonzero(valid)
    scores[rows[:5], columns[:5]] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
    scores[~valid] = np.nan  # those of tokens that do not count are nobody's business
    _, sums = _run(Selection(ratio=1.0), batch=batch._replace(scores={COLUMN: scores}))
    assert sums["nonfinite_scores"] == 5
    assert sums["trained_tokens"] == valid.sum() - 5
    assert np.isfinite(sums["trained_loss_sum"])


def test_sums_by_source_add_up():
    _, sums = _one_device("batch")
    for part, whole in (
        ("source_valid", "valid_tokens"),
        ("source_trained", "trained_tokens"),
        ("source_loss", "loss_sum"),
    ):
        np.testing.assert_allclose(sums[part].sum(), sums[whole], rtol=1e-5)
    np.testing.assert_allclose(sums["trained_loss_sum"] + sums["untrained_loss_sum"], sums["loss_sum"], rtol=1e-6)


def test_sums_by_source_of_millions_of_tokens():
    """Added one by one in float32, the loss would lose more than a thousandth."""
    shape = (1024, 4096)
    rng = np.random.default_rng(0)
    loss, ids = rng.exponential(2.5, shape).astype(np.float32), (rng.random(shape) < 0.1).astype(np.uint8)
    batch = make_batch(np.ones(shape, np.int32), np.ones(shape, np.int32), np.ones(shape, bool), ids)
    sums = jax.jit(lambda loss, batch: token_weights(None, loss, batch, jax.random.key(0))[1])(loss, batch)
    for source in (0, 1):
        exact = loss[:, 1:][ids[:, 1:] == source].astype(np.float64).sum()
        np.testing.assert_allclose(sums["source_loss"][source], exact, rtol=1e-5)


def test_the_moving_average_of_a_constant_is_the_constant():
    mesh, optimizer = mesh_lib.make_mesh(None, jax.devices()[:1]), make_optimizer(OptimizerConfig())
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, mesh, seed=0, ema=True)
        start = jax.device_get(state.params)
        step = jax.jit(make_step(MODEL, None, optimizer, lambda _: 0.0, 0, ema=0.99999))
        for _ in range(20):
            state, _ = step(state, _batch())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.average), start)


def test_random_selection_changes_from_step_to_step():
    first, second = (_run(SELECTIONS["random"], steps=steps)[1] for steps in (1, 2))
    assert first["trained_loss_sum"] != second["trained_loss_sum"]
    assert first["trained_tokens"] == second["trained_tokens"]


def test_decay_skips_norms():
    shapes = state_shapes(MODEL, make_optimizer(OptimizerConfig()), mesh_lib.make_mesh(None, jax.devices()[:1]))
    mask = decay_mask(shapes.params)
    assert mask["embed"]["embedding"] and mask["head"]["kernel"] and mask["layers"]["mlp"]["up"]["kernel"]
    assert not mask["final_norm"]["scale"] and not mask["layers"]["attention_norm"]["scale"]


def test_moments_are_sharded_like_their_parameters():
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, model=2), jax.devices())
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(MODEL, optimizer, mesh, seed=0)
    adam = state.opt_state[1]
    for moments in (adam.mu, adam.nu):
        jax.tree.map(lambda p, m: _same_sharding(p, m), state.params, moments)
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 24), "fsdp and model split the kernel"
    same = init_state(MODEL, optimizer, mesh_lib.make_mesh(None, jax.devices()[:1]), seed=0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), jax.device_get(state), jax.device_get(same))


def _same_sharding(parameter, moment):
    assert parameter.sharding.is_equivalent_to(moment.sharding, parameter.ndim)


def test_bfloat16_compute_trains_float32_parameters():
    mesh = mesh_lib.make_mesh(None, jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig())
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    state = init_state(model, optimizer, mesh, seed=0)
    state, sums = jax.jit(make_step(model, Selection(), optimizer, lambda _: RATE, 0))(state, _batch())
    assert np.isfinite(sums["loss_sum"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
