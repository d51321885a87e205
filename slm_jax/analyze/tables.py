"""Tables: the same cells as HTML, Markdown and CSV."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = "–"  # for what was not measured


class Cell(NamedTuple):
    """text: a number or words, as shown. range: of the values that it is the mean of, and change: to the baseline, in
    the colour of kind, both in small print. value and spread: the numbers themselves, for CSV."""

    text: str
    change: str = ""
    kind: str = ""
    range: str = ""
    value: float | int | None = None
    spread: tuple[float, float] | None = None


class Table(NamedTuple):
    """headings: of the columns, beginning with that of the rows' names. rows: name and cells. file: the name under
    which it is written and can be copied; "" for a table that is only in the page. words: not numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""
    file: str = ""
    words: bool = False

    def markdown(self) -> str:
        """GitHub's tables; numbers are right-aligned."""
        lines = [self.headings, ["---", *["---" if self.words else "---:"] * (len(self.headings) - 1)]]
        for name, cells in self.rows:
            more = ["; ".join(filter(None, (cell.range, cell.change))) for cell in cells]
            lines.append([name, *(f"{c.text} ({m})" if m else c.text for c, m in zip(cells, more, strict=True))])
        escapes = str.maketrans({"\\": "\\\\", "|": "\\|", "&": "&amp;", "<": "&lt;"})
        cells_of = ([" ".join(cell.translate(escapes).split()) for cell in line] for line in lines)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in cells_of)

    def csv(self) -> str:
        """Unrounded numbers; empty where nothing was measured. A column of means is followed by the lowest and the
        highest."""
        spread = [any(cells[i].spread for _, cells in self.rows) for i in range(len(self.headings) - 1)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        line = [self.headings[0]]
        for heading, wide in zip(self.headings[1:], spread, strict=True):
            line += [heading, f"{heading}, lowest", f"{heading}, highest"] if wide else [heading]
        writer.writerow(line)
        for name, cells in self.rows:
            line = [name]
            for cell, wide in zip(cells, spread, strict=True):
                plain = cell.value if cell.value is not None else "" if cell.text == NOTHING else cell.text
                line += [plain, *(cell.spread or (plain, plain))] if wide else [plain]
            writer.writerow(line)
        return out.getvalue()


def of_values(headings: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 3) -> Table:
    """A table of rows that each begin with a name."""

    def cell(value: Any) -> Cell:
        if isinstance(value, str):
            return Cell(value)
        text = number(value, digits if isinstance(value, float) else 0)
        return Cell(text, value=None if text == NOTHING else value)

    return Table("", headings, [(str(name), [cell(value) for value in values]) for name, *values in rows])


def plain(value: Any) -> Any:
    """numpy numbers and arrays, at any depth, as JSON values; non-finite numbers become None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: Any, digits: int, signed: bool = False) -> str:
    """A number as text, with thousands separated; NOTHING for what was not measured."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NOTHING
    sign = "+" if signed else ""
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def kind_of(change: float) -> str:
    """The verdict on a change in loss."""
    return "better" if change < -0.0005 else "worse" if change > 0.0005 else "same"
