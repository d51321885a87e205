"""Three ways to a gradient: what they share, what `filtered` leaves out, and what no device ever sends."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.mesh import MeshConfig
from slm_jax.models import forward, transformer
from slm_jax.models.attention import attention
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import PositionSubset
from slm_jax.score.selection import Selection, filtered_capacity
from slm_jax.score.token_loss import batch_loss, predicted, predictors
from slm_jax.train.filtered_gradient import filtered_vjp
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.state import state_shapes
from slm_jax.train.step import compile_step, make_step, micro_batch_gradient, token_weights

MODEL = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=48)
# Rows of 40 and their products are lengths that no parameter has: whatever array has them holds tokens.
ROWS, LENGTH = 8, 40
COLUMN = "scores/reference/loss"


def _batch(seed=0, rows=ROWS):
    """Packed rows: two or three documents, padding at the end of one, a prompt without loss in another."""
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, LENGTH), np.int32)
    segments[:, 13:], segments[1::2, 27:], segments[2, 33:] = 2, 3, 0
    mask = segments > 0
    mask[3, :9] = False
    scores = {COLUMN: rng.normal(4, 1, segments.shape).astype(np.float32)}
    tokens, sources = rng.integers(0, 64, segments.shape), rng.integers(0, 3, segments.shape)
    return jax.tree.map(jnp.asarray, make_batch(tokens, segments, mask, sources, scores))


def _chooser(selection, batch):
    return lambda losses: token_weights(selection, losses, batch, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(1, 4))
def _filtered(params, model, batch, chosen, capacity=ROWS * LENGTH):
    return filtered_vjp(params, model, batch, capacity)[1](chosen.astype(jnp.float32))[0]


def _make_exact():
    def exact(params, model, batch, chosen):
        return jax.vjp(lambda params: batch_loss(params, model, batch), params)[1](chosen.astype(jnp.float32))[0]

    return jax.jit(exact, static_argnums=1)


_exact = _make_exact()


def _half(batch):
    """Some half of the tokens that have a loss."""
    return predicted(batch.segment_ids) & (jax.random.uniform(jax.random.key(1), batch.tokens.shape) < 0.5)


def _close(found, expected, tolerance=1e-5):
    def check(path, a, b):
        scale = float(jnp.abs(b).max()) or 1.0
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=mesh_lib.path_name(path))

    jax.tree_util.tree_map_with_path(check, found, expected)


VARIANTS = {
    "grouped": MODEL,
    "one key head, tied, window": dataclasses.replace(MODEL, num_kv_heads=1, tied_head=True, sliding_window=5),
    "padded vocabulary": dataclasses.replace(MODEL, vocab_size=61, vocab_multiple=64, num_heads=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_with_every_token_chosen_filtered_is_exact(name):
    """Also on packed rows: the last token of a document predicts nothing, and nothing reads its keys."""
    model = VARIANTS[name]
    params, batch = forward.init_params(model, jax.random.key(0)), _batch()
    batch, valid = batch._replace(tokens=batch.tokens % 61), predicted(batch.segment_ids)
    _close(_filtered(params, model, batch, valid), _exact(params, model, batch, valid))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_long_rows_leave_out_queries_only_where_they_may(late):
    """Rows of 512: spread evenly, the queries of other rows are left out; in the last quarter alone, none may be."""
    model = dataclasses.replace(MODEL, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8)
    params = forward.init_params(model, jax.random.key(0))
    tokens, segments = np.random.default_rng(0).integers(0, 64, (2, 512)), np.ones((2, 512), np.int32)
    batch = jax.tree.map(jnp.asarray, make_batch(tokens, segments, segments > 0))
    chosen = predicted(batch.segment_ids) & (jnp.arange(512) > (383 if late else 0))
    capacity = int(jnp.sum(chosen))  # more room would be more places for each quarter
    subset = PositionSubset.from_mask(predictors(chosen), capacity)
    assert forward.fits_quarters(model, subset, 2, 512) == (not late)
    batch = batch._replace(loss_mask=chosen)
    found, exact = _filtered(params, model, batch, chosen, capacity), _exact(params, model, batch, chosen)
    if not late:
        _close(found, exact)
    for name in ("query", "out"):  # of one layer, only keys and values feel what is held constant
        _close(found["layers"]["attention"][name], exact["layers"]["attention"][name])


def test_causal_is_exact():
    """Loss and gradient in one pass over the head, against two; a prompt's tokens are neither trained nor counted."""
    params, batch = forward.init_params(MODEL, jax.random.key(0)), _batch()
    found, sums = jax.jit(lambda p: micro_batch_gradient(p, MODEL, None, 0, batch, None, jax.random.key(0)))(params)
    valid = batch.loss_mask & predicted(batch.segment_ids)
    _close(found, _exact(params, MODEL, batch, valid))
    losses = jnp.where(valid, batch_loss(params, MODEL, batch), 0.0)
    np.testing.assert_allclose(sums["loss_sum"], losses.sum(), rtol=1e-6)


def test_filtered_is_the_gradient_with_the_keys_and_values_of_others_held_constant(monkeypatch):
    """By definition: the exact gradient of a model in which they are constants."""
    params, batch = forward.init_params(MODEL, jax.random.key(0)), _batch()
    chosen = _half(batch)
    rows = predictors(chosen)[..., None, None]

    def with_constants(query, key, value, *rest, **settings):
        key, value = (jnp.where(rows, x, jax.lax.stop_gradient(x)) for x in (key, value))
        return attention(query, key, value, *rest, **settings)

    found, exact = _filtered(params, MODEL, batch, chosen), _exact(params, MODEL, batch, chosen)
    monkeypatch.setattr(transformer, "attention", with_constants)
    _close(found, _make_exact()(params, MODEL, batch, chosen))
    key = found["layers"]["attention"]["key"]["kernel"]
    assert jnp.abs(key - exact["layers"]["attention"]["key"]["kernel"]).max() > 0.1 * jnp.abs(key).max()


def test_filtered_by_hand():
    """One layer whose queries are 0, so that position t reads the mean of the values up to it. Token 2 alone trains, so
    only position 1 is differentiated: of the mean (v0 + v1) / 2 that it reads, v1 alone moves."""
    model = dataclasses.replace(MODEL, num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=4, head_dim=2, mlp_dim=4)
    params = forward.init_params(model, jax.random.key(0))
    for name in ("attention/query", "mlp/down"):
        owner, part = name.split("/")
        kernel = params["layers"][owner][part]["kernel"]
        params["layers"][owner][part]["kernel"] = jnp.zeros_like(kernel)
    params["embed"]["embedding"] = jnp.eye(64, 4) + 1.0
    tokens, segments = np.array([[0, 1, 2]]), np.ones((1, 3), np.int32)
    batch = jax.tree.map(jnp.asarray, make_batch(tokens, segments, segments > 0))
    chosen = jnp.array([[False, False, True]])
    found = _filtered(params, model, batch, chosen, 2)

    x = params["embed"]["embedding"][:2]
    normed = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + model.norm_eps)
    value, out = (
        params["layers"]["attention"]["value"]["kernel"][0, :, 0],
        params["layers"]["attention"]["out"]["kernel"][0, 0],
    )
    state = x[1] + (normed @ value).mean(0) @ out

    def loss(state):
        hidden = forward.final_norm(params, model, state[None, None])
        return -jax.nn.log_softmax(forward.logits(params, model, hidden))[0, 0, 2]

    at_value = 0.5 * out @ jax.grad(loss)(state)
    np.testing.assert_allclose(
        found["layers"]["attention"]["value"]["kernel"][0, :, 0], jnp.outer(normed[1], at_value), rtol=1e-4, atol=1e-7
    )


def test_positions_that_are_not_chosen_get_exactly_nothing():
    """Each row begins with a token of its own, which no chosen token's gradient reaches, although all attend to it."""
    batch = _batch()
    first = 40 + jnp.arange(ROWS)
    batch = batch._replace(tokens=(batch.tokens % 40).at[:, 0].set(first))
    params = forward.init_params(MODEL, jax.random.key(0))
    chosen = predicted(batch.segment_ids).at[:, 1].set(False)
    for gradient, reaches in ((_filtered, False), (_exact, True)):
        found = gradient(params, MODEL, batch, chosen)
        assert bool(jnp.any(found["embed"]["embedding"][40:48] != 0)) == reaches
        assert jnp.all(jnp.any(found["embed"]["embedding"][:40] != 0, axis=1))


def test_beyond_the_capacity_the_lowest_scores_are_dropped_and_counted():
    batch = _batch()
    full = Selection(ratio=0.6, gradient="filtered")
    params = forward.init_params(MODEL, jax.random.key(0))
    losses = jax.random.uniform(jax.random.key(1), batch.tokens.shape)
    chosen, sums = _chooser(full, batch)(losses)
    chosen = chosen > 0
    assert sums["dropped_tokens"] == 0, "on one device there is room for the whole share"
    small = dataclasses.replace(full, capacity=0.2)
    kept, small_sums = _chooser(small, batch)(losses)
    kept = kept > 0
    assert small_sums["trained_tokens"] == jnp.sum(kept) == filtered_capacity(small, batch.tokens.shape) == 64
    assert small_sums["dropped_tokens"] == sums["trained_tokens"] - 64
    excess = losses - batch.scores[COLUMN]
    assert excess[np.asarray(chosen & ~kept)].max() <= excess[np.asarray(kept)].min()
    _close(_filtered(params, MODEL, batch, kept, 64), _filtered(params, MODEL, batch, kept))


def test_bfloat16_stays_near_float32():
    model, batch = dataclasses.replace(MODEL, compute_dtype="bfloat16"), _batch()
    params = forward.init_params(MODEL, jax.random.key(0))
    found = _filtered(params, model, batch, _half(batch))
    _close(found, _filtered(params, MODEL, batch, _half(batch)), tolerance=0.1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


def _collectives(selection, config):
    """(operation, shapes of its results) of every collective in the compiled train step on eight devices."""
    mesh, optimizer = mesh_lib.make_mesh(config, jax.devices()), make_optimizer(OptimizerConfig())
    rows = mesh_lib.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), _batch(rows=16))
    with jax.set_mesh(mesh):
        shapes = state_shapes(MODEL, optimizer, mesh)
        step = compile_step(make_step(MODEL, selection, optimizer, lambda _: 1e-3, 0), mesh, shapes)
        program = step.lower(shapes, batch).compile().as_text()
    found = re.findall(r"= (.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\S*\(", program)
    return [
        (kind, [tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", shape)]) for shape, kind in found
    ]


ALL_AXES = MeshConfig(data=2, fsdp=2, model=2)


@pytest.mark.parametrize(
    "gradient, config", [("filtered", MeshConfig(data=8)), ("filtered", ALL_AXES), ("exact", ALL_AXES)]
)
def test_no_token_is_ever_gathered(gradient, config):
    """Read from the compiled step: what is gathered are parameters, and one count of ties per shard."""
    found = _collectives(Selection(gradient=gradient), config)
    assert any(kind == "all-reduce" for kind, _ in found)
    parameters = {leaf.shape for leaf in jax.tree.leaves(forward.param_shapes(MODEL))}
    sizes = {size for shape in parameters for size in shape} | {1, 8}  # 8: of ties
    for kind, shapes in found:
        for shape in shapes:
            if kind != "all-reduce":
                assert set(shape) <= sizes | {s // 2 for s in sizes}, f"{kind} of {shape} holds tokens"
