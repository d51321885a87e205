"""One HTML file that stands alone: nothing comes from elsewhere, and no text in it can run."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """A page from a template, which puts `policy` into its head and `script` into its one script element.

    scripts: templates whose texts together are the page's script. The policy names it by its hash, so that a browser
    runs it and no other, whatever else the page might come to hold.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    parts = ['"use strict";', *(environment.get_template(name).render().strip() for name in scripts), ""]
    script = "\n".join(parts) if scripts else ""
    return environment.get_template(template).render(script=Markup(script), policy=_policy(script), **values)


def _policy(script: str) -> str:
    """Content-Security-Policy: this script, styles and images that stand in the page, and nothing from a network."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    allowed = {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'" if script else "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def script_json(value: Any) -> Markup:
    """JSON for a `<script type="application/json">` element: no text in it can end the element or begin a comment, and
    everything beyond ASCII is escaped, lone surrogates too."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def visible(text: str) -> str:
    """For reading: control characters, which HTML, SVG and plain text drop or refuse, as their pictures; tabs and line
    ends stay."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\t\n" else "␡" if c == "\x7f" else c for c in text)
