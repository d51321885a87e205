"""The figures and the summary of `analyze selection`, from what selection.json holds."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.analyze import figures, tables
from slm_jax.analyze.selection_runs import ALL

CAPTIONS = {
    "training": "Loss of the tokens of each batch that were selected and that were not (running means), and the "
    "downstream result (Rho-1, Figure 6).",
    "fixed_tokens": "The same tokens for all runs: those that the last checkpoint of the first run selects, and the "
    "others.",
    "fit": "Downstream result against the loss of selected and of unselected tokens, with result = log(a loss + c) "
    "(Rho-1, Figure 7).",
    "perplexity": "Perplexity under every checkpoint of the tokens that each checkpoint selects (Rho-1, Figure 8).",
    "ratio_sweep": "Last downstream result by the share of the tokens that trains (Rho-1, Figure 9).",
    "shares": "Share of the tokens that the last checkpoint selects; the dotted line is the share of all.",
    "overlap": "Jaccard overlap of selections.",
}


def draw(folder: Path, record: dict[str, Any]) -> list[str]:
    """MixtureComponents what there is; returns the names of the figures."""
    tokens, drawn = record.get("tokens"), []
    if any(_has_selected(about) for about in record["runs"].values()):
        _training(folder, record)
        drawn.append("training")
    if tokens:
        _fixed_tokens(folder, tokens)
        _perplexity(folder, tokens)
        drawn += ["fixed_tokens", "perplexity"]
    if any(_fits(record)):
        _fit(folder, record)
        drawn.append("fit")
    if len({about["ratio"] for about in record["ratio_sweep"]}) > 1:
        _ratio_sweep(folder, record)
        drawn.append("ratio_sweep")
    if tokens:
        _shares(folder, tokens)
        drawn.append("shares")
        if families := [name for name in ("checkpoints", "scores", "references") if name in tokens["overlap"]]:
            with figures.drawn(folder, "overlap", len(families), width=5.2, height=4.8) as panels:
                for axes, name in zip(panels, families, strict=True):
                    about = tokens["overlap"][name]
                    figures.heat(axes, about["names"], _array(about["jaccard"]))
                    axes.set_title(f"{name}; by chance {tokens['overlap']['by_chance']:.2f}", fontsize=10.5)
            drawn.append("overlap")
    return drawn


def _array(values: Any) -> np.ndarray:
    """Numbers from JSON, whose None is NaN."""
    return np.array(values, float)


def _has_selected(about: dict[str, Any]) -> bool:
    return len(about["training"]["selected_loss"]["steps"]) > 1


def _training(folder: Path, record: dict[str, Any]) -> None:
    with figures.drawn(folder, "training", 3, width=4.6) as (selected, unselected, downstream):
        for number, (name, about) in enumerate(record["runs"].items()):
            for axes, part in ((selected, "selected_loss"), (unselected, "unselected_loss")):
                curve = about["training"][part]
                if curve["steps"]:
                    figures.line(axes, curve["steps"], _array(curve["values"]), name, number)
            curve = about["downstream"]
            figures.line(downstream, curve["steps"], _array(curve["values"]), name, number)
        selected.set(title="selected tokens", ylabel="nats per token", xlabel="step")
        unselected.set(title="unselected tokens", xlabel="step")
        downstream.set(title=record["downstream"], xlabel="step")
        figures.legend(downstream)


def _fixed_tokens(folder: Path, tokens: dict[str, Any]) -> None:
    with figures.drawn(folder, "fixed_tokens", 2, width=4.8) as panels:
        for axes, part in zip(panels, ("selected", "unselected"), strict=True):
            for number, (name, about) in enumerate(tokens["fixed_tokens"].items()):
                figures.line(axes, about["steps"], _array(about[part]), name, number)
            axes.set(title=f"tokens that {tokens['run']} {'selects' if part == 'selected' else 'leaves out'}")
            axes.set(xlabel="step of the checkpoint")
        panels[0].set_ylabel("nats per token")
        figures.legend(panels[1])


def _some(steps: list[int], most: int = 6) -> list[int]:
    """Places of up to `most` checkpoints, evenly, the last among them; not that of step 0, whose model knows nothing
    yet, where others are there."""
    first = 1 if steps[0] == 0 and len(steps) > 2 else 0
    return sorted(
        {round(place) for place in np.linspace(len(steps) - 1, first, min(most, len(steps) - first)).tolist()}
    )


def _perplexity(folder: Path, tokens: dict[str, Any]) -> None:
    steps, perplexity = tokens["checkpoints"], np.exp(_array(tokens["loss_of_selected"]))
    with figures.drawn(folder, "perplexity") as (axes,):
        places = _some(steps)
        for number, place in enumerate(places):
            first = places[0] if steps[0] == 0 else 0
            figures.line(axes, steps[first:], perplexity[place, first:], f"step {steps[place]}", number)
        axes.set(xlabel="step of the checkpoint", ylabel="perplexity")
        figures.log_if_wide(axes)
        figures.legend(axes, "selected by")


def _fits(record: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(label, {selected, unselected}) of the runs whose own selection could be fitted, and of the tokens that each
    checkpoint selects."""

    def found(fits: dict[str, Any]) -> bool:
        return any(fits[part]["fit"] for part in ("selected", "unselected"))

    of_runs = [(name, about["fits"]) for name, about in record["runs"].items() if found(about["fits"])]
    chosen = (record.get("tokens") or {}).get("fits", ())
    of_checkpoints = [(f"selected by step {fits['selected_by']}", fits) for fits in chosen]
    return of_runs, of_checkpoints if any(found(fits) for fits in chosen) else []


def _fit(folder: Path, record: dict[str, Any]) -> None:
    """Of the tokens that checkpoints select where there are any, else of the tokens of training's batches."""
    of_runs, of_checkpoints = _fits(record)
    fits = [of_checkpoints[place] for place in _some(record["tokens"]["checkpoints"], 4)] if of_checkpoints else of_runs
    with figures.drawn(folder, "fit", 2, width=4.8, height=4.0) as panels:
        for axes, part in zip(panels, ("selected", "unselected"), strict=True):
            for number, (label, parts) in enumerate(fits):
                _one_fit(axes, parts[part], label, number)
            axes.set(title=f"{part} tokens", xlabel="loss, nats per token")
            axes.invert_xaxis()
        panels[0].set_ylabel(record["downstream"])
        for axes in panels:
            figures.legend(axes, below=True)


def _one_fit(axes: Any, about: dict[str, Any], label: str, number: int) -> None:
    loss, result = _array(about["loss"]), _array(about["result"])
    colour = figures.COLOURS[number % len(figures.COLOURS)]
    if fit := about["fit"]:
        x = np.linspace(loss.min(), loss.max(), 100)
        line = fit["a"] * x + fit["c"]
        quality = "" if fit["r_squared"] is None else f", R² = {fit['r_squared']:.2f}"
        label = f"{label}: a = {fit['a']:.3g}{quality}"
        axes.plot(x[line > 0], np.log(line[line > 0]), color=colour, linewidth=1.2)
    axes.plot(loss, result, color=colour, marker=figures.MARKERS[number % 6], linestyle="", markersize=5, label=label)


def _ratio_sweep(folder: Path, record: dict[str, Any]) -> None:
    with figures.drawn(folder, "ratio_sweep") as (axes,):
        scores = sorted({about["score"] for about in record["ratio_sweep"]}, key=lambda score: (score == ALL, score))
        for number, score in enumerate(scores):
            entries = [about for about in record["ratio_sweep"] if about["score"] == score]
            x, means = _array([100 * e["ratio"] for e in entries]), _array([e["mean"] for e in entries])
            spread = np.abs(_array([[e["lowest"], e["highest"]] for e in entries]).T - means)
            figures.line(axes, x, means, score, number)
            if spread.any():
                axes.errorbar(x, means, spread, fmt="none", capsize=3, color=figures.COLOURS[number])
        axes.set(xlabel="share of the tokens that trains, %", ylabel=record["downstream"])
        figures.legend(axes)


def _shares(folder: Path, tokens: dict[str, Any]) -> None:
    by = tokens["shares"]
    tallest = max(len(groups) for groups in by.values())
    with figures.drawn(folder, "shares", len(by), width=4.4, height=1.2 + 0.33 * max(tallest, 4)) as panels:
        for axes, (name, groups) in zip(panels, by.items(), strict=True):
            shares = _array([group["share"] for group in groups])
            figures.bars(axes, [group["name"] for group in groups], shares.tolist(), tokens["selected_share"][-1])
            axes.set(title=f"by {name}", xlabel="share selected", xlim=(0, 1.12))


def summary(record: dict[str, Any], drawn: list[str]) -> str:
    """Everything as one Markdown page; figures by their names."""
    downstream, tokens = record["downstream"], record.get("tokens")
    headings = ("run", "selects by", "share", "kept", "steps", "tokens seen", "tokens trained", downstream)
    names = ("score", "ratio", "kept", "steps", "tokens_seen", "tokens_trained", "last_downstream")
    runs = [(run, *(about[name] for name in names)) for run, about in record["runs"].items()]
    parts = ["# Which tokens were selected\n", tables.of_values(headings, runs).markdown()]
    parts += [_figures(drawn, ("training", "fixed_tokens", "ratio_sweep"))]
    if fits := _fit_rows(record):
        parts += ["## Result as the logarithm of a line in the loss\n"]
        parts += [tables.of_values(("of", "tokens", "a", "c", "R²", "error", "points"), fits, 4).markdown()]
        parts += ["The sign of a is found, not assumed.\n", _figures(drawn, ("fit",))]
    if by_source := [(run, about["selected_by_source"]) for run, about in record["runs"].items()]:
        sources = list(dict.fromkeys(source for _, shares in by_source for source in shares))
        if sources:
            rows = [(run, *(shares.get(source) for source in sources)) for run, shares in by_source if shares]
            parts += ["## Share selected in training, by source (second half)\n"]
            parts += [tables.of_values(("run", *sources), rows).markdown()]
    if tokens:
        parts += _tokens_summary(tokens, drawn)
    return "\n".join(part for part in parts if part)


def _figures(drawn: list[str], names: tuple[str, ...]) -> str:
    return "".join(
        f"![{name.replace('_', ' ')}]({name}.png)\n\n{CAPTIONS[name]}\n\n" for name in names if name in drawn
    )


def _fit_rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for label, fits in itertools.chain(*_fits(record)):
        for part in ("selected", "unselected"):
            if fit := fits[part]["fit"]:
                rows.append((label, part, fit["a"], fit["c"], fit["r_squared"], fit["error"], fit["points"]))
    return rows


def _tokens_summary(tokens: dict[str, Any], drawn: list[str]) -> list[str]:
    selection = tokens["selection"]
    text = (
        f"{tokens['tokens']:,} tokens of {tokens['corpus']}, selected by the checkpoints of {tokens['run']}: score "
        f"{selection['score']}, share {selection['ratio']:g}, among {tokens['batch_size']} rows.\n"
    )
    parts = ["## Tokens that each checkpoint selects\n", text]
    perplexity = np.exp(_array(tokens["loss_of_selected"])).tolist()
    headings = ("selected by step", *(f"under {step}" for step in tokens["checkpoints"]))
    rows = [(str(step), *row) for step, row in zip(tokens["checkpoints"], perplexity, strict=True)]
    parts += ["Perplexity:\n", tables.of_values(headings, rows, 2).markdown(), _figures(drawn, ("perplexity",))]
    for name, groups in tokens["shares"].items():
        shares = [(group["name"], group["share"], group["tokens"]) for group in groups]
        table = tables.of_values((name, "share selected", "tokens"), shares)
        parts += [f"## Share selected by {name}\n", table.markdown()]
    parts += [_figures(drawn, ("shares",))]
    if noise := tokens["noise"]:
        columns = ("tokens", "noise_share", "precision", "recall")
        rows = [(name, *(about[column] for column in columns)) for name, about in noise.items()]
        parts += ["## Noise that is left out\n", tables.of_values(("among", *columns), rows).markdown()]
        parts += ["Precision: share of what is left out that is noise. Recall: share of the noise that is left out.\n"]
    for name in ("checkpoints", "scores", "references"):
        if about := tokens["overlap"].get(name):
            rows = [(of, *row) for of, row in zip(about["names"], about["jaccard"], strict=True)]
            parts += [f"## Overlap between {name} (Jaccard; by chance {tokens['overlap']['by_chance']:.3f})\n"]
            parts += [tables.of_values(("", *about["names"]), rows).markdown()]
    return [*parts, _figures(drawn, ("overlap",))]
