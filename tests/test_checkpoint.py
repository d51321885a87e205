"""Checkpoints: arrays that changed on disk are refused, or the checkpoint before is used; old ones are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax import checkpoint
from slm_jax.checkpoint import Checkpoints, params_fingerprint, restore_items, restore_params
from slm_jax.mesh import MeshConfig, make_mesh


def items(value: float) -> dict:
    return {
        "params": {"kernel": jnp.full((4, 3), value), "bias": jnp.arange(3.0)},
        "rest": {"moment": jnp.full((4,), value), "step": jnp.int32(7)},
    }


def save(folder, step: int, said: dict) -> None:
    """A checkpoint whose fingerprints are those of `said`, as if its arrays had changed afterwards."""
    with pytest.MonkeyPatch.context() as patch, Checkpoints(folder) as checkpoints:
        found = checkpoint._fingerprints(said)
        patch.setattr(checkpoint, "_fingerprints", lambda _: found)
        checkpoints.save(step, items(step), {"counters": {}})


@pytest.mark.parametrize("name", ["params", "rest"])
def test_arrays_that_changed_are_refused(name, tmp_path, capsys):
    save(tmp_path, 1, items(1.0))
    save(tmp_path, 2, items(2.0) | {name: items(3.0)[name]})
    line = toy.refused("checkpoint-damaged", restore_items, tmp_path, items(0.0))
    assert "checkpoint 2" in line and str(tmp_path) in line and f"its {name} " in line and "before, 1" in line
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(items(0.0))
        assert restored and restored[0]["params"]["kernel"][0, 0] == 1.0
        assert checkpoints.steps() == [1]
    assert (tmp_path / "checkpoints/damaged-2").is_dir() and f"its {name} " in capsys.readouterr().out


def test_one_bit_of_any_number_changes_the_fingerprint():
    for value in (jnp.float32(1.5), jnp.bfloat16(1.5), jnp.int32(2**24)):
        other = jnp.nextafter(value, value + 1) if value.dtype != jnp.int32 else value + 1
        assert params_fingerprint({"a": value[None]}) != params_fingerprint({"a": other[None]})


def test_a_fingerprint_is_that_of_earlier_versions_on_any_mesh():
    """Score columns and checkpoints keep it."""
    kernel = (np.arange(192, dtype=np.float32) / np.float32(7)).reshape(8, 6, 4)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    for spec in (
        PartitionSpec(),
        PartitionSpec("data", "fsdp", "model"),
        PartitionSpec(("data", "model"), None, "fsdp"),
    ):
        placed = jax.device_put(kernel, NamedSharding(mesh, spec))
        assert params_fingerprint({"a": placed, "b": jnp.int32(7)}) == "6f146922b75223bb"


def test_checkpoints_without_fingerprints_are_read_with_one_line(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr(checkpoint, "_fingerprints", lambda _: {})
        checkpoints.save(1, items(1.0), {"counters": {}})
    restore_params(tmp_path, items(0.0)["params"])
    restore_items(tmp_path, items(0.0))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(items(0.0))
    out = capsys.readouterr().out
    assert out.count("earlier version") == 1 and "checkpoint 1" in out
