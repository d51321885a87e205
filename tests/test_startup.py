"""What a command sets before it imports JAX."""

import os
import subprocess
import sys

import pytest

from slm_jax import startup


def test_the_cache_is_the_users_unless_one_is_named(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    startup.before_jax(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "slm_jax" / "programs" / startup.cpu())
    own = {"JAX_COMPILATION_CACHE_DIR": "mine"}
    startup.before_jax(own)
    assert own == {"JAX_COMPILATION_CACHE_DIR": "mine"}


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
def test_jax_keeps_programs_there(enabled, tmp_path):
    """In a fresh process, as the commands do it; JAX's own variable turns it off."""
    code = """
from slm_jax import startup
startup.before_jax()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * x + 1)(2.0).block_until_ready()
"""
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": str(int(enabled))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert any(path.is_file() for path in tmp_path.rglob("*")) == enabled


@pytest.mark.parametrize(
    "platforms, devices, expected",
    [("cpu", True, True), ("cuda", False, False), ("", True, False), ("", False, True)],
    ids=["told-cpu", "told-cuda", "has-a-device", "has-none"],
)
def test_whether_jax_computes_on_the_cpu(platforms, devices, expected, monkeypatch, tmp_path):
    if devices:
        (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(startup, "ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    assert startup.on_cpu({"JAX_PLATFORMS": platforms}) is expected
