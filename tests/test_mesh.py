"""The sharding table and what does not fit it."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.mesh import MeshConfig
from slm_jax.models import forward
from slm_jax.models.model_config import SIZES


def test_every_parameter_has_a_rule_and_big_ones_are_split():
    shapes = forward.param_shapes(SIZES["tinyllama_1_1b"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        spec = mesh_lib.partition_spec(mesh_lib.path_name(path), len(leaf.shape))
        if leaf.size > 1_000_000:
            assert {"fsdp", "model"} <= set(spec), f"{mesh_lib.path_name(path)} is replicated"


def test_a_parameter_without_a_rule_raises():
    with pytest.raises(KeyError, match=r"add a line to slm_jax\.mesh\.RULES"):
        mesh_lib.partition_spec("layers/mixer/kernel", 3)


def test_mesh_that_does_not_fit_the_devices():
    line = toy.refused("mesh-shape", mesh_lib.make_mesh, MeshConfig(data=3), jax.devices())
    assert "data 3 x fsdp 1 x model 1" in line and "8 are here" in line
    assert "-1" in toy.refused("mesh-shape", mesh_lib.make_mesh, MeshConfig(data=-1, fsdp=-1), jax.devices())


def test_mesh_that_does_not_fit_the_model():
    mesh = mesh_lib.make_mesh(MeshConfig(data=1, model=8), jax.devices())
    shapes = forward.param_shapes(SIZES["tinyllama_1_1b"])
    line = toy.refused("mesh-shape", mesh_lib.tree_shardings, shapes, mesh)
    assert "axis model of 8" in line and "layers/attention/key/kernel" in line


def test_batch_that_does_not_fit_the_mesh():
    mesh = mesh_lib.make_mesh(MeshConfig(data=4, fsdp=2), jax.devices())
    mesh_lib.check_batch(mesh, 16, "phase 0", 2)
    line = toy.refused("batch-size", mesh_lib.check_batch, mesh, 24, "phase 0", 2)
    assert line.startswith("phase 0: ") and "24 rows" in line and "multiple of 16" in line


def test_minus_one_takes_what_is_left():
    assert dict(mesh_lib.make_mesh(MeshConfig(fsdp=2), jax.devices()).shape) == {"data": 4, "fsdp": 2, "model": 1}


def test_batches_reach_the_devices_whole():
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, model=2), jax.devices())
    rows = mesh_lib.local_rows(mesh, 8)
    assert rows.tolist() == list(range(8))
    batch = {"x": np.arange(16).reshape(8, 2)}
    placed = mesh_lib.to_devices(mesh, 8, lambda rows: {"x": batch["x"][rows]})
    np.testing.assert_array_equal(mesh_lib.to_host(placed)["x"], batch["x"])
    assert placed["x"].sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 2)


def test_a_function_is_mapped_over_rows_in_full_batches():
    mesh, sizes, counted = mesh_lib.make_mesh(MeshConfig(data=4, fsdp=2), jax.devices()), [], []
    x = np.arange(42).reshape(21, 2)

    def compute(batch: dict) -> dict:
        sizes.append(batch["x"].shape)
        assert batch["x"].sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 2)
        return {"double": 2 * batch["x"], "sum": batch["x"].sum(axis=1)}

    found = mesh_lib.map_rows(compute, lambda rows: {"x": x[rows]}, 21, 8, mesh, counted.append)
    np.testing.assert_array_equal(found["double"], 2 * x)
    np.testing.assert_array_equal(found["sum"], x.sum(axis=1))
    assert sizes == [(8, 2)] * 3 and counted == [8, 8, 5]


def test_several_slices_lie_along_the_first_axis_they_split():
    devices = [
        SimpleNamespace(id=i, slice_index=i // 4, process_index=i // 4, platform="gpu", device_kind="H100")
        for i in range(8)
    ]
    for sizes, axis in (((2, 4, 1), 0), ((1, 8, 1), 1)):
        slices = np.vectorize(lambda device: device.slice_index)(mesh_lib.over_slices(sizes, devices))
        assert slices.shape == sizes
        first, second = np.split(slices, 2, axis=axis)
        assert (first == first.flat[0]).all() and (second == second.flat[0]).all()
    assert "MeshConfig.data" in toy.refused("mesh-shape", mesh_lib.over_slices, (1, 1, 1), devices)
