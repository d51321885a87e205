"""Dropout: how much is dropped where, that a key decides it, and that neither remat nor the mesh do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.mesh import MeshConfig
from slm_jax.models import forward
from slm_jax.models.layers import dropout
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.token_loss import batch_loss

RATE = 0.3
# Everything that is off in a Llama: these parameters are split over a mesh nowhere else in the tests.
MODEL = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    norm="layer",
    mlp="gelu",
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    query_key_norm=True,
    rotary_share=0.5,
    init_std=0.2,
    dropout=RATE,
)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def params():
    return forward.init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    segments = np.ones((8, 12), np.int32)
    segments[:, 7:], segments[2, 9:] = 2, 0
    return jax.tree.map(jnp.asarray, make_batch(rng.integers(0, 64, segments.shape), segments, segments > 0))


@functools.partial(jax.jit, static_argnums=1)
def _losses_and_gradient(params, model, batch, key):
    def total(params):
        losses = batch_loss(params, model, batch, key)
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(total, has_aux=True)(params)
    return losses, gradient


def _close(found, expected, tolerance=1e-4):
    def check(path, a, b):
        scale = float(jnp.abs(b).max()) or 1.0
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=mesh_lib.path_name(path))

    jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_share_is_dropped_and_the_mean_stays(dtype):
    """Within four standard deviations of a binomial; what is kept is scaled to the precision of its type."""
    size = 100_000
    dropped = dropout(jnp.ones(size, dtype), RATE, KEY)
    share = float(jnp.mean(dropped == 0))
    assert abs(share - RATE) < 4 * (RATE * (1 - RATE) / size) ** 0.5
    assert float(dropped.max()) == jnp.asarray(1 / (1 - RATE), dtype) and dropped.dtype == dtype
    np.testing.assert_array_equal(dropped, dropout(jnp.ones(size, dtype), RATE, KEY))


def test_layers_and_parts_drop_independently(params):
    """Every part adds 1 to a stream of 0, whatever it reads: the stream is then a sum of four masks, each 0 or 1 / 0.7.

    Its mean is 4 and its variance 4 r / (1 - r); of masks that are shared by parts or layers it would be twice that.
    """
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, mesh_lib.path_name(path) in ("attention/out/bias", "mlp/down/bias"), x.dtype),
        params["layers"],
    )
    positions, segments = jnp.tile(jnp.arange(64), (32, 1)), jnp.ones((32, 64), jnp.int32)
    stream = forward.layers({"layers": silent}, MODEL, jnp.zeros((32, 64, 32)), positions, segments, KEY)
    assert float(stream.mean()) == pytest.approx(4, rel=0.01)
    assert float(stream.var()) == pytest.approx(4 * RATE / (1 - RATE), rel=0.03)


def test_the_embedding_is_dropped(params):
    """With layers that add nothing: what is 0 in the stream comes out of the final norm as its lowest value."""
    quiet = params | {"layers": jax.tree.map(jnp.zeros_like, params["layers"])}
    quiet["embed"] = {"embedding": jnp.ones((64, 32))}
    tokens = jnp.zeros((8, 64), jnp.int32)
    hidden = forward.hidden_states(quiet, MODEL, tokens, tokens, tokens + 1, KEY)
    dropped = jnp.mean(jnp.isclose(hidden, hidden.min(axis=-1, keepdims=True)))
    assert float(dropped) == pytest.approx(RATE, abs=0.02)


def test_the_key_decides(params, batch):
    losses, gradient = _losses_and_gradient(params, MODEL, batch, KEY)
    again = _losses_and_gradient(params, MODEL, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, again, (losses, gradient))
    other, _ = _losses_and_gradient(params, MODEL, batch, jax.random.key(8))
    without = batch_loss(params, MODEL, batch)
    valid = losses != 0
    assert (jnp.abs(losses - other) > 1e-3)[valid].mean() > 0.9
    assert (jnp.abs(losses - without) > 1e-3)[valid].mean() > 0.9


def test_without_a_key_or_a_rate_the_program_is_the_same(params, batch):
    off = dataclasses.replace(MODEL, dropout=0.0)
    text = lambda model, *key: jax.jit(lambda p: batch_loss(p, model, batch, *key)).lower(params).as_text()  # noqa: E731
    assert text(MODEL) == text(off)
    np.testing.assert_array_equal(batch_loss(params, off, batch, KEY), batch_loss(params, off, batch))


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_remat_drops_the_same(params, batch, remat):
    expected = _losses_and_gradient(params, MODEL, batch, KEY)
    _close(_losses_and_gradient(params, dataclasses.replace(MODEL, remat=remat), batch, KEY), expected)


def test_the_gradient_is_that_of_the_masks_of_the_forward_pass(params, batch):
    """Against a difference quotient of the loss with the same key, in a random direction."""
    _, gradient = _losses_and_gradient(params, MODEL, batch, KEY)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    direction = jax.tree.map(lambda key, x: jax.random.normal(key, x.shape), keys, params)
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))

    def at(distance):
        moved = jax.tree.map(lambda x, along: x + distance * along, params, direction)
        return float(jnp.sum(_losses_and_gradient(moved, MODEL, batch, KEY)[0]))

    assert (at(1e-3) - at(-1e-3)) / 2e-3 == pytest.approx(float(slope), rel=0.02)


@pytest.mark.parametrize("config", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, model=2)], ids=["data", "all axes"])
def test_the_mesh_does_not_decide(params, batch, config):
    expected = _losses_and_gradient(params, MODEL, batch, KEY)
    mesh = mesh_lib.make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        split = jax.device_put(params, mesh_lib.tree_shardings(params, mesh))
        found = _losses_and_gradient(split, MODEL, jax.device_put(batch, mesh_lib.batch_sharding(mesh)), KEY)
    _close(mesh_lib.to_host(found), expected)
