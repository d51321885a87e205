"""Loss curves as SVG that stands inside a page: text stays text, and lines and letters follow the page's colours."""

import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's first colours, then darker ones: apart for colour-blind readers, legible on white and on dark grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#777777")
DASHES = ("-", "--", ":")  # the next one when the colours begin again
INK = "#123456"  # stands for the page's text colour until the SVG is written
LABEL_POINTS = 12.0  # least distance of two labels at the ends of lines


class Line(NamedTuple):
    """One curve; values that are None or not finite are left out. `colour` counts through COLOURS."""

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        steps, values = np.asarray(self.steps, float), np.asarray(self.values, float)
        shown = np.isfinite(values)
        return steps[shown], values[shown]


def curve_svg(description: str, lines: Sequence[Line], reached: float | None = None, smooth: bool = False) -> str:
    """An inline `<svg>` of losses over steps, or "" when there is nothing to draw.

    reached: a loss to mark with a thin line across. smooth: draw the running mean over the measured values.
    """
    lines = [line for line in lines if len(line.points()[0]) > 1]
    if not lines:
        return ""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "font.size": 10.5}):
        figure = Figure(figsize=(4.8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, lines, reached, smooth)
        buffer = io.StringIO()
        # None for each field leaves out the metadata block, whose names are URLs.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue(), description)


def _draw(axes: Axes, lines: Sequence[Line], reached: float | None, smooth: bool) -> None:
    ends = []
    for line in lines:
        colour = COLOURS[line.colour % len(COLOURS)]
        dash = DASHES[line.colour // len(COLOURS) % len(DASHES)]
        steps, values = line.points()
        if smooth:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            values = _running_mean(values, max(1, len(values) // 20))
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=2)
        axes.plot(steps[-1:], values[-1:], color=colour, marker="o", markersize=6)
        ends.append((float(steps[-1]), float(values[-1]), line.label))
    if reached is not None:
        axes.axhline(reached, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    _label_ends(axes, ends)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of up to `width` values that end at each value, so that no point looks ahead."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
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
            color=INK,
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
