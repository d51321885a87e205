"""How the code is cut: sizes of files and functions, and comments, per package and in total.

    python tools/structure.py                                                  # slm_jax/ as it is
    python tools/structure.py --commit=0116ea3                                 # as it was
    python tools/structure.py slm_jax/__main__.py slm_jax/train/loop.py ...    # files and lines of a path through it

A function is every `def`, methods and nested ones included; its lines are those from `def` to the end without the
docstring. A line of code is one that holds a token other than a comment or a docstring; a comment line is one that
holds a comment.
"""

import argparse
import ast
import io
import statistics
import subprocess
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PACKAGE = "slm_jax"
SHORT = 6  # lines of a function that is counted as short
HEADER = (
    "| package | files | lines | functions | mean / median lines | of 6 lines or fewer | per 1,000 lines "
    "| comment lines per line of code |\n|---|---|---|---|---|---|---|---|"
)


class Measured(NamedTuple):
    """What was counted in one file."""

    lines: int
    functions: tuple[int, ...]  # lines of each
    code: int
    comments: int


def measure(source: str) -> Measured:
    """Counts one file."""
    tree, code, comments = ast.parse(source), set[int](), set[int]()
    docstrings = {
        node: range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    functions = tuple(
        (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstrings.get(node.body[0], ()))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    blank = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in blank:
            code.update(range(token.start[0], token.end[0] + 1))
    return Measured(len(source.splitlines()), functions, len(code.difference(*docstrings.values())), len(comments))


def row(name: str, files: Iterable[Measured]) -> str:
    """One line of the table."""
    files = list(files)
    lines, lengths = sum(file.lines for file in files), [length for file in files for length in file.functions]
    short = sum(length <= SHORT for length in lengths) / max(1, len(lengths))
    comments = sum(file.comments for file in files) / max(1, sum(file.code for file in files))
    sizes = f"{statistics.mean(lengths):.1f} / {statistics.median(lengths):g}" if lengths else "-"
    return (
        f"| {name} | {len(files)} | {lines:,} | {len(lengths):,} | {sizes} | {short:.0%} "
        f"| {len(lengths) / max(1, lines) * 1000:.0f} | {comments:.3f} |"
    )


def read(commit: str | None) -> dict[str, str]:
    """Path -> text of the package's modules."""
    listed = _git("ls-files", PACKAGE) if commit is None else _git("ls-tree", "-r", "--name-only", commit, PACKAGE)
    paths = [path for path in listed.splitlines() if path.endswith(".py")]
    return {path: _git("show", f"{commit}:{path}") if commit else Path(path).read_text() for path in paths}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files to measure together instead of the packages")
    parser.add_argument("--commit", help="measure this commit; by default the working tree")
    arguments = parser.parse_args()
    texts = read(arguments.commit)
    print(HEADER)
    if arguments.files:
        chosen = {path: measure(texts[path]) for path in arguments.files}
        for path, measured in chosen.items():
            print(row(path, [measured]))
        print(row("together", chosen.values()))
        return
    measured = {path: measure(text) for path, text in texts.items()}
    packages: dict[str, list[Measured]] = {}
    for path, counted in measured.items():
        parts = Path(path).parts
        packages.setdefault(parts[1] if len(parts) > 2 else "(top)", []).append(counted)
    for name, counted in packages.items():
        print(row(name, counted))
    print(row("**all**", measured.values()))


if __name__ == "__main__":
    main()
