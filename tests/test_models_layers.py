"""Products and lookups: their written-out gradients, in float32 where the operands are bfloat16, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import mesh as mesh_lib
from slm_jax.mesh import MeshConfig, P
from slm_jax.models import forward
from slm_jax.models.layers import lookup, product
from slm_jax.models.model_config import ModelConfig

SHAPES = {1: ((6, 5, 8), (8, 3, 4)), 2: ((6, 5, 3, 4), (3, 4, 8))}  # x and kernel by contracted axes


def _arrays(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("num_in", SHAPES)
def test_the_gradient_of_a_product_is_what_jax_makes_of_it(num_in):
    x, kernel = _arrays(*SHAPES[num_in])
    weights = jax.random.normal(jax.random.key(1), jnp.tensordot(x, kernel, num_in).shape)
    found = jax.grad(lambda x, kernel: jnp.sum(product(x, kernel, num_in) * weights), (0, 1))(x, kernel)
    expected = jax.grad(lambda x, kernel: jnp.sum(jnp.tensordot(x, kernel, num_in) * weights), (0, 1))(x, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_kernels_gradient_is_never_bfloat16():
    x, weights = _arrays((4, 64, 8), (4, 64, 16), dtype=jnp.bfloat16)
    (kernel,) = _arrays((8, 16))

    def total(kernel):
        return jnp.sum(product(x, kernel, 1) * weights.astype(jnp.float32))

    exact = np.einsum("blx,bly->xy", np.asarray(x, np.float64), np.asarray(weights, np.float64))
    np.testing.assert_allclose(jax.jit(jax.grad(total))(kernel), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axes", [None, MeshConfig(data=2, fsdp=2, model=2), MeshConfig(fsdp=8)])
def test_the_gradient_of_a_lookup_adds_up_in_float32(axes):
    """Summed in bfloat16, the token that occurs 4,000 times would get 256 of its ones, and others a few digits."""
    tokens = np.random.default_rng(0).integers(1, 64, (8, 600))
    tokens[:, :500] = 0
    d_rows = np.asarray(jax.random.normal(jax.random.key(0), (8, 600, 16)).astype(jnp.bfloat16).astype(jnp.float32))
    d_rows = np.where(tokens[..., None] == 0, np.float32(1), d_rows)
    exact = np.zeros((64, 16))
    np.add.at(exact, tokens, d_rows.astype(np.float64))

    def gradient(table, tokens):
        return jax.grad(lambda table: jnp.sum(lookup(table, tokens, "bfloat16").astype(jnp.float32) * d_rows))(table)

    table = jnp.zeros((64, 16))
    if axes is None:
        found = jax.jit(gradient)(table, tokens)
    else:
        mesh = mesh_lib.make_mesh(axes)
        split = jax.NamedSharding(mesh, P("model", "fsdp"))
        with jax.set_mesh(mesh):
            found = jax.jit(gradient)(
                jax.device_put(table, split), jax.device_put(tokens, mesh_lib.batch_sharding(mesh))
            )
        assert found.sharding.is_equivalent_to(split, 2)
    np.testing.assert_allclose(found[0], 4000)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4)


def test_rematerialisation_keeps_what_it_says():
    """full computes the products again, dots does not, none computes nothing again."""
    model = ModelConfig(vocab_size=32, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=24)
    params, tokens = forward.init_params(model, jax.random.key(0)), jnp.ones((1, 8), jnp.int32)

    def counts(remat):
        config = dataclasses.replace(model, remat=remat)
        run = jax.grad(lambda p: jnp.sum(forward.hidden_states(p, config, tokens, tokens - 1, tokens)))
        program = str(jax.make_jaxpr(run)(params))
        return program.count(" dot_general["), program.count(" exp ") + program.count(" logistic ")

    (full, full_others), (dots, dots_others), (none, none_others) = map(counts, ("full", "dots", "none"))
    assert full - dots == 6  # query, key, value, out, gate and up; nobody needs down again
    assert dots > none  # attention's own products
    assert full_others == dots_others > none_others
