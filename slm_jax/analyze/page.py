"""HTML files that need nothing else: they load nothing, and no text in them can run or reorder the page around it."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
# Embeddings, overrides and isolates: one in a name would reverse the text that follows it, in a title even outside the
# page. They are shown as their code points. Left-to-right and right-to-left marks stay.
BIDI_CONTROLS = {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def render(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """A page from a template, which puts `policy` into its head and `script` into its one script element.

    scripts: templates that together make the page's script. The policy names it by its hash, so that a browser runs
    this script and no other, whatever else the page may contain.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value.translate(BIDI_CONTROLS) if isinstance(value, str) else value,
    )
    parts = ['"use strict";', *(environment.get_template(name).render().strip() for name in scripts), ""]
    script = "\n".join(parts) if scripts else ""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    allowed = {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'" if script else "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in allowed.items())
    return environment.get_template(template).render(script=Markup(script), policy=policy, **values)


def script_json(value: Any) -> Markup:
    """JSON for a `<script type="application/json">` element: no text in it can end the element or start a comment, and
    everything beyond ASCII is escaped, lone surrogates too."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def visible(text: str) -> str:
    """The text with control characters, which HTML, SVG and plain text drop or refuse, as their pictures; tabs and line
    ends stay."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\t\n" else "␡" if c == "\x7f" else c for c in text)


def one_line(text: str) -> str:
    """For names, tables and legends: also without line ends and without characters that reorder the text around it."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥").translate(BIDI_CONTROLS)
