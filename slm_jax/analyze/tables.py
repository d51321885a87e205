"""Tables to read and to take along: the same cells as HTML, Markdown and CSV."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = "–"  # for what was not measured


class Cell(NamedTuple):
    """What a reader sees: a number or words; below, smaller, the `range` of what it is the mean of, and its `change` in
    the colour of `kind`. The number itself, and the lowest and highest, are for CSV."""

    text: str
    change: str = ""
    kind: str = ""
    range: str = ""
    value: float | int | None = None
    spread: tuple[float, float] | None = None


class Table(NamedTuple):
    """headings: of the columns, that of the rows' names first. rows: name and cells. file: the name under which it is
    written and can be copied; "" for a table that only stands in the page. words: it holds words, not numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""
    file: str = ""
    words: bool = False

    def markdown(self) -> str:
        """As GitHub reads tables; numbers to the right."""
        lines = [self.headings, ["---", *["---" if self.words else "---:"] * (len(self.headings) - 1)]]
        lines += [[name, *(_text(cell) for cell in cells)] for name, cells in self.rows]
        return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)

    def csv(self) -> str:
        """The numbers unrounded; nothing where nothing was measured. A column of means is followed by the lowest and
        the highest."""
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
    return Table("", headings, [(str(name), [_cell(value, digits) for value in values]) for name, *values in rows])


def _cell(value: Any, digits: int) -> Cell:
    if isinstance(value, str):
        return Cell(value)
    text = number(value, digits if isinstance(value, float) else 0)
    return Cell(text, value=None if text == NOTHING else value)


def plain(value: Any) -> Any:
    """numpy numbers and arrays, at any depth, as JSON values; what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(cell: Cell) -> str:
    more = "; ".join(filter(None, (cell.range, cell.change)))
    return f"{cell.text} ({more})" if more else cell.text


def _escaped(text: str) -> str:
    for sign, instead in (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;")):
        text = text.replace(sign, instead)
    return " ".join(text.split())


def number(value: Any, digits: int, signed: bool = False) -> str:
    """A number for reading, with thousands separated; NOTHING for what was not measured."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NOTHING
    sign = "+" if signed else ""
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def kind_of(change: float) -> str:
    """Of a change in loss."""
    return "better" if change < -0.0005 else "worse" if change > 0.0005 else "same"
