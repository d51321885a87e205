"""`import slm_jax as slm`: the public names, imported when they are used."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import slm_jax as slm


def test_the_table_is_what_type_checkers_read():
    tree = ast.parse(inspect.getsource(slm))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imports = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imports == slm._HOME


@pytest.mark.parametrize("name", slm.__all__)
def test_each_name_is_what_its_module_holds(name):
    found, real = getattr(slm, name), getattr(importlib.import_module(slm._HOME[name]), name)
    if name in ("train", "score", "evaluate"):
        assert inspect.signature(found) == inspect.signature(real) and inspect.ismodule(found)
    else:
        assert found is real
    assert name in dir(slm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'slm_jax' has no attribute 'trian'"):
        slm.trian  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_no_jax():
    """Nor NumPy, nor a stage; whichever way its modules are imported first, the names stay what they are."""
    code = """
import sys
import slm_jax as slm
assert not {"jax", "numpy", "gin", "slm_jax.train"} & set(sys.modules)
import slm_jax.train.phases
import slm_jax.train.loop as loop
assert slm.train.loop is loop and callable(slm.train) and slm.Phase is slm_jax.train.phases.Phase
try:
    slm.train(run_dir="")
except slm.UserError as error:
    print(error.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "setting-empty\n", done.stderr
