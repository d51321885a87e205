"""Numbers for people and for programs: Markdown and CSV tables, JSON without NaN."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """numpy numbers and arrays, at any depth, as JSON values; what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(value: Any, digits: int = 3) -> str:
    """One value for reading; an en dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 3) -> str:
    """A Markdown table; text of corpora and of users stays text in it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(_escaped(cell(value, digits)) for value in row) + " |\n" for row in lines)


def _escaped(text: str) -> str:
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(sign, instead)
    return text


def write_csv(path: Path, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A CSV file with full precision; empty where nothing was measured."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([["" if value is None else value for value in plain(list(row))] for row in rows])
    write_text(path, buffer.getvalue())


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)
