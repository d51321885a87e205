"""Refusals have stable codes, which survive the way from a worker process, and every one in the package is complete."""

import ast
import pickle
import re
from pathlib import Path

from slm_jax.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent / "slm_jax"


def test_a_refusal_survives_pickling():
    error = pickle.loads(pickle.dumps(UserError("corpus-not-found", "no corpus at x")))
    assert (error.code, str(error)) == ("corpus-not-found", "no corpus at x")


def test_every_refusal_names_its_code_first():
    """Codes are lower-case words joined by hyphens; where one is computed, its fixed part is."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                if isinstance(node.args[0], ast.Starred):
                    continue  # code and text from elsewhere
                assert len(node.args) == 2, where
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code.value), f"{where}: {code.value!r}"
