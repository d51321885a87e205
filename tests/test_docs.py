"""README's first screen, and what docs/architecture.md says of the code."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_readme_is_short_and_names_files_that_exist():
    assert len(README.splitlines()) <= 150
    named = re.findall(r"`((?:slm_jax|tools|docs|configs)/[\w/.]+\.\w+)`", README)
    named += re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"--gin_file=(\S+)", README.replace("=FILE", ""))
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists(), path


def defined(path: Path) -> set[str]:
    """Functions, classes, and methods as CLASS.METHOD, of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {
                f"{node.name}.{part.name}" for part in getattr(node, "body", ()) if isinstance(part, ast.FunctionDef)
            }
    return names


def test_the_paths_through_the_code_name_functions_that_exist():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", ARCHITECTURE, re.MULTILINE)
    assert len(rows) > 20
    for file, name in rows:
        assert name in defined(ROOT / "slm_jax" / file), f"{file} has no {name}"


def test_the_tree_and_the_places_exist():
    tree = ARCHITECTURE.split("## The tree")[1].split("## The path")[0]
    for path in re.findall(r"`((?:slm_jax|configs|benchmarks|notebooks|tests|tools)/[\w/]*)`", tree):
        assert (ROOT / path).is_dir(), path
    for path in re.findall(r"`((?:data|models|score|train)/\w+\.py|checkpoint\.py)`", tree):
        assert (ROOT / "slm_jax" / path).is_file(), path
