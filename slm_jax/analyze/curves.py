"""Curves over steps: as SVG inside a page, where text stays text and colours are the page's, and as files."""

import html
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's first colours, then darker ones: apart for colour-blind readers, legible on white and on dark grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#777777")
DASHES = ("-", "--", ":")  # the next one when the colours begin again
INK = "#123456"  # stands for the page's text colour until the SVG is written
FILE_INK = "#1c1e21"  # the text colour of files
MOST_LABELS = 9  # lines that are named at their ends; more have a legend below
LABEL_POINTS = 12.0  # least distance of two labels at the ends of lines


class Line(NamedTuple):
    """One curve; values that are None or not finite are left out. `colour` counts through COLOURS.

    low, high: the edges of a band around it, such as the range over seeds.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        steps, values = np.asarray(self.steps, float), np.asarray(self.values, float)
        shown = np.isfinite(values)
        return steps[shown], values[shown]


class Drawing(NamedTuple):
    """A figure for a page, and the same as files on white ground."""

    inline: str
    svg: str
    png: bytes


def curve_svg(description: str, lines: Sequence[Line], reached: float | None = None, smooth: bool = False) -> str:
    """An inline `<svg>` of losses over steps, or "" when there is nothing to draw.

    reached: a loss to mark with a thin line across. smooth: draw the running mean over the measured values.
    """
    lines = _drawn(lines)
    if not lines:
        return ""
    with _style(description):
        figure = _figure(lines, ("step", "nats per token"), reached, smooth, INK)
        return _inline(_svg(figure, transparent=True), description)


def drawing(
    description: str, lines: Sequence[Line], axes: tuple[str, str] = ("step", "nats per token"), smooth: bool = False
) -> Drawing | None:
    """`curve_svg` and its files, its axes named; None when there is nothing to draw."""
    lines = _drawn(lines)
    if not lines:
        return None
    with _style(description):
        inline = _inline(_svg(_figure(lines, axes, None, smooth, INK), transparent=True), description)
        plain, png = _figure(lines, axes, None, smooth, FILE_INK), io.BytesIO()
        plain.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return Drawing(inline, _svg(plain, facecolor="white"), png.getvalue())


def _style(description: str) -> Any:
    """Text stays text, and the same figure gives the same file."""
    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "font.size": 10.5})


def _drawn(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if len(line.points()[0]) > 1]


def _svg(figure: Figure, **settings: Any) -> str:
    buffer = io.StringIO()
    # None for each field leaves out the metadata block, whose names are URLs.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata, **settings)
    return buffer.getvalue()


def _figure(lines: Sequence[Line], named: tuple[str, str], reached: float | None, smooth: bool, ink: str) -> Figure:
    columns = max(1, min(3, 70 // (8 + max(len(line.label) for line in lines))))  # so that names find room
    below = 0.17 * -(-len(lines) // columns) if len(lines) > MOST_LABELS else 0.0
    figure = Figure(figsize=(4.8, 3.6 + below), layout="constrained")
    axes = figure.add_subplot()
    ends = [_draw(axes, line, smooth) for line in lines]
    if reached is not None:
        axes.axhline(reached, color=ink, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xlabel(named[0], color=ink)
    axes.set_ylabel(named[1], color=ink)
    axes.grid(axis="y", color=ink, alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(ink)
    axes.tick_params(colors=ink)
    if len(lines) <= MOST_LABELS:
        _label_ends(axes, ends, ink)
    else:
        legend = figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=ink)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw(axes: Any, line: Line, smooth: bool) -> tuple[float, float, str]:
    """MixtureComponents a line, and returns where it ends and what it is called."""
    colour = COLOURS[line.colour % len(COLOURS)]
    dash = DASHES[line.colour // len(COLOURS) % len(DASHES)]
    steps, values = line.points()
    if smooth:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        values = _running_mean(values, max(1, len(values) // 20))
    if line.low is not None and line.high is not None and not smooth:
        low, high = np.asarray(line.low, float), np.asarray(line.high, float)
        axes.fill_between(np.asarray(line.steps, float), low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, values, color=colour, linestyle=dash, linewidth=2, label=line.label.lstrip("_") or " ")
    axes.plot(steps[-1:], values[-1:], color=colour, marker="o", markersize=6)
    return float(steps[-1]), float(values[-1]), line.label


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of up to `width` values that end at each value, so that no point looks ahead."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str]], ink: str) -> None:
    """Names each line at its end; labels that would overlap are pushed apart upwards."""
    low, high = axes.get_ylim()
    points = (high - low) / 215  # the axes are about 215 points high
    previous = -np.inf
    for x, y, label in sorted(ends, key=lambda end: end[1]):
        at = max(y, previous + LABEL_POINTS * points)
        previous = at
        axes.annotate(
            label,
            (x, y),
            xytext=(8, (at - y) / points),
            textcoords="offset points",
            color=ink,
            weight="bold",
            va="center",
            annotation_clip=False,
            parse_math=False,
        )


def _inline(svg: str, description: str) -> str:
    """Matplotlib's file as an element of an HTML page, which needs neither prologue nor name spaces."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
