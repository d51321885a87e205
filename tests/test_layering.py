"""Imports point one way, and a few habits stay out of the package (see the diagram in docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "slm_jax"
MAX_LINES = 500

BOTTOM = {
    "errors",
    "messages",
    "files",
    "jsonl",
    "renamed",
    "run_directory",
    "config",
    "configurable",
    "declarations",
    "settings",
    "startup",
    "chips",
    "mesh",
    "processes",
    "metrics",
    "checkpoint",
}
# What each module directly under the package, or each subpackage, may import besides itself.
MAY_IMPORT = {
    **{module: BOTTOM for module in BOTTOM},
    "data": {"errors", "messages", "files", "renamed", "config", "configurable"},
    "models": BOTTOM | {"data"},
    "score": BOTTOM | {"models", "data"},
    "train": BOTTOM | {"models", "data", "score"},
    "evaluate": BOTTOM | {"models", "data", "score"},
    "analyze": BOTTOM | {"models", "data", "score", "evaluate"},
    "convert": BOTTOM | {"models", "data", "score"},
    "experiment": BOTTOM | {"models", "data", "score", "train", "evaluate", "analyze"},
    "compile": BOTTOM | {"models", "data", "score", "train"},
    "__main__": BOTTOM
    | {"models", "data", "score", "train", "evaluate", "analyze", "convert", "experiment", "compile"},
    # Names only, for type checkers; it imports nothing at import.
    "__init__": BOTTOM | {"models", "data", "score", "train", "evaluate", "analyze", "convert", "experiment"},
}
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}
TENSORFLOW = {"seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text"}
TENSORFLOW_FILES = {"data/seqio_tasks.py", "data/seqio_records.py"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}


def imports(tree: ast.Module, path: str) -> Iterator[tuple[int, str, bool]]:
    """Yields (line, absolute dotted name, whether it runs when the module is imported) of every import."""
    package = ["slm_jax", *path.split("/")[:-1]]

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name]), at_import) for alias in node.names)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not is_function and not is_for_types)

    return visit(tree, True)


def import_violations(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    unit = path.split("/")[0].removesuffix(".py")
    for line, name, at_import in imports(tree, path):
        root, *rest = name.split(".")
        if root == "slm_jax":
            target = rest[0] if rest else "__init__"
            if target in MAY_IMPORT and target not in MAY_IMPORT.get(unit, set()) | {unit, "__init__"}:
                yield line, f"{unit} may not import {target}"
        elif root == "flax" and unit != "models":
            yield line, "only models/ imports flax"
        elif root in ACCELERATED and unit == "data":
            yield line, f"data/ imports no {root}"
        elif root in TENSORFLOW and path not in TENSORFLOW_FILES:
            yield line, f"only {', '.join(sorted(TENSORFLOW_FILES))} may import {root}"
        elif root in TENSORFLOW and at_import:
            yield line, f"{root} is imported inside the function that needs it, so that training starts without it"
        elif root in PICKLES:
            yield line, f"no {root}: loading such a file runs code"


def call_violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                yield node.lineno, f"no {node.func.id}()"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in {"shell", "allow_pickle"} and not is_false:
                    yield node.lineno, f"no {keyword.arg}=True"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.system", "os.popen"}:
            yield node.lineno, f"no {ast.unparse(node)}"


def violations(path: str, source: str) -> list[str]:
    """Every broken rule of one file as `file:line: rule`; `path` is relative to the package."""
    tree = ast.parse(source)
    found = [*import_violations(tree, path), *call_violations(tree)]
    unit = path.split("/")[0].removesuffix(".py")
    if unit not in MAY_IMPORT:
        found.append((1, f"{unit} has no place in the layers: add it to MAY_IMPORT and to docs/architecture.md"))
    if path.endswith("utils.py"):
        found.append((1, "no utils.py: name the file for what it holds"))
    if (count := len(source.splitlines())) > MAX_LINES:
        found.append((count, f"{count} lines are more than {MAX_LINES}: look for the seam"))
    return [f"slm_jax/{path}:{line}: {rule}" for line, rule in sorted(found)]


def test_package_keeps_the_rules():
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    found = [v for f in files for v in violations(f.relative_to(PACKAGE).as_posix(), f.read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("models/layers.py", "import slm_jax.score.selection", "models may not import score"),
        ("models/layers.py", "from slm_jax import train", "models may not import train"),
        ("score/selection.py", "def f():\n    from slm_jax.train.step import step", "score may not import train"),
        ("score/selection.py", "from ..train import step", "score may not import train"),
        ("config.py", "from .models import layers", "config may not import models"),
        ("evaluate/perplexity.py", "import slm_jax.train", "evaluate may not import train"),
        ("analyze/report.py", "from slm_jax.train.loop import train", "analyze may not import train"),
        ("train/loop.py", "from slm_jax.experiment import worlds", "train may not import experiment"),
        ("experiment/jobs.py", "from slm_jax.__main__ import main", "experiment may not import __main__"),
        ("train/step.py", "from flax import nnx", "only models/ imports flax"),
        ("data/packing.py", "import jax.numpy as jnp", "data/ imports no jax"),
        ("data/corpus.py", "def f():\n    import seqio", "only data/seqio_records.py"),
        ("data/seqio_tasks.py", "try:\n    import seqio\nexcept ImportError:\n    pass", "inside the function"),
        ("checkpoint.py", "import pickle", "no pickle"),
        ("config.py", "eval('1')", "no eval()"),
        ("config.py", "exec('1')", "no exec()"),
        ("config.py", "import subprocess\nsubprocess.run('ls', shell=True)", "no shell=True"),
        ("data/corpus.py", "import numpy as np\nnp.load('x.npy', allow_pickle=True)", "no allow_pickle=True"),
        ("config.py", "import os\nos.system('ls')", "no os.system"),
        ("data/utils.py", "", "no utils.py"),
        ("config.py", "\n" * 501, "501 lines"),
        ("extras/tools.py", "", "has no place in the layers"),
    ],
)
def test_a_broken_rule_is_named_with_file_and_line(path: str, source: str, rule: str):
    found = violations(path, source)
    assert len(found) == 1
    assert found[0].startswith(f"slm_jax/{path}:")
    assert rule in found[0]


def test_what_is_allowed_passes():
    assert not violations("data/seqio_tasks.py", "from slm_jax.errors import UserError\ndef f():\n    import seqio")
    assert not violations(
        "data/seqio_tasks.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import seqio"
    )
    assert not violations("models/layers.py", "from flax import nnx\nfrom . import config\nmodel = nnx\nmodel.eval()")
    assert not violations("train/step.py", "import jax\nfrom slm_jax import __version__\nfrom ..score import selection")
