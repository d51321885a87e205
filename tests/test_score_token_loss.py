"""Loss per token: alignment, gradients under any cotangent, large vocabularies, padding columns, entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import mesh as mesh_lib
from slm_jax.mesh import MeshConfig
from slm_jax.score import token_loss as module
from slm_jax.score.token_loss import predicted, token_loss, token_loss_and_entropy, weighted_loss


def _inputs(rows=2, length=9, dim=16, vocab=50, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (rows, length, dim))
    head = 0.5 * jax.random.normal(keys[1], (dim, vocab))
    tokens = jax.random.randint(keys[2], (rows, length), 0, vocab)
    segments = jnp.ones((rows, length), jnp.int32).at[0, length // 2 :].set(2).at[0, length - 1 :].set(0)
    return hidden, head, tokens, segments, jax.random.normal(keys[3], (rows, length))


def _float64(hidden, head, tokens, segments, cotangent, vocab=None):
    """Loss and the gradients of sum(loss * cotangent), in numpy float64, written the long way."""
    hidden, head, cotangent = (np.asarray(x, np.float64) for x in (hidden, head, cotangent))
    tokens, segments = np.asarray(tokens), np.asarray(segments)
    vocab = head.shape[1] if vocab is None else vocab
    loss, d_hidden, d_head = np.zeros(tokens.shape), np.zeros(hidden.shape), np.zeros(head.shape)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            if segments[b, t] == 0 or segments[b, t] != segments[b, t - 1]:
                continue
            logits = hidden[b, t - 1] @ head[:, :vocab]
            log_z = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            loss[b, t] = log_z - logits[tokens[b, t]]
            d_logits = np.exp(logits - log_z)
            d_logits[tokens[b, t]] -= 1
            d_logits *= cotangent[b, t]
            d_hidden[b, t - 1] += head[:, :vocab] @ d_logits
            d_head[:, :vocab] += np.outer(hidden[b, t - 1], d_logits)
    return loss, d_hidden, d_head


def test_alignment_by_hand():
    """A 2 x 5 example worked by hand: logits are log(p), so each loss is -log of the probability written here."""
    p = jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])  # p[state][token]
    states = jnp.eye(3)
    hidden = states[jnp.array([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0]])]
    tokens = jnp.array([[0, 1, 2, 0, 1], [2, 0, 1, 2, 2]])
    segments = jnp.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
    # Token t is predicted by the state of token t - 1, unless a segment begins there.
    expected = -np.log(np.array([[1, 0.25, 0.1, 1, 0.25], [1, 0.2, 1, 1, 1]]))
    np.testing.assert_allclose(token_loss(hidden, jnp.log(p), tokens, segments), expected, atol=1e-6)
    assert predicted(segments).tolist() == [[False, True, True, False, True], [False, True, False, False, False]]


@pytest.mark.parametrize("vocab", [1000, 32000, 50304, 128256, 151936])
def test_gradients_under_random_cotangents(vocab):
    hidden, head, tokens, segments, cotangent = _inputs(length=5, dim=4, vocab=vocab)
    loss, pull = jax.vjp(lambda h, w: token_loss(h, w, tokens, segments), hidden, head)
    d_hidden, d_head = pull(cotangent)
    exact = _float64(hidden, head, tokens, segments, cotangent)
    np.testing.assert_allclose(loss, exact[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(d_hidden, exact[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_head, exact[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [3000, 151936])
def test_bfloat16_states_accumulate_in_float32(vocab):
    """A bfloat16 logsumexp is off by most of a nat at this vocabulary; ours differs by the inputs' rounding only."""
    hidden, head, tokens, segments, cotangent = _inputs(length=5, dim=4, vocab=vocab)
    hidden, head = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head))  # exact in both formats
    exact = _float64(hidden, head, tokens, segments, cotangent)
    loss, pull = jax.vjp(lambda h: token_loss(h, head, tokens, segments), hidden.astype(jnp.bfloat16))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, exact[0], atol=1e-4)
    d_hidden = pull(cotangent)[0].astype(jnp.float32)
    np.testing.assert_allclose(d_hidden, exact[1], atol=0.02)  # the gradient itself is stored in bfloat16


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 18, 1000])
def test_chunk_size_changes_nothing(monkeypatch, chunk_tokens):
    inputs = _inputs()
    exact = _float64(*inputs)
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, tokens, segments, cotangent = inputs
    loss, pull = jax.vjp(lambda h, w: token_loss(h, w, tokens, segments), hidden, head)
    for found, expected in zip((loss, *pull(cotangent)), exact, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_weighted_loss_is_the_weighted_sum_and_its_gradient():
    hidden, head, tokens, segments, weights = _inputs()
    weights = jnp.where(predicted(segments), weights, 0.0).at[1, 3].set(0.0)

    def total(hidden, head):
        return weighted_loss(hidden, head, tokens, weights)

    (found, losses), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    exact = _float64(hidden, head, tokens, segments, weights)
    np.testing.assert_allclose(found, np.sum(exact[0] * np.asarray(weights)), rtol=1e-5)
    np.testing.assert_allclose(losses, np.where(weights != 0, exact[0], 0), rtol=1e-5)
    np.testing.assert_allclose(total(hidden, head)[1], losses, rtol=1e-6)
    for found, expected in zip(gradients, exact[1:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_does_not_visit_tokens_without_a_cotangent():
    """Their states are not numbers: touched once, even times 0, they would spoil the head's gradient."""
    hidden, head, tokens, segments, cotangent = _inputs(rows=1, length=8)
    hidden = hidden.at[0, 2].set(jnp.nan)
    segments, cotangent = jnp.ones_like(segments), cotangent.at[0, 3].set(0.0)
    _, pull = jax.vjp(lambda h, w: token_loss(h, w, tokens, segments), hidden, head)
    for gradient in pull(cotangent):
        assert jnp.isfinite(gradient).all()
    total = lambda h, w: weighted_loss(h, w, tokens, cotangent.at[0, 0].set(0.0))[0]  # noqa: E731
    for gradient in jax.grad(total, argnums=(0, 1))(hidden, head):
        assert jnp.isfinite(gradient).all()


def test_what_is_left_over_is_visited_in_quarters(monkeypatch):
    """700 tokens in a chunk of 512 and two quarters of it."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", 512)
    hidden, head, tokens, segments, cotangent = _inputs(rows=3, length=234, dim=4, vocab=20)
    exact = _float64(hidden, head, tokens, segments, cotangent)
    loss, pull = jax.vjp(lambda h, w: token_loss(h, w, tokens, segments), hidden, head)
    for found, expected in zip((loss, *pull(cotangent)), exact, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, model=2)], ids=["data", "all axes"])
def test_equal_on_eight_devices_however_unequal_their_shares(config):
    """The first device has all the work, the last none; the head is split over the vocabulary."""
    hidden, head, tokens, segments, cotangent = _inputs(rows=8, vocab=64)
    segments, cotangent = jnp.ones_like(segments).at[-1].set(0), cotangent.at[1:, 2:].set(0.0)
    exact = _float64(hidden, head, tokens, segments, cotangent)
    mesh = mesh_lib.make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        hidden, tokens, segments = (
            jax.device_put(x, mesh_lib.batch_sharding(mesh)) for x in (hidden, tokens, segments)
        )
        head = jax.device_put(head, jax.NamedSharding(mesh, mesh_lib.partition_spec("head/kernel", 2)))

        @jax.jit
        def both(hidden, head):
            loss, pull = jax.vjp(lambda h, w: token_loss(h, w, tokens, segments), hidden, head)
            return loss, *pull(cotangent)

        for found, expected in zip(both(hidden, head), exact, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_columns_that_pad_the_vocabulary_take_no_probability():
    hidden, head, tokens, segments, cotangent = _inputs(vocab=64)
    tokens = tokens % 50
    loss, pull = jax.vjp(lambda h, w: token_loss(h, w, tokens, segments, vocab_size=50), hidden, head)
    exact = _float64(hidden, head, tokens, segments, cotangent, vocab=50)
    for found, expected in zip((loss, *pull(cotangent)), exact, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    unpadded = token_loss_and_entropy(hidden, head[:, :50], tokens, segments)
    padded = token_loss_and_entropy(hidden, head, tokens, segments, vocab_size=50)
    for found, expected in zip(padded, unpadded, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_array_holds_all_logits():
    """The compiled gradient of 64 chunks keeps far less than [B, L, V] floats of temporaries."""
    rows, length, dim, vocab = 8, 8192, 8, 512
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((rows, length, dim), jnp.float32), ((dim, vocab), jnp.float32))]
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def total(hidden, head, tokens, segments):
        return jnp.sum(token_loss(hidden, head, tokens, segments))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes, ids, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 / 4


def test_entropy():
    hidden, head, tokens, segments, _ = _inputs()
    loss, entropy = token_loss_and_entropy(hidden, head, tokens, segments)
    np.testing.assert_allclose(loss, token_loss(hidden, head, tokens, segments), atol=1e-6)
    logits = np.asarray(jnp.roll(hidden, 1, axis=1) @ head, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.where(predicted(segments), -(p * np.log(p)).sum(-1), 0)
    np.testing.assert_allclose(entropy, expected, atol=1e-5)


def test_entropy_of_a_uniform_distribution_is_log_v():
    hidden, _, tokens, segments, _ = _inputs()
    _, entropy = token_loss_and_entropy(hidden, jnp.zeros((16, 50)), tokens, segments)
    np.testing.assert_allclose(entropy[np.asarray(predicted(segments))], np.log(50), rtol=1e-6)


def test_certain_tokens_keep_the_digits_of_loss_and_entropy():
    """However far from 0 the logits are: a probability of 0.9999 is a loss of 0.0001, not of 0."""
    hidden, tokens, segments = jnp.ones((1, 4, 1)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32)
    logits = np.array([-100.0, -109.0, -111.0])
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    head = jnp.asarray(logits, jnp.float32)[None]
    loss, entropy = token_loss_and_entropy(hidden, head, tokens, segments)
    weighted, _ = weighted_loss(hidden, head, tokens, jnp.ones((1, 4)).at[:, 0].set(0))
    np.testing.assert_allclose(loss[0, 1:], -np.log(p[0]), rtol=2e-3)
    np.testing.assert_allclose(token_loss(hidden, head, tokens, segments)[0, 1:], -np.log(p[0]), rtol=2e-3)
    np.testing.assert_allclose(weighted, -3 * np.log(p[0]), rtol=2e-3)
    np.testing.assert_allclose(entropy[0, 1:], -(p * np.log(p)).sum(), rtol=2e-3)
