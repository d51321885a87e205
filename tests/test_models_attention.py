"""Attention: each backend against an oracle in float64 or the backend tested by it; packed rows, windows, refusals.

The TPU kernel runs interpreted here, on rows of three of its blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from toy import refused

from slm_jax import mesh as mesh_lib
from slm_jax.mesh import AXES, MeshConfig
from slm_jax.models import attention as attention_lib
from slm_jax.models import forward
from slm_jax.models.attention import (
    attention,
    chosen_backend,
    cudnn_attention,
    in_reach,
    per_device,
    splash_attention,
    xla_attention,
)
from slm_jax.models.model_config import ModelConfig

HEAD_DIM = 8
LONG = 384  # three of the kernel's smallest blocks
WINDOW = 150  # reaches into a second of them


def _inputs(rows: int, length: int, heads: int, kv_heads: int) -> tuple[Any, ...]:
    """Query, key, value, a cotangent of the output, and segments of uneven length with padding at the end."""
    rng = np.random.default_rng(length)
    arrays = [
        rng.normal(size=(rows, length, n, HEAD_DIM)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)
    ]
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segments[0, -length // 5 :] = 0
    return *map(jnp.asarray, arrays), jnp.asarray(segments)


def _allowed(segments, window):
    """[L, L] by the words of the contract, one pair at a time."""
    segments = np.asarray(segments).tolist()
    span = range(len(segments))
    return np.array(
        [[segments[t] == segments[s] and s <= t and (window is None or t - window < s) for s in span] for t in span]
    )


def _oracle(query, key, value, cotangent, segments, window):
    """Output and the gradients of query, key and value in float64, a head at a time."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    out, *gradients = (np.zeros_like(x) for x in (query, query, key, value))
    group, scale = query.shape[2] // key.shape[2], query.shape[3] ** -0.5
    for row, head in np.ndindex(query.shape[0], query.shape[2]):
        at, read = np.s_[row, :, head], np.s_[row, :, head // group]
        logits = np.where(_allowed(segments[row], window), query[at] @ key[read].T * scale, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[at] = weights @ value[read]
        change = cotangent[at] @ value[read].T
        change = weights * (change - (weights * change).sum(-1, keepdims=True)) * scale
        gradients[0][at] += change @ key[read]
        gradients[1][read] += change.T @ query[at]
        gradients[2][read] += weights.T @ cotangent[at]
    return out, *gradients


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(function, query, key, value, cotangent, segments):
    """As in training: rematerialised, inside a scan."""

    def layer(_, segments):
        out, pull = jax.vjp(jax.checkpoint(lambda *x: function(*x, segments)), query, key, value)
        return None, (out, *pull(cotangent))

    return jax.tree.map(lambda x: x[0], jax.lax.scan(layer, None, segments[None])[1])


@functools.cache
def _of(function, window=None, **named):
    """The function with a window: the same one for the same arguments, so that it is compiled once."""
    return functools.partial(function, window=window, **named)


def _assert_close(found, expected, atol):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "window"),
    [(130, 4, 2, None), (130, 4, 1, 40), (9, 2, 2, 1), (1, 2, 1, None)],
)
def test_xla_equals_the_oracle(length, heads, kv_heads, window):
    """130 tokens are three blocks of queries, the last of two."""
    inputs = _inputs(2, length, heads, kv_heads)
    found = _with_gradients(_of(attention, window), *inputs)
    _assert_close(found, _oracle(*inputs, window=window), 3e-6)


def test_xla_takes_its_softmax_in_float32_for_bfloat16_inputs():
    query, key, value, cotangent, segments = _inputs(1, 130, 2, 1)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value, cotangent)]
    found = _with_gradients(attention, *low, segments)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    # One rounding to 8 bits of weights, of what is read and of the result; sums in bfloat16 would err by tenths.
    _assert_close(found, _oracle(*low, segments=segments, window=None), 0.04)


def test_xla_derivatives_agree_forward_and_backward():
    query, key, value, cotangent, segments = _inputs(1, 9, 2, 1)
    read = lambda query, key: attention(query, key, value, segments)  # noqa: E731
    tangents = (key.repeat(2, axis=2), query[:, :, :1])
    out = jax.jit(lambda *at: jax.jvp(read, at, tangents)[1])(query, key)
    gradients = jax.jit(lambda *at: jax.vjp(read, *at)[1](cotangent))(query, key)
    backward = sum(jnp.vdot(*pair) for pair in zip(gradients, tangents, strict=True))
    np.testing.assert_allclose(jnp.vdot(out, cotangent), backward, rtol=1e-5)


def test_the_window_is_that_of_hugging_face():
    """transformers.masking_utils: a key is read where kv_idx > q_idx - sliding_window and kv_idx <= q_idx."""
    q_idx, kv_idx, sliding_window = np.arange(9)[:, None], np.arange(9), 4
    theirs = (kv_idx > q_idx - sliding_window) & (kv_idx <= q_idx)
    ours = in_reach(jnp.arange(9), jnp.arange(9), sliding_window)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.sum(axis=1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 2, None), (2, 1, WINDOW)])
def test_splash_equals_xla(heads, kv_heads, window):
    inputs = _inputs(1, LONG, heads, kv_heads)
    found = _with_gradients(_of(splash_attention, window), *inputs)
    _assert_close(found, _with_gradients(_of(xla_attention, window), *inputs), 1e-5)


@pytest.mark.parametrize("function", [xla_attention, splash_attention])
def test_no_gradient_leaves_a_segment_or_its_past(function):
    """A loss at one query: keys and values have a gradient where it may read, and zeros to the bit elsewhere."""
    query, key, value, cotangent, segments = _inputs(1, LONG, 2, 1)
    at = int(np.flatnonzero(segments[0] == 2)[-3])
    only = jnp.zeros_like(cotangent).at[:, at].set(cotangent[:, at])
    _, dquery, dkey, dvalue = _with_gradients(_of(function, WINDOW), query, key, value, only, segments)
    allowed = _allowed(segments[0], WINDOW)[at]
    for gradient in (dkey, dvalue):
        np.testing.assert_array_equal(jnp.abs(gradient[0]).max(axis=(1, 2)) > 0, allowed)
    assert np.flatnonzero(jnp.abs(dquery[0]).max(axis=(1, 2))).tolist() == [at]


@pytest.mark.parametrize("function", [xla_attention, splash_attention])
def test_padding_is_finite_and_takes_no_gradient(function):
    query, key, value, cotangent, segments = _inputs(1, LONG, 2, 1)
    segments = segments.at[0, 40:].set(0)
    cotangent = jnp.where((segments > 0)[..., None, None], cotangent, 0)
    out, *gradients = _with_gradients(_of(function, WINDOW), query, key, value, cotangent, segments)
    assert np.isfinite(out).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not np.any(gradient[:, 40:])


def test_kernels_split_rows_and_heads_over_the_mesh():
    inputs = _inputs(4, 128, 4, 2)
    whole = _with_gradients(_of(xla_attention), *inputs)
    kernel = functools.partial(per_device, _of(splash_attention))
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, model=2), jax.devices())
    with jax.set_mesh(mesh):
        split = _with_gradients(kernel, *inputs)
    assert split[0].sharding.shard_shape(split[0].shape) == (1, 128, 2, HEAD_DIM)
    _assert_close(split, whole, 1e-5)


def test_cudnn_is_told_of_segments_and_window(monkeypatch):
    """JAX's own XLA attention, given what cuDNN is given. On a GPU the next test compares the kernel itself."""
    theirs, asked = jax.nn.dot_product_attention, []

    def instead(*arrays, implementation, **named):
        asked.append(implementation)
        return theirs(*arrays, **named, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    query, key, value, _, segments = _inputs(2, 20, 4, 2)
    found = jax.jit(_of(cudnn_attention, 6))(query, key, value, segments)
    assert asked == ["cudnn"]
    np.testing.assert_allclose(found, jax.jit(_of(xla_attention, 6))(query, key, value, segments), atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")
@pytest.mark.parametrize("window", [None, 50])
def test_cudnn_equals_xla(window):
    *arrays, segments = _inputs(2, 256, 4, 2)
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    found = _with_gradients(functools.partial(attention, window=window, backend="cudnn"), *inputs, segments)
    expected = _with_gradients(functools.partial(attention, window=window, backend="xla"), *inputs, segments)
    _assert_close(found, expected, 0.1)


def _devices_of(platform):
    """While this lasts, the program is one for devices of that platform."""
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    mesh = AbstractMesh((1, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_a_program_for_tpu_holds_the_kernel_wherever_it_is_compiled():
    """The devices compiled for decide, not those of this machine: three kernels, forward and two backward."""
    shape = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def kernels(backend):
        loss = lambda q, k, v, s: jnp.sum(attention(q, k, v, s, window=100, backend=backend))  # noqa: E731
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(shape, shape, shape, segments)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    with _devices_of("tpu"):
        assert kernels("auto") == kernels("splash") == 3
        assert kernels("xla") == 0


@pytest.mark.parametrize(
    ("platform", "capability", "length", "head_dim", "dtype", "chosen", "line"),
    [
        ("cpu", 0.0, 100, 64, "float32", "xla", ""),
        ("tpu", 0.0, 256, 64, "float32", "splash", ""),
        ("tpu", 0.0, 200, 64, "float32", "xla", "'splash' takes rows of a multiple of 128 tokens, not 200"),
        ("gpu", 8.0, 256, 64, "bfloat16", "cudnn", ""),
        ("gpu", 8.0, 256, 64, "float32", "xla", "takes bfloat16, not float32: set model.compute_dtype = 'bfloat16'"),
        ("gpu", 7.5, 256, 64, "bfloat16", "xla", "'cudnn' needs an NVIDIA GPU of compute capability 8.0 or later"),
        ("gpu", 8.0, 256, 256, "bfloat16", "xla", "takes a head_dim that is a multiple of 8 up to 128, not 256"),
        ("gpu", 9.0, 256, 256, "bfloat16", "cudnn", ""),
        ("gpu", 9.0, 255, 64, "bfloat16", "xla", "takes rows of an even length, not 255"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_and_else_says_why_once(
    platform, capability, length, head_dim, dtype, chosen, line, monkeypatch, capsys
):
    monkeypatch.setattr(attention_lib, "gpu_capability", lambda: capability)
    attention_lib._print_once.cache_clear()
    with _devices_of(platform):
        assert [chosen_backend("auto", length, head_dim, dtype) for _ in range(2)] == [chosen] * 2
        assert chosen_backend("xla", length, head_dim, dtype) == "xla"
        said = capsys.readouterr().out.splitlines()
        assert len(said) == (1 if line else 0) and all(line in words for words in said)
        if line:
            kernel = attention_lib.KERNELS[platform]
            assert line in refused("attention-unsupported", chosen_backend, kernel, length, head_dim, dtype)


def test_a_kernel_of_another_platform_is_refused():
    query = jnp.zeros((1, 128, 1, 8))
    call = jax.jit(functools.partial(attention, backend="splash"))
    line = refused("attention-unsupported", call, query, query, query, jnp.ones((1, 128), jnp.int32))
    assert "'splash'" in line and "platform cpu" in line and "model.attention" in line
    with _devices_of("tpu"):
        assert "'cudnn'" in refused("attention-unsupported", chosen_backend, "cudnn", 128, 64, "bfloat16")


def test_the_model_reads_no_further_than_its_window():
    config = ModelConfig(61, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, sliding_window=3)
    normal = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: jnp.asarray(normal(size=x.shape), x.dtype), forward.param_shapes(config))
    x, segments = jnp.asarray(normal(size=(1, 8, 16)), jnp.float32), jnp.ones((1, 8), jnp.int32)
    last = lambda x: jnp.sum(forward.layers(params, config, x, jnp.arange(8)[None], segments)[0, -1])  # noqa: E731
    influence = jnp.abs(jax.jit(jax.grad(last))(x)[0]).max(axis=1)
    assert (influence > 0).tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("window", [None, 3, 8, 20])
def test_flops_count_the_keys_that_are_read(window):
    """The formula takes an integral for the sum over tokens: half a key less where nothing cuts the segment off."""
    config = ModelConfig(61, sliding_window=window)
    whole = ModelConfig(61, num_heads=2 * config.num_heads, num_kv_heads=2, sliding_window=window)
    keys = np.mean([min(t + 1, window or 8) for t in range(8)]) - min(window or 8, 8) / 16
    matrices = whole.parameter_count() - config.parameter_count()
    products = 2 * config.num_layers * config.num_heads * config.head_dim * keys
    assert whole.flops_per_token(8) - config.flops_per_token(8) == pytest.approx(6 * (matrices + products))
