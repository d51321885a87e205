"""Draws the README's picture from the results of the demo.

    python tools/readme_picture.py experiments/results/demo docs/images/first_screen.svg

At the top a document with planted noise: its tokens shaded by their excess loss at the last evaluation of the selective
run, and kept or dropped by it. Then what the causal and the selective model write, and the held-out losses of all arms.
"""

import argparse
import html
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.experiment.worlds.plant import noise_in

WIDTH, MARGIN = 900, 24
CHARACTER, LINE = 8.4, 30  # of the document's text, in pixels
SMALL, SMALL_LINE = 7.2, 17  # of the models' texts
ARMS = {"selective": "#00796b", "causal": "#37474f", "random": "#b0793b", "oracle": "#7b5ea7"}
NOISE = "#d55e00"
MOST_TOKENS = 55  # of the document
WRITTEN = 3  # texts of each model
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONOSPACED = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

Results = dict[str, list[dict[str, Any]]]  # arm -> a result for each seed


def read_results(folder: Path) -> Results:
    found = {arm: sorted(folder.glob(f"{arm}-seed*.json")) for arm in ARMS}
    return {arm: [json.loads(path.read_text(encoding="utf-8")) for path in paths] for arm, paths in found.items()}


def noisy_document(results: Results) -> list[dict[str, Any]]:
    """The stored passage in which noise is dropped about as often as in the others, not the one that looks best: its
    tokens that take part."""
    agreement = []
    for passage in results["selective"][0]["passages"]:
        named = [dict(zip(("text", "loss", "reference", "kept", "noise"), token, strict=True))
                 for token in passage["tokens"]]  # fmt: skip
        tokens = [token for token in named if token["kept"] is not None][:MOST_TOKENS]
        agreement.append((float(np.mean([token["kept"] != token["noise"] for token in tokens])), tokens))
    agreement.sort(key=lambda pair: pair[0])
    return agreement[len(agreement) // 2][1]


def document_svg(tokens: Sequence[dict[str, Any]], top: float) -> tuple[list[str], float]:
    """Tokens as boxes that flow like text; returns them and where they end."""
    parts, x, y = [], float(MARGIN), top
    excesses = [token["loss"] - token["reference"] for token in tokens]
    high = max(float(np.quantile([max(excess, 0.0) for excess in excesses], 0.9)), 1e-6)
    for token, excess in zip(tokens, excesses, strict=True):
        text = token["text"].replace("\n", "\u23ce")
        width = CHARACTER * max(1, len(text))
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LINE
        shade = min(1.0, max(0.0, excess) / high)
        fill = f"rgba(0,150,136,{0.1 + 0.6 * shade:.2f})" if token["kept"] else "#f1f1f1"
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="22" rx="2" fill="{fill}"/>')
        colour = "#111" if token["kept"] else "#9a9a9a"
        parts.append(
            f'<text x="{x:.1f}" y="{y + 16:.1f}" font-family="{MONOSPACED}" font-size="14" fill="{colour}" '
            f'textLength="{width - 1:.1f}" xml:space="preserve">{html.escape(text)}</text>'
        )
        if token["noise"]:  # the generator knows which tokens it planted
            parts.append(f'<path d="M{x:.1f} {y + 24.5:.1f}h{width - 1:.1f}" stroke="{NOISE}" stroke-width="2"/>')
        x += width
    return parts, y + LINE


def writing_svg(results: Results, arm: str, left: float, top: float, width: float) -> tuple[list[str], float]:
    """What an arm's models write, noise in colour; returns it and where it ends."""
    texts = [result["samples"]["texts"] for result in results[arm]]
    share, count = np.mean([found["noisy"] for found in texts]), sum(found["texts"] for found in texts)
    parts = [
        f'<text x="{left}" y="{top}" font-size="14" font-weight="600" fill="{ARMS[arm]}">The {arm} model writes</text>',
        f'<text x="{left}" y="{top + 17}" font-size="12" fill="#444">'
        f"{share:.0%} of {count:,} samples hold noise</text>",
    ]
    y, shown = top + 40, texts[0]["shown"]
    for sample in shown[:: max(1, len(shown) // WRITTEN)][:WRITTEN]:
        text = " ".join((sample["prompt"] + sample["text"]).split())
        spans, start = noise_in(text), 0
        for line in textwrap.wrap(text, int(width / SMALL)):
            start = text.index(line, start)
            inside = [any(a <= start + i < b for a, b in spans) for i in range(len(line))]
            pieces, begin = [], 0
            for end in range(1, len(line) + 1):
                if end == len(line) or inside[end] != inside[begin]:
                    marked = f' fill="{NOISE}" font-weight="600"' if inside[begin] else ""
                    pieces.append(f"<tspan{marked}>{html.escape(line[begin:end])}</tspan>")
                    begin = end
            parts.append(
                f'<text x="{left}" y="{y}" font-family="{MONOSPACED}" font-size="12" fill="#222" '
                f'textLength="{len(line) * SMALL:.1f}" xml:space="preserve">{"".join(pieces)}</text>'
            )
            y, start = y + SMALL_LINE, start + len(line)
        y += 7
    return parts, y


def curves_svg(
    results: Results, metric: str, title: str, left: float, top: float, width: float, height: float
) -> list[str]:
    """One chart: the metric of each arm over its steps, the mean over seeds, named at the end of its line."""
    lines = {}
    for arm, seeds in results.items():
        if seeds:
            steps = seeds[0]["evaluations"]["step"]
            means = np.mean([result["evaluations"][metric] for result in seeds], axis=0)
            lines[arm] = list(zip(steps, means.tolist(), strict=True))[1:]  # all start alike
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


def picture(results: Results) -> str:
    """The whole picture as SVG with a white background, since pages may be dark."""
    boxes, end = document_svg(noisy_document(results), 80)
    half, middle = (WIDTH - 2 * MARGIN - 20) / 2, WIDTH / 2 + 10
    causal, causal_end = writing_svg(results, "causal", MARGIN, end + 24, half)
    selective, selective_end = writing_svg(results, "selective", middle, end + 24, half)
    top = max(causal_end, selective_end) + 14
    title = "Held-out loss of {}, nats a token".format
    charts = [
        *curves_svg(results, "target/loss", title("stories"), MARGIN, top, half, 190),
        *curves_svg(results, "general/loss", title("general text"), middle, top, half, 190),
    ]
    height = top + 200
    selected = [result["selected"].items() for result in results["selective"]]
    planted, others = (
        sum(
            about["selected"] * about["of_tokens"]
            for each in selected
            for name, about in each
            if is_noise(name) == noise
        )
        / sum(about["of_tokens"] for each in selected for name, about in each if is_noise(name) == noise)
        for noise in (True, False)
    )
    legend = [
        f'<text x="{MARGIN}" y="28" font-size="14" font-weight="600" fill="#222">A document of the crawl</text>',
        f'<text x="{MARGIN}" y="48" font-size="12" fill="#444">Tokens that train are shaded by their excess loss, '
        f'dropped ones are grey, <tspan fill="{NOISE}">planted noise</tspan> is underlined.</text>',
        f'<text x="{MARGIN}" y="64" font-size="12" fill="#444">Over the second half of training {planted:.0%} of the '
        f"noise trains, and {others:.0%} of the other tokens.</text>",
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="{FONT}">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join([*legend, *boxes, *causal, *selective, *charts])
        + "\n</svg>\n"
    )


def is_noise(source: str) -> bool:
    return source.endswith("/noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results of the experiment demo")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.write_text(picture(read_results(arguments.folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
