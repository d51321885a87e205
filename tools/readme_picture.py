"""Draws the README's picture from an experiment's own run.

    python tools/readme_picture.py runs/demo docs/images/first_screen.svg

Above: one document with injected noise, its tokens shaded by their excess loss at the last evaluation, and kept or
dropped by the selection. Below: the held-out losses of the compared runs over training.
"""

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.analyze.columns import read_kept_losses
from slm_jax.data.corpus import Corpus
from slm_jax.data.token_text import TokenText
from slm_jax.run_directory import RunDirectory

WIDTH, MARGIN = 900, 24
CHARACTER, LINE = 8.4, 30  # of the monospaced text, in pixels
ARMS = {"selective": "#00796b", "causal": "#37474f", "random": "#b0793b"}
SHORTEST, LONGEST = 30, 60  # tokens of the document that is drawn
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONOSPACED = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Token(NamedTuple):
    text: str
    excess: float
    kept: bool
    noise: bool


def noisy_document(run: Path) -> list[Token]:
    """The document of the traced rows that is noisiest without being mostly noise, with what the run's last evaluation
    keeps of it."""
    phase = RunDirectory(run).settings()["phases"][0]
    corpus, selection = Corpus.open(phase["mixture"][0]["corpus"]), phase["selection"]
    loss = read_kept_losses(str(run), "trace")[1].values[-1]  # [rows, L]
    rows = np.arange(len(loss))
    column = f"scores/{selection['reference']}/loss"
    columns = corpus.read(rows, ["tokens", "segment_ids", "source_ids", column])
    excess = loss - columns[column]
    valid = np.isfinite(excess)
    kept = valid & (excess >= np.quantile(excess[valid], 1 - selection["ratio"]))
    noise = np.array([name.endswith("/noise") for name in corpus.source_names])[columns["source_ids"]]
    reader, found = TokenText(corpus.vocabulary()), []
    for row in rows:
        for segment in range(1, int(columns["segment_ids"][row].max()) + 1):
            at = (row, columns["segment_ids"][row] == segment)
            share = float(noise[at].mean())
            if SHORTEST <= at[1].sum() <= LONGEST and 0.15 < share < 0.5:
                texts = reader.texts(columns["tokens"][at].tolist())
                agreement = float(np.mean(kept[at][valid[at]] != noise[at][valid[at]]))
                tokens = [Token(*token) for token in zip(texts, excess[at], kept[at], noise[at], strict=True)]
                found.append((agreement, [token for token, ok in zip(tokens, valid[at], strict=True) if ok]))
    # A document in which noise is dropped about as often as it is on average, not the one that looks best.
    found.sort(key=lambda pair: pair[0])
    return found[len(found) // 2][1]


def document_svg(tokens: Sequence[Token], top: float) -> tuple[list[str], float]:
    """Tokens as boxes that flow like text; returns them and where they end."""
    parts, x, y = [], float(MARGIN), top
    largest = max(abs(token.excess) for token in tokens)
    for token in tokens:
        text = token.text.replace("\n", "\u23ce")
        width = CHARACTER * max(1, len(text))
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LINE
        shade = min(1.0, max(0.0, token.excess) / (0.6 * largest))
        fill = f"rgba(0,150,136,{0.08 + 0.62 * shade:.2f})" if token.kept else "#f1f1f1"
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="22" rx="2" fill="{fill}"/>')
        colour = "#111" if token.kept else "#9a9a9a"
        parts.append(
            f'<text x="{x:.1f}" y="{y + 16:.1f}" font-family="{MONOSPACED}" font-size="14" fill="{colour}" '
            f'textLength="{width - 1:.1f}" xml:space="preserve">{html.escape(text)}</text>'
        )
        if token.noise:  # the generator knows which tokens it injected
            parts.append(f'<path d="M{x:.1f} {y + 24.5:.1f}h{width - 1:.1f}" stroke="#d55e00" stroke-width="2"/>')
        x += width
    return parts, y + LINE


def curves_svg(
    folder: Path, metric: str, title: str, left: float, top: float, width: float, height: float
) -> list[str]:
    """One chart: the metric of each arm over its steps, named at the end of its line."""
    lines = {}
    for arm in ARMS:
        if (folder / arm).is_dir():
            rows = [row for row in RunDirectory(folder / arm).metrics() if row.get(metric) is not None]
            lines[arm] = [(row["step"], row[metric]) for row in rows][1:]  # all start alike
    values = [value for line in lines.values() for _, value in line]
    low, high, last = min(values), max(values), max(step for line in lines.values() for step, _ in line)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + 30 + (width - 110) * step / last, top + 24 + (height - 48) * (high - value) / (high - low)

    parts = [f'<text x="{left}" y="{top + 6}" font-size="14" font-weight="600" fill="#222">{title}</text>']
    for value in (low, high):
        x, y = place(0, value)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{left + width - 80:.1f}" stroke="#e3e3e3"/>')
        parts.append(
            f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" font-size="11" text-anchor="end" fill="#666">{value:.1f}</text>'
        )
    taken: list[float] = []
    for arm, line in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{ARMS[arm]}" stroke-width="2.2"/>')
        x, y = place(*line[-1])
        y = max([y + 4, *(other + 14 for other in taken)])
        taken.append(y)
        parts.append(f'<text x="{x + 6:.1f}" y="{y:.1f}" font-size="12" fill="{ARMS[arm]}">{arm}</text>')
    x, y = place(last, low)
    parts.append(
        f'<text x="{x:.1f}" y="{top + height - 4:.1f}" font-size="11" text-anchor="end" fill="#666">step {last}</text>'
    )
    return parts


def picture(folder: Path) -> str:
    """The whole picture as SVG with a white background, since pages may be dark."""
    tokens = noisy_document(folder / "selective")
    boxes, end = document_svg(tokens, 80)
    half = (WIDTH - 2 * MARGIN - 20) / 2
    charts = [
        *curves_svg(folder, "target/loss", "Held-out loss: text like the reference's", MARGIN, end + 34, half, 190),
        *curves_svg(folder, "general/loss", "Held-out loss: other text", MARGIN + half + 20, end + 34, half, 190),
    ]
    height = end + 34 + 200
    shares = json.loads((folder / "summary.json").read_text())["selection"]
    legend = [
        f'<text x="{MARGIN}" y="28" font-size="14" font-weight="600" fill="#222">A document of the noisy corpus</text>',
        f'<text x="{MARGIN}" y="48" font-size="12" fill="#444">Kept tokens are shaded by their excess loss, dropped '
        'tokens are grey, <tspan fill="#d55e00">injected noise</tspan> is underlined.</text>',
        f'<text x="{MARGIN}" y="64" font-size="12" fill="#444">Over the second half of training, '
        f"{shares['clean_selected_share']:.0%} of the clean tokens are kept and {shares['noise_selected_share']:.0%} "
        "of the noise.</text>",
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="{FONT}">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join([*legend, *boxes, *charts])
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the experiment: runs in it are named selective, causal, random")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.write_text(picture(arguments.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
