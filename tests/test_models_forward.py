"""The transformer: parameter counts, causality, segment isolation, rotary restart, remat and dtype."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax.data.batches import make_batch
from slm_jax.models import forward
from slm_jax.models.model_config import SIZES, ModelConfig, RopeScaling, model_config
from slm_jax.score.token_loss import batch_loss

TINY = ModelConfig(
    vocab_size=61, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, init_std=0.2
)
LENGTH = 12


@pytest.fixture(scope="module")
def params():
    return forward.init_params(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def row():
    """Two segments of 7 and 3 tokens, then padding: tokens, positions, segment_ids, each [1, L]."""
    segments = np.array([[1] * 7 + [2] * 3 + [0] * 2])
    positions = np.array([[*range(7), *range(3), 0, 0]])
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (1, LENGTH))
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count_equals_the_tree(tied):
    config = dataclasses.replace(TINY, tied_head=tied)
    leaves = jax.tree.leaves(forward.init_params(config, jax.random.key(1)))
    assert sum(leaf.size for leaf in leaves) == config.parameter_count()
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_a_padded_vocabulary_gives_the_padding_no_probability(row):
    """61 ids padded to 64 columns: the same losses as with 61, whatever the columns hold."""
    tokens, _, segments = row
    config = dataclasses.replace(TINY, vocab_multiple=64)
    params = forward.init_params(config, jax.random.key(0))
    assert params["head"]["kernel"].shape == (32, 64) and params["embed"]["embedding"].shape == (64, 32)
    assert config.parameter_count() == TINY.parameter_count() + 2 * 3 * 32
    cut = params | {"head": {"kernel": params["head"]["kernel"][:, :61]}}
    cut["embed"] = {"embedding": params["embed"]["embedding"][:61]}
    batch = jax.tree.map(jnp.asarray, make_batch(np.asarray(tokens), np.asarray(segments), np.ones(tokens.shape, bool)))
    np.testing.assert_allclose(batch_loss(params, config, batch), batch_loss(cut, TINY, batch), atol=1e-5)
    assert forward.logits(params, config, jnp.ones((1, 1, 32))).shape[-1] == 61


def _influence(params, row, length=LENGTH):
    """[L, L]: entry (t, s) is the largest |d hidden[t] / d embedding of token s|."""
    tokens, positions, segments = row
    x = forward.embed(params, TINY, tokens)
    jacobian = jax.jacrev(lambda x: forward.layers(params, TINY, x, positions, segments)[0])(x)[:, :, 0]  # [L, D, L, D]
    return np.asarray(jnp.abs(jacobian).max(axis=(1, 3)))


def test_causality_and_segment_isolation_by_zero_gradients(params, row):
    influence = _influence(params, row)
    segments = np.asarray(row[2][0])
    allowed = (segments[:, None] == segments[None]) & (np.arange(LENGTH)[:, None] >= np.arange(LENGTH)[None])
    assert (influence[~allowed] == 0).all(), "a token reads the future or another document"
    real = segments > 0
    assert (influence[allowed & real[:, None]] > 0).all(), "a token does not read an earlier token of its document"


def test_a_packed_document_gives_the_same_states_as_alone(params, row):
    """Rotary restarts: the second segment's states equal those of its tokens in a row of their own."""
    tokens, positions, segments = row
    packed = forward.hidden_states(params, TINY, tokens, positions, segments)[0, 7:10]
    alone = forward.hidden_states(params, TINY, tokens[:, 7:10], positions[:, 7:10], segments[:, 7:10])[0]
    np.testing.assert_allclose(packed, alone, atol=2e-6)


def test_positions_matter(params, row):
    """Were positions not read, the test above would pass with any of them."""
    tokens, positions, segments = row
    moved = forward.hidden_states(params, TINY, tokens, positions * 2, segments)
    assert not np.allclose(moved, forward.hidden_states(params, TINY, tokens, positions, segments), atol=1e-3)


def test_rotary_depends_on_distance_only(params):
    tokens = jnp.arange(5)[None]
    segments = jnp.ones((1, 5), jnp.int32)
    states = [forward.hidden_states(params, TINY, tokens, jnp.arange(5)[None] + shift, segments) for shift in (0, 100)]
    np.testing.assert_allclose(*states, atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_remat_changes_nothing(params, row, remat):
    tokens, positions, segments = row

    def loss(params, config):
        return jnp.sum(forward.hidden_states(params, config, tokens, positions, segments) ** 3)

    value, gradient = jax.value_and_grad(loss)(params, TINY)
    other_value, other_gradient = jax.value_and_grad(loss)(params, dataclasses.replace(TINY, remat=remat))
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, other_gradient)


def test_jit_changes_nothing(params, row):
    run = lambda params: forward.hidden_states(params, TINY, *row)  # noqa: E731
    np.testing.assert_allclose(run(params), jax.jit(run)(params), atol=2e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_gradients(params, row):
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    states = forward.hidden_states(params, config, *row)
    assert states.dtype == jnp.bfloat16
    exact = forward.hidden_states(params, TINY, *row)
    assert jnp.abs(states.astype(jnp.float32) - exact).max() < 0.1
    gradient = jax.grad(lambda p: jnp.sum(forward.hidden_states(p, config, *row).astype(jnp.float32)))(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def test_grouped_query_heads_equal_repeated_heads(params, row):
    """Two key-value heads read by two query heads each are four key-value heads, each twice."""
    config = dataclasses.replace(TINY, num_kv_heads=4)
    repeated = jax.tree.map(lambda x: x, params)
    for name in ("key", "value"):
        kernel = params["layers"]["attention"][name]["kernel"]
        repeated["layers"]["attention"][name] = {"kernel": jnp.repeat(kernel, 2, axis=2)}
    expected = forward.hidden_states(params, TINY, *row)
    np.testing.assert_allclose(forward.hidden_states(repeated, config, *row), expected, atol=2e-6)


def test_forward_by_hand():
    """One layer written out with numpy: norm, rotary, softmax, SwiGLU, residuals."""
    config = dataclasses.replace(TINY, num_layers=1, num_heads=1, num_kv_heads=1)
    params = forward.init_params(config, jax.random.key(3))
    tokens = np.array([[5, 9, 2]])
    segments = np.ones((1, 3), np.int32)
    states = forward.hidden_states(params, config, jnp.asarray(tokens), jnp.arange(3)[None], jnp.asarray(segments))
    np.testing.assert_allclose(states[0], _numpy_forward(params, config, tokens[0]), atol=1e-5)


def _numpy_forward(params, config, tokens):
    get = lambda *path: np.asarray(_at(params, path), np.float64)  # noqa: E731
    layer = lambda *path: get("layers", *path)[0]  # noqa: E731
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale  # noqa: E731
    x = get("embed", "embedding")[tokens]
    normed = norm(x, layer("attention_norm", "scale"))
    query, key, value = (normed @ layer("attention", n, "kernel")[:, 0] for n in ("query", "key", "value"))
    half = config.head_dim // 2
    angles = np.arange(len(tokens))[:, None] / config.rope_theta ** (np.arange(half) / half)
    turn = np.exp(1j * angles)

    def rotate(v):
        turned = (v[:, :half] + 1j * v[:, half:]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    logits = rotate(query) @ rotate(key).T / np.sqrt(config.head_dim)
    logits = np.where(np.tri(len(tokens), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + weights @ value @ layer("attention", "out", "kernel")[0]
    normed = norm(x, layer("mlp_norm", "scale"))
    gate = normed @ layer("mlp", "gate", "kernel")
    hidden = gate / (1 + np.exp(-gate)) * (normed @ layer("mlp", "up", "kernel"))
    return norm(x + hidden @ layer("mlp", "down", "kernel"), get("final_norm", "scale"))


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_named_sizes_take_changes():
    assert model_config("tinyllama_1_1b", num_layers=2) == dataclasses.replace(SIZES["tinyllama_1_1b"], num_layers=2)
    assert "'tiny_llama'" in (line := toy.refused("model-size-unknown", model_config, "tiny_llama"))
    assert "tinyllama_1_1b" in line


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 3, "num_kv_heads": 2},
        {"head_dim": 7},
        {"head_dim": 8, "rotary_share": 0.4},
        {"head_dim": 8, "rotary_share": 0.1},
    ],
)
def test_impossible_shapes_are_refused(change):
    line = toy.refused("model-shape", dataclasses.replace, TINY, **change)
    assert all(name in line and str(value) in line for name, value in change.items())


@pytest.mark.parametrize(
    "change",
    [
        *({"compute_dtype": "float16"}, {"remat": "some"}, {"norm": "batch"}, {"mlp": "relu"}, {"attention": "flash"}),
        *({"num_layers": 0}, {"vocab_size": -1}, {"sliding_window": 0}, {"norm_eps": 0.0}, {"rope_theta": math.nan}),
        *({"dropout": 1.0}, {"rotary_share": 0.0}, {"rotary_share": 1.5}, {"init_std": -1.0}),
    ],
)
def test_values_that_a_setting_does_not_take_are_refused(change):
    ((name, value),) = change.items()
    code = "setting-unknown-value" if isinstance(value, str) else "setting-out-of-range"
    line = toy.refused(code, dataclasses.replace, TINY, **change)
    assert line.startswith(f"model.{name} is {value!r}: ")


@pytest.mark.parametrize("change", [{"high_freq_factor": 1.0}, {"low_freq_factor": 0.0}])
def test_a_scaling_out_of_range_is_refused(change):
    ((name, value),) = change.items()
    assert name in (line := toy.refused("setting-out-of-range", RopeScaling, **change)) and str(value) in line
