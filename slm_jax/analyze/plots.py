"""Figures: one look, legible in print and for colour-blind readers, for pages and as files.

`files` gives axes to draw on and writes NAME.png and NAME.svg. `curves` and `pareto` draw the figures of a report: an
inline SVG whose text follows the colours of the page, the same figure as files, and the points that a reader can hover.
"""

import contextlib
import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from slm_jax.analyze.page import one_line
from slm_jax.files import write_bytes

# Okabe and Ito's first colours, then darker ones: distinct for colour-blind readers, legible on white and on dark grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#777777")
DASHES = ("-", "--", ":")  # the next one where the colours repeat
MARKERS = "osD^vP"
HATCHES = ("", "///", "...", "xx")
INK = "#1c1e21"  # axes and text; in a page the page's own text colour replaces it
DOTS_PER_INCH = 160
MOST_LABELS = 9  # lines labelled at their ends; more get a legend below the axes
LABEL_POINTS = 12.0  # least distance between two labels at line ends
HOVER_POINTS = 200  # per line


def style(name: str) -> Any:
    """Text stays text: a `$` starts no formula, SVG keeps the letters. The same drawing gives the same bytes."""
    return matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.5, "text.parse_math": False}
    )


def running_mean(values: Float[np.ndarray, "N"], width: int) -> Float[np.ndarray, "N"]:
    """The mean of up to `width` values that end at each value, so that no point looks ahead."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


# ---- Figures of a report


class Figure(NamedTuple):
    """A figure for a page (`inline`, an `<svg>`) and on white ground as files; file: their name without the ending.

    hover: what the page's script shows: `lines` of {name, colour, points [viewBox x, viewBox y, words]}, and whether
    all lines are shown `together` at one x.
    """

    title: str
    caption: str
    inline: str
    svg: str
    png: bytes
    hover: dict[str, Any]
    file: str


class Line(NamedTuple):
    """One curve; None and non-finite values are left out. `colour` counts through COLOURS.

    low, high: the edges of a band around it, such as the range over seeds.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        x, y = np.asarray(self.x, float), np.asarray(self.y, float)
        shown = np.isfinite(x) & np.isfinite(y)
        return x[shown], y[shown]


class Point(NamedTuple):
    """The runs of an arm in a scatter plot: (x, y) for each seed."""

    label: str
    pairs: Sequence[tuple[float, float]]
    colour: int


def curves(
    title: str,
    caption: str,
    lines: Sequence[Line],
    axes: tuple[str, str] = ("step", "nats per token"),
    smooth: bool = False,
) -> Figure | None:
    """Lines with names at their ends, or in a legend where they are many; None when no line has two points.

    smooth: draw the running mean over the faint measured values.
    """
    lines = [line._replace(label=one_line(line.label)) for line in lines if len(line.points()[0]) > 1]
    if not lines:
        return None
    columns = max(1, min(3, 70 // (8 + max(len(line.label) for line in lines))))  # so that the names fit
    in_legend = len(lines) > MOST_LABELS

    def draw(on: Axes) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        shown = []
        for line in lines:
            colour, (x, y) = COLOURS[line.colour % len(COLOURS)], line.points()
            if smooth:
                on.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
                y = running_mean(y, max(1, len(y) // 20))
            elif line.low is not None and line.high is not None:
                low, high = np.asarray(line.low, float), np.asarray(line.high, float)
                on.fill_between(np.asarray(line.x, float), low, high, color=colour, alpha=0.2, linewidth=0)
            dash = DASHES[line.colour // len(COLOURS) % len(DASHES)]
            # Matplotlib leaves labels that begin with "_" out of legends.
            on.plot(x, y, color=colour, linestyle=dash, linewidth=2, label=line.label.lstrip("_") or " ")
            on.plot(x[-1:], y[-1:], color=colour, marker="o", markersize=6)
            shown.append((line.label, colour, x, y))
        if in_legend:
            canvas = on.get_figure()
            assert isinstance(canvas, Canvas)
            canvas.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=INK)
        else:
            _label_ends(on, [(x[-1], y[-1], label) for label, _, x, y in shown])
        return shown

    below = 0.17 * -(-len(lines) // columns) if in_legend else 0.0
    return _figure(title, caption, axes, draw, height=3.6 + below, together=True)


def pareto(title: str, caption: str, points: Sequence[Point], axes: tuple[str, str]) -> Figure | None:
    """Two losses against each other: large, the mean of each arm; small, its seeds. None for fewer than two arms."""
    points = [point._replace(label=one_line(point.label)) for point in points if len(point.pairs)]
    if len(points) < 2:
        return None

    def draw(on: Axes) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        shown, ends = [], []
        for point in points:
            colour = COLOURS[point.colour % len(COLOURS)]
            marker = MARKERS[point.colour // len(COLOURS) % len(MARKERS)]
            pairs = np.asarray(point.pairs, float)  # [seeds, 2]
            mean = pairs.mean(axis=0)
            if len(pairs) > 1:
                on.plot(*pairs.T, marker, color=colour, markersize=3.5, alpha=0.5)
            on.plot(*mean, marker, color=colour, markersize=8)
            shown.append((point.label, colour, mean[:1], mean[1:]))
            ends.append((mean[0], mean[1], point.label))
        on.margins(0.15)
        on.grid(axis="x", color=INK, alpha=0.12)
        _label_ends(on, ends)
        return shown

    return _figure(title, caption, axes, draw, together=False)


def _figure(
    title: str,
    caption: str,
    names: tuple[str, str],
    draw: Callable[[Axes], list[tuple[str, str, np.ndarray, np.ndarray]]],
    together: bool,
    height: float = 3.6,
) -> Figure:
    """Draws once, and saves for the page and as files."""
    with style(title), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes in the PNG; the SVG keeps the text
        canvas = Canvas(figsize=(4.8, height), layout="constrained")
        axes = canvas.add_subplot(facecolor="none")
        axes.grid(axis="y", color=INK, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK)
        axes.set_xlabel(names[0], color=INK)
        axes.set_ylabel(names[1], color=INK)
        drawn = draw(axes)
        canvas.draw_without_rendering()  # the layout, once for all formats
        canvas.set_layout_engine("none")
        png = io.BytesIO()
        canvas.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})

        # ---- The points to hover, in the units of the SVG's viewBox: points, y downwards.
        width, tall = canvas.get_size_inches() * 72
        lines = []
        for name, colour, x, y in drawn:
            kept = np.unique(np.linspace(0, len(x) - 1, HOVER_POINTS).astype(int))
            at = axes.transData.transform(np.stack([x[kept], y[kept]], axis=1)) * 72 / canvas.dpi
            at = np.round(np.stack([at[:, 0], tall - at[:, 1]], axis=1), 1).tolist()
            words = [f"{names[0]} {a:,.0f}" if a == int(a) else f"{names[0]} {a:.4g}" for a in x[kept].tolist()]
            points = [[*place, word, f"{b:.4g}"] for place, word, b in zip(at, words, y[kept].tolist(), strict=True)]
            lines.append({"name": name, "colour": colour, "points": points})
        hover = {"y": names[1], "together": together, "size": [round(width, 1), round(tall, 1)], "lines": lines}

        # ---- For the page: an element of HTML needs neither prologue nor name spaces, and has the page's text colour.
        inline = _svg(canvas, "none")
        inline = re.sub(r' xmlns(:\w+)?="[^"]*"', "", inline[inline.index("<svg") :])
        inline = re.sub(r' (width|height)="[\d.]+pt"', "", inline, count=2).replace(INK, "currentColor")
        inline = inline.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
        file = re.sub(r"\W+", "_", title.lower()).strip("_")
        title = title[:1].upper() + title[1:]
        return Figure(title, caption, inline, _svg(canvas, "white"), png.getvalue(), hover, file)


def _svg(canvas: Canvas, ground: str) -> str:
    buffer = io.StringIO()
    # None for each field leaves out the metadata block, whose names are URLs.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    canvas.savefig(buffer, format="svg", metadata=metadata, facecolor=ground)
    return buffer.getvalue()


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Puts names beside points; labels that would overlap are pushed apart upwards."""
    low, high = axes.get_ylim()
    points = (high - low) / 215  # the axes are about 215 points high
    previous = -np.inf
    for x, y, label in sorted(ends, key=lambda end: end[1]):
        previous = at = max(y, previous + LABEL_POINTS * points)
        axes.annotate(
            label,
            (x, y),
            xytext=(8, (at - y) / points),
            textcoords="offset points",
            color=INK,
            weight="bold",
            va="center",
            annotation_clip=False,
        )


# ---- Figures as files


@contextlib.contextmanager
def files(folder: Path, name: str, panels: int = 1, width: float = 5.4, height: float = 3.7) -> Iterator[list[Axes]]:
    """Axes side by side, `width` x `height` inches each; writes NAME.png and NAME.svg when the block ends."""
    with style(name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas = Canvas(figsize=(width * panels, height), layout="constrained")
        axes = [canvas.add_subplot(1, panels, number + 1) for number in range(panels)]
        for each in axes:
            each.spines[["top", "right"]].set_visible(False)
            each.grid(axis="y", color=INK, alpha=0.12)
            each.set_axisbelow(True)
        yield axes
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")
        for ending, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=ending, dpi=DOTS_PER_INCH, metadata=metadata, bbox_inches="tight")
            write_bytes(folder / f"{name}.{ending}", buffer.getvalue())


def line(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    label: str,
    number: int,
    colour: str | None = None,
) -> None:
    """A curve whose colour, dash and marker follow from `number`; non-finite values are left out."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    shown = np.isfinite(x) & np.isfinite(y)
    axes.plot(
        x[shown],
        y[shown],
        label=label,
        color=colour or COLOURS[number % len(COLOURS)],
        linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        markevery=max(1, int(shown.sum()) // 12),
        linewidth=1.6,
    )


def legend(axes: Axes, title: str | None = None, place: str = "best", columns: int = 1) -> None:
    """`best` hides no curve; `below` or `above` the axes for long names."""
    where: Mapping[str, Any] = {
        "best": {},
        "below": {"loc": "upper left", "bbox_to_anchor": (0, -0.17)},
        "above": {"loc": "lower left", "bbox_to_anchor": (0, 1.0)},
    }[place]
    axes.legend(title=title, frameon=False, fontsize=9, ncols=columns, **where)


def bars(axes: Axes, labels: Sequence[str], values: Sequence[float], mean: float | None = None) -> None:
    """Horizontal bars from the top, each with its number; `mean` as a thin line across."""
    places = np.arange(len(labels))
    axes.barh(places, np.nan_to_num(np.asarray(values, float)), color=COLOURS[0], height=0.7)
    axes.set_yticks(places, list(labels))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=INK, alpha=0.12)
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    for place, value in enumerate(values):
        known = np.isfinite(value)
        at, text = (value + 0.01, f"{value:.2f}") if known else (0.01, "none")
        axes.text(at, place, text, va="center", fontsize=9, bbox=box, zorder=4)
    if mean is not None:
        axes.axvline(mean, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.margins(x=0.15)
    axes.set_xlim(left=0)


def groups(axes: Axes, labels: Sequence[str], names: Sequence[str], values: Float[np.ndarray, "A B"]) -> None:
    """Upright bars, B `names` side by side for each of A `labels`."""
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        place = np.arange(len(labels)) + (number - (len(names) - 1) / 2) * width
        colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % 4]
        axes.bar(place, values[:, number], width * 0.92, label=name, color=colour, hatch=hatch, edgecolor="white")
    long = max((len(label) for label in labels), default=0) > 10 or len(labels) > 6
    axes.set_xticks(np.arange(len(labels)), list(labels), rotation=30 if long else 0, ha="right" if long else "center")


def heat(axes: Axes, labels: Sequence[str], values: Float[np.ndarray, "A A"]) -> None:
    """A matrix from 0 to 1, with its numbers where they fit."""
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(labels)), list(labels), rotation=40, ha="right")
    axes.set_yticks(np.arange(len(labels)), list(labels))
    if len(labels) <= 12:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8.5)


def stacked(
    axes: Axes,
    labels: Sequence[str],
    names: Sequence[str],
    shares: Float[np.ndarray, "A B"],
    colours: Sequence[str] = COLOURS,
) -> None:
    """One horizontal bar for each label, divided into the shares of the names; shares below 6 % carry no number."""
    places, left = np.arange(len(labels)), np.zeros(len(labels))
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for number, name in enumerate(names):
        look = {"color": colours[number], "hatch": HATCHES[number % 4], "edgecolor": "white", "alpha": 0.85}
        axes.barh(places, shares[:, number], left=left, label=name, height=0.72, **look)
        for place in np.flatnonzero(shares[:, number] >= 0.06).tolist():
            share = shares[place, number]
            at = left[place] + share / 2
            axes.text(at, place, f"{share:.0%}", ha="center", va="center", fontsize=8, bbox=box)
        left += shares[:, number]
    axes.set_yticks(places, list(labels))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1)
    legend(axes, place="above", columns=len(names))


def log_if_wide(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers where the curves span more than a decade."""
    values = np.concatenate([np.asarray(curve.get_ydata(), float) for curve in axes.lines])
    if values.min() <= 0 or values.max() < 10 * values.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
