"""Optimizers by name: what they keep, what they update, and that the mesh does not change a step."""

import dataclasses

import jax
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.mesh import MeshConfig
from slm_jax.models.forward import init_params
from slm_jax.models.model_config import model_config
from slm_jax.score.selection import Selection
from slm_jax.train.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from slm_jax.train.schedules import constant_schedule, cosine_schedule, over
from slm_jax.train.state import init_state, state_shapes
from slm_jax.train.step import compile_step, make_step

DEMO = dataclasses.replace(model_config("demo"), vocab_size=256)


def sizes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_lower_the_loss_alike_on_one_and_on_eight_devices(name):
    optimizer = make_optimizer(OptimizerConfig(name=name))
    tokens = np.random.default_rng(0).integers(3, 40, (8, 24))
    batch = make_batch(tokens, np.ones_like(tokens), np.ones_like(tokens, bool))
    rate = over(cosine_schedule(peak=1e-2, warmup=1.0), 3)
    found = []
    for config, devices in ((MeshConfig(), jax.devices()[:1]), (MeshConfig(data=2, fsdp=2, model=2), jax.devices())):
        mesh = mesh_lib.make_mesh(config, devices)
        with jax.set_mesh(mesh):
            state = init_state(toy.MODEL, optimizer, mesh, seed=0)
            step = make_step(toy.MODEL, Selection(score="loss", ratio=0.9), optimizer, rate, seed=0)
            step, losses = compile_step(step, mesh, state_shapes(toy.MODEL, optimizer, mesh)), []
            for _ in range(3):
                state, sums = step(state, batch)
                losses.append(float(sums["loss_sum"] / sums["valid_tokens"]))
        found.append(losses)
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4)
    assert found[0][2] < found[0][1] < found[0][0]


def test_muon_orthogonalizes_the_kernels_of_each_layer_and_adam_updates_the_rest():
    params = init_params(DEMO, jax.random.key(0))
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)

    def first_update(name: str):
        optimizer = make_optimizer(OptimizerConfig(name=name, clip_norm=None, weight_decay=0.0))
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    updates, adam = first_update("muon"), first_update("adamw")
    layers = updates["layers"]
    query, out = layers["attention"]["query"]["kernel"], layers["attention"]["out"]["kernel"]
    layer, embed, heads, head_dim = query.shape
    for matrices in (
        query.reshape(layer, embed, heads * head_dim),
        out.reshape(layer, heads * head_dim, embed),
        layers["mlp"]["down"]["kernel"],
    ):
        values = np.linalg.svd(np.asarray(matrices), compute_uv=False)  # [layer, min(rows, columns)]
        low, high = np.quantile(values, [0.1, 0.9], axis=1)  # five iterations do not reach the very smallest
        assert (high < 2 * low).all()  # of a square matrix of normal numbers: about 11 times
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(matrices), (1, 2))), 0.2, rtol=0.2)
    assert float(np.vdot(query, gradient["layers"]["attention"]["query"]["kernel"])) > 0  # the caller negates
    np.testing.assert_allclose(updates["embed"]["embedding"], adam["embed"]["embedding"], rtol=1e-5)
    np.testing.assert_allclose(layers["mlp_norm"]["scale"], adam["layers"]["mlp_norm"]["scale"], rtol=1e-5)


@pytest.mark.parametrize(
    "config, bytes_per_parameter",
    [
        (OptimizerConfig(), 8),
        (OptimizerConfig(moment_dtype="bfloat16"), 6),
        (OptimizerConfig(name="lion"), 4),
        (OptimizerConfig(name="lion", moment_dtype="bfloat16"), 2),
        (OptimizerConfig(name="adafactor"), 0),
    ],
    ids=lambda value: f"{value.name}-{value.moment_dtype}" if isinstance(value, OptimizerConfig) else str(value),
)
def test_bytes_of_moments(config, bytes_per_parameter):
    model = dataclasses.replace(model_config("small"), vocab_size=8192)
    state = state_shapes(model, make_optimizer(config), mesh_lib.make_mesh(devices=jax.devices()[:1]))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sizes(state.opt_state) / parameters == pytest.approx(bytes_per_parameter, abs=0.05)


def test_a_run_keeps_its_optimizer_and_resumes_to_the_bit(tmp_path, corpus):
    def run(name: str, steps: int, optimizer: OptimizerConfig) -> None:
        toy.train_here(
            tmp_path / name,
            [toy.phase(corpus, steps=steps)],
            optimizer=optimizer,
            schedule=constant_schedule(peak=1e-3, warmup=1),
            log_every=1,
        )

    muon = OptimizerConfig(name="muon")
    run("whole", 4, muon)
    run("parts", 2, muon)
    error = toy.refused("resume-other-optimizer", run, "parts", 4, OptimizerConfig())
    assert "muon" in error and "adamw" in error
    run("parts", 4, muon)
    assert toy.losses(tmp_path / "whole") == toy.losses(tmp_path / "parts")
