"""Entries of docstrings name what is there, so that the API reference of `make docs` builds."""

import ast
import inspect
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "slm_jax"


def entries(docstring: str, section: str) -> list[str]:
    """The name before the colon of each entry under `section:`."""
    found = re.search(rf"^{section}:\n((?: +.*\n?|\n(?= ))+)", inspect.cleandoc(docstring), re.MULTILINE)
    lines = inspect.cleandoc("\n" + found[1]).splitlines() if found else []
    return [line.split(":")[0].strip("*") for line in lines if line and not line.startswith(" ")]


def unknown_entries(source: str) -> list[str]:
    """`line: name: entry` of every entry of `Args:` that is no parameter, and of `Attributes:` that is no field."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            named = {"Args": parameters(node), "Attributes": fields(node)}
            found += [
                f"{node.lineno}: {node.name}: {entry}"
                for section, known in named.items()
                for entry in entries(docstring, section)
                if entry not in known
            ]
    return found


def parameters(node: ast.AST) -> set[str]:
    """Of a function, or of a class's `__init__`."""
    if isinstance(node, ast.ClassDef):
        return set().union(*(parameters(part) for part in node.body if getattr(part, "name", "") == "__init__"))
    arguments = node.args  # pyright: ignore[reportAttributeAccessIssue]
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in every if argument}


def fields(node: ast.AST) -> set[str]:
    """Names, attributes and methods that occur in a class."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    names |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return names | {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}


def test_docstrings_name_parameters_and_fields():
    """One entry for each: `first, second: ...` is two entries."""
    paths = sorted(PACKAGE.rglob("*.py"))
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}" for path in paths for line in unknown_entries(path.read_text())
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("head", "section", "entries", "unknown"),
    [
        ("def f(a, *b, c=1, **d):", "Args", ["a: y", "  z: z", "*b: y", "c: y", "**d: y"], []),
        ("def f(a, b):", "Args", ["a, b: y"], ["1: f: a, b"]),
        ("def f(a):", "Args", ["a: y", "gone: y"], ["1: f: gone"]),
        ("class C:", "Attributes", ["a: y", "b: y"], ["1: C: b"]),
    ],
)
def test_an_entry_that_names_nothing_is_found(head: str, section: str, entries: list[str], unknown: list[str]):
    lines = [
        head,
        '    """X.',
        "",
        f"    {section}:",
        *(f"      {entry}" for entry in entries),
        '    """',
        "    a: int = 0",
    ]
    assert unknown_entries("\n".join(lines)) == unknown
