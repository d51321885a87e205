"""Stage `analyze selection`: which tokens runs selected, and how the losses of selected and other tokens changed.

Rho-1 (arXiv 2404.07965) Figures 6 to 9. Nothing is trained.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.analyze import plots, tables
from slm_jax.analyze.columns import read_losses, read_rows, score_columns
from slm_jax.analyze.runs import read_run
from slm_jax.analyze.selected_tokens import Selector, of_tokens, read_classes
from slm_jax.analyze.selection_metrics import ALL, of_runs
from slm_jax.configurable import Count, Natural, OneOf, Seed, configurable
from slm_jax.errors import UserError
from slm_jax.files import write_json, write_text
from slm_jax.score.selection import SCORES, Selection, selection_of

CAPTIONS = {
    "training": "Loss of the tokens of each batch that were selected and of those that were not (running means), and "
    "the downstream result (Rho-1, Figure 6).",
    "fixed_tokens": "The same tokens for all runs: those that the last checkpoint of the first run selects, and the "
    "others.",
    "fit": "Downstream result against the loss of selected and of unselected tokens, with result = log(a loss + c) "
    "(Rho-1, Figure 7).",
    "perplexity": "Perplexity under every checkpoint of the tokens that each checkpoint selects (Rho-1, Figure 8).",
    "ratio_sweep": "Last downstream result by the share of the tokens that trains (Rho-1, Figure 9).",
    "shares": "Share of the tokens that the last checkpoint selects; the dotted line is the share of all tokens.",
    "overlap": "Jaccard overlap of selections.",
}
PARTS = ("selected", "unselected")
COMPARED = ("excess", "loss", "reference", "random")  # scores
FALLBACK_ROWS = 16  # of a batch, where no run selects


@configurable
def analyze_selection(
    runs: Sequence[str] = (),
    downstream: str = "target/loss",
    corpus: str | None = None,
    steps: Sequence[Natural] | None = None,
    score_missing: bool = False,
    rows: Count | None = None,
    selection: Selection | None = None,
    batch_size: Count | None = None,
    scores: Sequence[Annotated[str, OneOf(SCORES)]] | None = None,
    references: Sequence[str] = (),
    dynamics: str | None = None,
    seed: Seed = 0,
    output: str | None = None,
) -> dict[str, Any]:
    """Analyzes which tokens runs selected, and how their losses changed (Rho-1, Figures 6 to 9).

    `slm-jax analyze selection RUN [RUN ...]` reads metrics: losses of selected and unselected tokens and of a
    downstream set over training, the share selected by source, the downstream result by share kept, and the fit
    result = log(a loss + c). With a corpus that has a score column for each checkpoint of the first run, called
    <folder of the run>-<step>, also which tokens each checkpoint selects: their perplexity under every checkpoint, the
    share by source, frequency, position and class, overlaps, and how much noise is dropped. Further runs whose
    checkpoints have columns are compared on the same tokens. Writes selection.json, summary.md and figures as PNG and
    SVG.

    Args:
      runs: run directories; the first is analyzed token by token.
      downstream: metric of the runs to compare with the losses: <name of a HeldOut>/loss, or an accuracy.
      corpus: a corpus whose tokens to select from, best held out; without it only metrics are read.
      steps: which checkpoints of the runs; all by default.
      score_missing: score the checkpoints of all runs that have no column yet, as the stage `score` does.
      rows: how many of the first rows of the corpus to read; all by default.
      selection: how tokens are selected; as in the first run that selects by default.
      batch_size: rows among which tokens compete; the batch size of that run by default.
      scores: scores to compare under the last checkpoint; by default those of excess, loss, reference and random whose
        columns the corpus has.
      references: names of further score columns to compare with selection.reference.
      dynamics: folder that `analyze dynamics` wrote for the corpus: shares by class.
      seed: of random selection.
      output: folder for the results; <first run>/selection by default.
    """
    # ---- Checks, all of them before anything is computed
    if not runs:
        raise UserError("selection-no-runs", "no run to analyze: slm-jax analyze selection runs/selective")
    read = [read_run(run) for run in runs]
    names = [run.name for run in read]
    if len(set(names)) < len(names):
        raise UserError(
            "selection-repeated-run",
            f"two runs are called {max(names, key=names.count)!r}: give their folders different names",
        )
    config_lib.print_unused()
    record: dict[str, Any] = of_runs(read, downstream) | {"downstream": downstream}
    folder = Path(output or f"{runs[0]}/selection")
    if corpus is None and (dynamics or selection or references):
        raise UserError(
            "selection-needs-corpus", "dynamics, selection and references need tokens: set analyze_selection.corpus"
        )

    if corpus is not None:
        phases = [phase for run in read if (phase := run.selective_phase())]
        if selection is None:
            selected_by = selection_of(phases[0]["selection"]) if phases else Selection()
            if not isinstance(selected_by, Selection):
                raise UserError(
                    "selection-combined",
                    "the first run that selects combines several selections: name one of them with "
                    "analyze_selection.selection",
                )
            selection = selected_by
        selector = Selector(selection, batch_size or (phases[0]["batch_size"] if phases else FALLBACK_ROWS), seed)
        tokens = read_rows(corpus, rows)
        classes = read_classes(dynamics, tokens) if dynamics else None

        def missing(**changes: Any) -> UserError | None:
            try:
                for column in dataclasses.replace(selector.selection, **changes).columns():
                    tokens.table.read(np.zeros(1, np.int64), [column])
            except UserError as error:
                return error
            return None

        wanted: dict[str, dict[str, str]] = {"analyze_selection.selection": {}}
        wanted |= {f"analyze_selection.references = {name!r}": {"reference": name} for name in references}
        wanted |= {f"analyze_selection.scores = {name!r}": {"score": name} for name in scores or ()}
        for setting, changes in wanted.items():
            if problem := missing(**changes):
                raise UserError(problem.code, f"{setting}: {problem}")
        compared = [name for name in COMPARED if not missing(score=name)] if scores is None else scores

        losses = {}
        for run in read:  # last, because scoring may take long
            try:
                columns = score_columns(tokens.table, run.path, steps, score_missing)
            except UserError as error:
                if not losses or score_missing:
                    raise
                print(f"analyze selection: {run.name} is compared by its metrics only: {error}")
                continue
            losses[run.name] = read_losses(tokens, columns)

    def analyze() -> dict[str, Any]:
        if corpus is not None:
            others = tuple(dict.fromkeys([*selector.selection.references, *references])) if references else ()
            curves = {name: tuple(record["runs"][name]["downstream"].values()) for name in losses}
            record["tokens"] = of_tokens(tokens, losses, selector, curves, classes, compared, others)
        found = tables.plain(record)
        figures = draw(folder, found)
        write_text(folder / "summary.md", summary(found, figures))
        write_json(folder / "selection.json", found)
        print(f"analyze selection: {len(read)} runs, {len(figures)} figures; see {folder}/summary.md")
        return found

    return processes.on_first(analyze)


# ---- Figures and summary, from what selection.json holds


def draw(folder: Path, record: dict[str, Any]) -> list[str]:
    """Draws the figures whose numbers are there; returns their names."""
    tokens, drawn = record.get("tokens"), []
    if any(len(about["training"]["selected_loss"]["steps"]) > 1 for about in record["runs"].values()):
        with plots.files(folder, "training", 3, width=4.6) as panels:
            for number, (name, about) in enumerate(record["runs"].items()):
                curves = [*(about["training"][f"{part}_loss"] for part in PARTS), about["downstream"]]
                for axes, curve in zip(panels, curves, strict=True):
                    if curve["steps"]:
                        plots.line(axes, curve["steps"], _array(curve["values"]), name, number)
            for axes, title in zip(panels, ("selected tokens", "unselected tokens", record["downstream"]), strict=True):
                axes.set(title=title, xlabel="step")
            panels[0].set_ylabel("nats per token")
            plots.legend(panels[2])
        drawn.append("training")

    # ---- Of the corpus' tokens: the same ones under all runs, and those of each checkpoint under the others
    if tokens:
        with plots.files(folder, "fixed_tokens", 2, width=4.8) as panels:
            for axes, part in zip(panels, PARTS, strict=True):
                for number, (name, about) in enumerate(tokens["fixed_tokens"].items()):
                    plots.line(axes, about["steps"], _array(about[part]), name, number)
                title = f"tokens that {tokens['run']} {'selects' if part == 'selected' else 'drops'}"
                axes.set(title=title, xlabel="step of the checkpoint")
            panels[0].set_ylabel("nats per token")
            plots.legend(panels[1])
        steps, perplexity = tokens["checkpoints"], np.exp(_array(tokens["loss_of_selected"]))
        with plots.files(folder, "perplexity") as (axes,):
            places = _some(steps)
            for number, place in enumerate(places):
                first = places[0] if steps[0] == 0 else 0
                plots.line(axes, steps[first:], perplexity[place, first:], f"step {steps[place]}", number)
            axes.set(xlabel="step of the checkpoint", ylabel="perplexity")
            plots.log_if_wide(axes)
            plots.legend(axes, "selected by")
        drawn += ["fixed_tokens", "perplexity"]
    if _fits(record):
        _draw_fits(folder, record)
        drawn.append("fit")

    # ---- The downstream result by the share of tokens that trains
    if len({about["ratio"] for about in record["ratio_sweep"]}) > 1:
        with plots.files(folder, "ratio_sweep") as (axes,):
            scores = sorted(
                {about["score"] for about in record["ratio_sweep"]}, key=lambda score: (score == ALL, score)
            )
            for number, score in enumerate(scores):
                entries = [about for about in record["ratio_sweep"] if about["score"] == score]
                x, means = _array([100 * e["ratio"] for e in entries]), _array([e["mean"] for e in entries])
                spread = np.abs(_array([[e["lowest"], e["highest"]] for e in entries]).T - means)  # [2, ratios]
                plots.line(axes, x, means, score, number)
                if spread.any():
                    axes.errorbar(x, means, spread, fmt="none", capsize=3, color=plots.COLOURS[number])
            axes.set(xlabel="share of the tokens that trains, %", ylabel=record["downstream"])
            plots.legend(axes)
        drawn.append("ratio_sweep")

    # ---- Which tokens are selected, and how alike the sets are
    if tokens:
        by = tokens["shares"]
        height = 1.2 + 0.33 * max(4, *(len(groups) for groups in by.values()))
        with plots.files(folder, "shares", len(by), width=4.4, height=height) as panels:
            for axes, (name, groups) in zip(panels, by.items(), strict=True):
                shares = _array([group["share"] for group in groups]).tolist()
                plots.bars(axes, [group["name"] for group in groups], shares, tokens["selected_share"][-1])
                axes.set(title=f"by {name}", xlabel="share selected", xlim=(0, 1.12))
        drawn.append("shares")
        if families := [name for name in ("checkpoints", "scores", "references") if name in tokens["overlap"]]:
            with plots.files(folder, "overlap", len(families), width=5.2, height=4.8) as panels:
                for axes, name in zip(panels, families, strict=True):
                    about = tokens["overlap"][name]
                    plots.heat(axes, about["names"], _array(about["jaccard"]))
                    axes.set_title(f"{name}; by chance {tokens['overlap']['by_chance']:.2f}", fontsize=10.5)
            drawn.append("overlap")
    return drawn


def _array(values: Any) -> np.ndarray:
    """Numbers from JSON, with NaN for None."""
    return np.array(values, float)


def _some(steps: list[int], most: int = 6) -> list[int]:
    """Indices of up to `most` checkpoints, evenly spaced, the last included; not step 0, whose model is untrained, if
    there are others."""
    first = 1 if steps[0] == 0 and len(steps) > 2 else 0
    return sorted({round(i) for i in np.linspace(len(steps) - 1, first, min(most, len(steps) - first)).tolist()})


def _fits(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """(label, {selected, unselected}) of the runs whose own losses could be fitted, and of the tokens that each
    checkpoint selects."""
    fits = [(name, about["fits"]) for name, about in record["runs"].items()]
    fits += [(f"selected by step {each['selected_by']}", each) for each in (record.get("tokens") or {}).get("fits", ())]
    return [(label, each) for label, each in fits if any(each[part]["fit"] for part in PARTS)]


def _draw_fits(folder: Path, record: dict[str, Any]) -> None:
    """Those of the tokens that checkpoints select if there are any, else those of the tokens of training's batches."""
    of_checkpoints = [(label, each) for label, each in _fits(record) if "selected_by" in each]
    fits = of_checkpoints or _fits(record)
    if of_checkpoints:
        fits = [fits[i] for i in _some([each["selected_by"] for _, each in fits], 4)]
    with plots.files(folder, "fit", 2, width=4.8, height=4.0) as panels:
        for axes, part in zip(panels, PARTS, strict=True):
            for number, (label, each) in enumerate(fits):
                loss, fit = _array(each[part]["loss"]), each[part]["fit"]
                colour = plots.COLOURS[number % len(plots.COLOURS)]
                if fit:
                    x = np.linspace(loss.min(), loss.max(), 100)
                    line = fit["a"] * x + fit["c"]
                    quality = "" if fit["r_squared"] is None else f", R² = {fit['r_squared']:.2f}"
                    label = f"{label}: a = {fit['a']:.3g}{quality}"
                    axes.plot(x[line > 0], np.log(line[line > 0]), color=colour, linewidth=1.2)
                look = {"color": colour, "marker": plots.MARKERS[number % 6], "linestyle": "", "markersize": 5}
                axes.plot(loss, _array(each[part]["result"]), label=label, **look)
            axes.set(title=f"{part} tokens", xlabel="loss, nats per token")
            axes.invert_xaxis()
            plots.legend(axes, place="below")
        panels[0].set_ylabel(record["downstream"])


def summary(record: dict[str, Any], drawn: list[str]) -> str:
    """Everything as one Markdown page; figures by their names."""

    def figures(*names: str) -> str:
        shown = [name for name in names if name in drawn]
        return "".join(f"![{name.replace('_', ' ')}]({name}.png)\n\n{CAPTIONS[name]}\n\n" for name in shown)

    # ---- Runs
    headings = ("run", "selects by", "share", "kept", "steps", "tokens seen", "tokens trained", record["downstream"])
    names = ("score", "ratio", "kept", "steps", "tokens_seen", "tokens_trained", "last_downstream")
    runs = [(run, *(about[name] for name in names)) for run, about in record["runs"].items()]
    parts = ["# Which tokens were selected\n", tables.of_values(headings, runs).markdown()]
    parts += [figures("training", "fixed_tokens", "ratio_sweep")]
    rows = [
        (label, part, *(fit[name] for name in ("a", "c", "r_squared", "error", "points")))
        for label, each in _fits(record)
        for part in PARTS
        if (fit := each[part]["fit"])
    ]
    if rows:
        parts += ["## Result as the logarithm of a line in the loss\n"]
        parts += [tables.of_values(("of", "tokens", "a", "c", "R²", "error", "points"), rows, 4).markdown()]
        parts += ["The sign of a is fitted, not assumed.\n", figures("fit")]
    by_source = {run: about["selected_by_source"] for run, about in record["runs"].items()}
    if sources := list(dict.fromkeys(source for shares in by_source.values() for source in shares)):
        rows = [(run, *(shares.get(source) for source in sources)) for run, shares in by_source.items() if shares]
        parts += ["## Share selected in training, by source (second half)\n"]
        parts += [tables.of_values(("run", *sources), rows).markdown()]
    tokens = record.get("tokens")
    if not tokens:
        return "\n".join(part for part in parts if part)

    # ---- Tokens
    selection, steps = tokens["selection"], tokens["checkpoints"]
    parts += [
        "## Tokens that each checkpoint selects\n",
        f"{tokens['tokens']:,} tokens of {tokens['corpus']}, selected by the checkpoints of {tokens['run']}: score "
        f"{selection['score']}, share {selection['ratio']:g}, among {tokens['batch_size']} rows.\n",
    ]
    perplexity = np.exp(_array(tokens["loss_of_selected"])).tolist()
    rows = [(str(step), *row) for step, row in zip(steps, perplexity, strict=True)]
    table = tables.of_values(("selected by step", *(f"under {step}" for step in steps)), rows, 2)
    parts += ["Perplexity:\n", table.markdown(), figures("perplexity")]
    for name, groups in tokens["shares"].items():
        rows = [(group["name"], group["share"], group["tokens"]) for group in groups]
        parts += [
            f"## Share selected by {name}\n",
            tables.of_values((name, "share selected", "tokens"), rows).markdown(),
        ]
    parts += [figures("shares")]
    if noise := tokens["noise"]:
        columns = ("tokens", "noise_share", "precision", "recall")
        rows = [(name, *(about[column] for column in columns)) for name, about in noise.items()]
        parts += ["## Noise that is dropped\n", tables.of_values(("among", *columns), rows).markdown()]
        parts += ["Precision: share of the dropped tokens that is noise. Recall: share of the noise that is dropped.\n"]
    for name in ("checkpoints", "scores", "references"):
        if about := tokens["overlap"].get(name):
            rows = [(of, *row) for of, row in zip(about["names"], about["jaccard"], strict=True)]
            parts += [f"## Overlap between {name} (Jaccard; by chance {tokens['overlap']['by_chance']:.3f})\n"]
            parts += [tables.of_values(("", *about["names"]), rows).markdown()]
    return "\n".join(part for part in [*parts, figures("overlap")] if part)
