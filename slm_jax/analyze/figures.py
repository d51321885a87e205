"""Figures of the analyses: one look, legible in print and for colour-blind readers, each as PNG and as SVG."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slm_jax.analyze.curves import COLOURS, DASHES

MARKERS = "osD^vP"
INK = "#222222"
DOTS_PER_INCH = 160


@contextlib.contextmanager
def drawn(folder: Path, name: str, panels: int = 1, width: float = 5.4, height: float = 3.7) -> Iterator[list[Axes]]:
    """Axes side by side, `width` x `height` inches each; NAME.png and NAME.svg when the block ends.

    Text is drawn as it stands: a `$` begins no formula. The same drawing gives the same bytes.
    """
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10.5,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes in the PNG; the SVG keeps the text
        figure = Figure(figsize=(width * panels, height), layout="constrained")
        axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
        for each in axes:
            each.spines[["top", "right"]].set_visible(False)
            each.grid(axis="y", color=INK, alpha=0.12)
            each.set_axisbelow(True)
        yield axes
        for ending, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=DOTS_PER_INCH, metadata=metadata, bbox_inches="tight")
            _write(folder / f"{name}.{ending}", buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def line(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    label: str,
    number: int,
    colour: str | None = None,
) -> None:
    """A curve with its own colour, dash and marker, told by `number`; what is not finite is left out."""
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


def legend(axes: Axes, title: str | None = None, below: bool = False, columns: int = 1) -> None:
    """Where it hides nothing; `below` the axes for long names."""
    if below:
        axes.legend(title=title, frameon=False, fontsize=9, ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.17))
    else:
        axes.legend(title=title, frameon=False, fontsize=9, ncols=columns)


def bars(axes: Axes, labels: Sequence[str], values: Sequence[float], mean: float | None = None) -> None:
    """Horizontal bars from the top, each with its number; `mean` as a thin line across."""
    places = np.arange(len(labels))
    axes.barh(places, np.nan_to_num(np.asarray(values, float)), color=COLOURS[0], height=0.7)
    axes.set_yticks(places, list(labels))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=INK, alpha=0.12)
    for place, value in enumerate(values):
        text = f"{value:.2f}" if np.isfinite(value) else "none"
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
        axes.text(
            value + 0.01 if np.isfinite(value) else 0.01, place, text, va="center", fontsize=9, bbox=box, zorder=4
        )
    if mean is not None:
        axes.axvline(mean, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.margins(x=0.15)
    axes.set_xlim(left=0)


def groups(axes: Axes, labels: Sequence[str], names: Sequence[str], values: Float[np.ndarray, "A B"]) -> None:
    """Upright bars, B `names` side by side for each of A `labels`."""
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        place = np.arange(len(labels)) + (number - (len(names) - 1) / 2) * width
        hatch = ("", "///", "...", "xx")[number % 4]
        axes.bar(place, values[:, number], width * 0.92, label=name, color=COLOURS[number % len(COLOURS)], hatch=hatch,
                 edgecolor="white")  # fmt: skip
    long = max((len(label) for label in labels), default=0) > 10 or len(labels) > 6
    axes.set_xticks(np.arange(len(labels)), list(labels), rotation=30 if long else 0, ha="right" if long else "center")


def heat(axes: Axes, labels: Sequence[str], values: Float[np.ndarray, "A A"]) -> None:
    """A matrix from 0 to 1 with its numbers."""
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(labels)), list(labels), rotation=40, ha="right")
    axes.set_yticks(np.arange(len(labels)), list(labels))
    if len(labels) > 12:
        return
    for row in range(len(labels)):
        for column in range(len(labels)):
            value = values[row, column]
            colour = "white" if value < 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8.5)


def stacked(
    axes: Axes,
    labels: Sequence[str],
    names: Sequence[str],
    shares: Float[np.ndarray, "A B"],
    colours: Sequence[str] = COLOURS,
) -> None:
    """One horizontal bar for each label, divided into the shares of the names; small ones carry no number."""
    places, left = np.arange(len(labels)), np.zeros(len(labels))
    for number, name in enumerate(names):
        axes.barh(places, shares[:, number], left=left, label=name, color=colours[number], height=0.72,
                  edgecolor="white", hatch=("", "//", "..", "xx")[number % 4], alpha=0.85)  # fmt: skip
        for place, share in enumerate(shares[:, number]):
            if share >= 0.06:
                box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
                axes.text(
                    left[place] + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8, bbox=box
                )
        left += shares[:, number]
    axes.set_yticks(places, list(labels))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=9, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1.0))


def log_if_wide(axes: Axes) -> None:
    """A logarithmic upright axis, with plain numbers, where the curves go over more than a decade."""
    values = np.concatenate([np.asarray(curve.get_ydata(), float) for curve in axes.lines])
    if values.min() <= 0 or values.max() < 10 * values.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
