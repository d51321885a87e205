"""Pages that mkdocs builds from files outside docs/ and from docstrings: start, settings, API reference and more."""

import ast
import html
import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Files outside docs/ that are pages too.
BESIDE = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages before mkdocs resolves the navigation."""
    pages = {"settings.md": settings_page(), **reference_pages()}
    pages |= {page: as_page((ROOT / source).read_text()) for page, source in BESIDE.items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the modules below the entry `API reference`."""
    for entry in config.nav or []:
        if "API reference" in entry:
            entry["API reference"] = reference_nav()
    return config


def modules() -> list[tuple[str, ...]]:
    """Dotted parts of the package's modules, those without a line of code left out."""
    paths = sorted((ROOT / "slm_jax").rglob("*.py"))
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths if path.read_text().strip()]
    return [parts for parts in names if parts[-1] not in ("__init__", "sandbox_child")]


def reference_pages() -> dict[str, str]:
    """A page for each module, and one that lists them with the first sentence of their docstrings."""
    pages, lines, package = {}, ["# API reference", "", "Every module with one line, package by package."], None
    for parts in sorted(modules(), key=lambda parts: (len(parts) > 2, parts)):
        name, page = ".".join(parts[1:]), f"reference/{'/'.join(parts[1:])}.md"
        pages[page] = f"# {name}\n\n::: {'.'.join(parts)}\n"
        if package != (package := parts[1] if len(parts) > 2 else "slm_jax"):
            lines += ["", f"## {package}", "", "| module | what it holds |", "|---|---|"]
        docstring = ast.get_docstring(ast.parse((ROOT / "/".join(parts)).with_suffix(".py").read_text())) or ""
        lines.append(f"| [`{name}`]({page.removeprefix('reference/')}) | {cell(docstring.splitlines()[0])} |")
    return pages | {"reference/index.md": "\n".join(lines) + "\n"}


def reference_nav() -> list:
    nav: list = ["reference/index.md"]
    packages: dict[str, list] = {}
    for parts in modules():
        page = f"reference/{'/'.join(parts[1:])}.md"
        if len(parts) == 2:
            nav.append({parts[1]: page})
        else:
            packages.setdefault(parts[1], []).append({".".join(parts[2:]): page})
    return nav + [{package: pages} for package, pages in packages.items()]


def settings_page() -> str:
    """One section per configurable that gin may bind: its settings as a table."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    from slm_jax import settings
    from slm_jax.__main__ import STAGES
    from slm_jax.declarations import declarations

    stages = [stage.replace(" ", "_") for stage in STAGES]
    others = [name for name in declarations() if name not in stages]
    lines = [(ROOT / "docs" / "settings_intro.md").read_text()]
    for title, names in (("Stages", stages), ("What stages take", sorted(others, key=str.lower))):
        lines.append(f"## {title}\n")
        for name in names:
            lines += [f"### {name}\n", cell(settings.summary(name)) + "\n"]
            lines += ["| setting | type | default | what it does |", "|---|---|---|---|"]
            for setting in settings.settings_of(name):
                default = code(setting.default) if setting.default else "required"
                text = setting.sentence
                text += f" Values: {', '.join(f'`{value}`' for value in setting.values)}." if setting.values else ""
                lines.append(f"| `{setting.name}` | {code(setting.type)} | {default} | {cell(text)} |")
            reached = [f"[{other}](#{other.lower()})" for other in settings.reached_by(name)[1:]]
            lines += ["", *([f"Takes settings of {', '.join(reached)}.", ""] if reached else [])]
    return "\n".join(lines)


def code(text: str) -> str:
    """Code in a cell, in which a `|` would end it."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def cell(text: str) -> str:
    """Text for one cell of a table, in which Markdown reads no HTML."""
    outside = [part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(text.split("`"))]
    return "`".join(outside).replace("|", "\\|")


def as_page(text: str) -> str:
    """Links from a file beside docs/ as links from a page in it."""
    for page, source in BESIDE.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}", f"]({page}", text)
    return re.sub(r"\]\((?:\.\./)?docs/", "](", text)
