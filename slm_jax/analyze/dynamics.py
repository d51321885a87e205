"""Stage `analyze dynamics`: the losses of held-out tokens over the checkpoints of a run, and the classes of tokens.

Rho-1 (arXiv 2404.07965) §2.1, Figures 3 and 10, App D.1. Nothing is trained.
"""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
import numpy as np

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.analyze import figures, text, trajectories
from slm_jax.analyze.columns import Losses, Rows, named_columns, read_losses, read_rows, read_trace, score_columns
from slm_jax.analyze.page import render
from slm_jax.analyze.tables import plain
from slm_jax.analyze.trajectories import CLASSES, HIGH, LOW, NO_CLASS, Lines
from slm_jax.errors import UserError
from slm_jax.files import write_json, write_text

COLOURS = ("#d55e00", "#aa4499", "#0072b2", "#009e73")  # of the classes, everywhere
MARKS = ("hh", "lh", "hl", "ll")  # what the page calls them
PASSAGE_TOKENS = 400


@gin.configurable
def analyze_dynamics(
    corpus: str | None = None,
    run: str | None = None,
    columns: str | None = None,
    steps: Sequence[int] | None = None,
    trace: str | None = None,
    score_missing: bool = False,
    rows: int | None = None,
    rise: float = 0.2,
    fall: float = 0.2,
    high: float | None = None,
    examples: int = 6,
    documents: int = 12,
    output: str | None = None,
) -> dict[str, Any]:
    """How the loss of each token of a held-out corpus moves over the checkpoints of a run (Rho-1 §2.1).

    The losses are score columns of the corpus, one for each checkpoint, called <folder of the run>-<step>. A line is
    fitted to each token's losses: it falls (H→L), rises (L→H), or stays high (H→H) or low (L→L). Writes dynamics.json,
    classes.npy (the class of each token, [rows, L]: 0 to 3 in the order H→H, L→H, H→L, L→L, and -1 for none), text.html
    and figures as PNG and SVG. train.keep_checkpoints says how many checkpoints a run keeps.

    Args:
      corpus: held-out corpus.
      run: run directory whose checkpoints are looked at; if it started from another run, that one's parameters stand
        first, as step 0.
      columns: in its place the columns themselves: a pattern such as causal-*, or names in the order of training with
        commas between.
      steps: which checkpoints of the run; all by default.
      trace: in place of columns, the losses that an evaluator of this name (HeldOut.keep_tokens) stored while the run
        trained, on the corpus it names.
      score_missing: score the checkpoints that have no column yet, as the stage `score` does and with its settings
        (score.batch_size, score.dtype, score.mesh).
      rows: how many of the first rows to look at; all by default.
      rise: a token whose line rises by more than this many nats is L→H.
      fall: a token whose line falls by more than this many nats is H→L.
      high: of the others, H→H if their last loss is above this; by default the mean of all tokens' last losses.
      examples: how many of the most fluctuating tokens of H→H and of L→L to draw.
      documents: how many documents text.html shows.
      output: folder for the results; <run, else corpus>/dynamics by default.
    """
    config_lib.at_least(0, **{"analyze_dynamics.examples": examples, "analyze_dynamics.documents": documents})
    if rows is not None:
        config_lib.at_least(1, **{"analyze_dynamics.rows": rows})
    config_lib.print_unused()
    read, losses = _losses(corpus, run, columns, steps, trace, score_missing, rows)
    folder = Path(output or f"{run or read.table.path}/dynamics")
    if "://" in str(output or run or read.table.path):
        raise UserError(f"analyze_dynamics.output: results are written to a local folder, not to {folder}")
    if len(losses.names) < 2:
        raise UserError(f"{losses.names[0]} is the only checkpoint: a line needs two, so train with more checkpoints")

    def analyze() -> dict[str, Any]:
        return _analyze(read, losses, folder, {"run": run, "rise": rise, "fall": fall}, high, examples, documents)

    record = processes.on_first(analyze)
    if processes.first():
        shares = ", ".join(f"{name} {about['share']:.1%}" for name, about in record["classes"].items())
        print(f"analyze dynamics: {record['tokens']:,} tokens, {len(losses.names)} checkpoints: {shares}; see {folder}")
    return record


class _Tokens(NamedTuple):
    """The valid tokens of the rows: losses [C, T], lines and classes [T]."""

    rows: Rows
    losses: Losses
    values: np.ndarray
    lines: Lines
    kinds: np.ndarray


def _analyze(
    rows: Rows,
    losses: Losses,
    folder: Path,
    about: dict[str, Any],
    high: float | None,
    examples: int,
    documents: int,
) -> dict[str, Any]:
    values = losses.values[:, rows.valid]
    lines = trajectories.fit_lines(values)
    kinds, high = trajectories.classify(values, lines, about["rise"], about["fall"], high)
    if (kinds == NO_CLASS).all():
        raise UserError(f"no token of {rows.table.path} has a finite loss under every checkpoint: score it again")
    tokens = _Tokens(rows, losses, values, lines, kinds)
    checkpoints = [{"name": name, "step": step} for name, step in zip(losses.names, losses.steps, strict=True)]
    record = {
        "corpus": rows.table.path,
        "fingerprint": rows.table.fingerprint,
        "rows": len(rows.valid),
        **about,
        "high": high,
        "checkpoints": checkpoints,
        **_findings(tokens),
        "fluctuating": {CLASSES[kind]: _examples(tokens, kind, examples) for kind in (HIGH, LOW)},
    }
    record = plain(record)
    _write(folder, record, tokens, documents)
    return record


def _losses(
    corpus: str | None,
    run: str | None,
    columns: str | None,
    steps: Sequence[int] | None,
    trace: str | None,
    score_missing: bool,
    rows: int | None,
) -> tuple[Rows, Losses]:
    if trace is not None:
        if run is None or columns is not None or corpus is not None:
            raise UserError("analyze_dynamics.trace is about a run, which names the corpus: give analyze_dynamics.run")
        corpus, losses = read_trace(run, trace)
        read = read_rows(corpus, losses.values.shape[1])
        if losses.values.shape[1:] != read.valid.shape or not (np.isfinite(losses.values[0]) == read.valid).all():
            raise UserError(f"corpus {corpus} is not what {run} traced its tokens on: score the checkpoints instead")
        return read, losses
    if corpus is None:
        raise UserError("analyze_dynamics.corpus is missing: name the corpus whose tokens to look at")
    if (run is None) == (columns is None):
        raise UserError("analyze_dynamics takes a run or columns, one of the two: --run=runs/causal --corpus=...")
    read = read_rows(corpus, rows)
    if columns is None:
        assert run is not None
        names = score_columns(read.table, run, steps, score_missing)
    else:
        names = named_columns(read.table, columns if "*" in columns else columns.split(","))
    return read, read_losses(read, names)


def _findings(tokens: _Tokens) -> dict[str, Any]:
    """What is counted of the classes, in all tokens and by source."""
    rows, _, values, lines, kinds = tokens
    counts, means = trajectories.class_counts(kinds), trajectories.class_means(values, kinds)
    total = sum(counts)
    deviation = np.sqrt(lines.variance)
    classes = {}
    for kind, name in enumerate(CLASSES):
        mine = deviation[kinds == kind]
        quantiles = np.quantile(mine, (0.5, 0.9)) if len(mine) else (np.nan, np.nan)
        classes[name] = {
            "tokens": counts[kind],
            "share": counts[kind] / total,
            "mean_loss": means[kind],
            "deviation_median": quantiles[0],
            "deviation_90th": quantiles[1],
        }
    sources = rows.source_ids[rows.valid]
    by_source = {}
    for number, source in enumerate(rows.table.source_names):
        of_source = trajectories.class_counts(kinds[sources == number])
        if sum(of_source):
            shares = {name: count / sum(of_source) for name, count in zip(CLASSES, of_source, strict=True)}
            by_source[source] = {"tokens": sum(of_source), **shares}
    return {"tokens": total, "without_class": len(kinds) - total, "classes": classes, "by_source": by_source}


def _examples(tokens: _Tokens, kind: int, count: int) -> list[dict[str, Any]]:
    """The tokens of a class that fluctuate most, with the text around them and their losses (Figures 3b, 3c)."""
    rows, _, values, lines, kinds = tokens
    vocabulary, places = rows.table.vocabulary(), np.argwhere(rows.valid)
    found = []
    for token in trajectories.most_fluctuating(kinds, lines.variance, kind, rows.tokens[rows.valid], count):
        row, place = places[token].tolist()
        before, own, behind = text.context(rows, vocabulary, row, place)
        about = {"row": row, "place": place, "before": before, "token": own, "behind": behind}
        found.append({**about, "losses": values[:, token], "deviation": np.sqrt(lines.variance[token])})
    return found


def _write(folder: Path, record: dict[str, Any], tokens: _Tokens, documents: int) -> None:
    """Everything into one folder, dynamics.json last."""
    classes = np.full(tokens.rows.valid.shape, NO_CLASS, np.int8)
    classes[tokens.rows.valid] = tokens.kinds
    buffer = io.BytesIO()
    np.save(buffer, classes)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "classes.npy.partial"
    partial.write_bytes(buffer.getvalue())
    partial.replace(folder / "classes.npy")
    _draw(folder, record)
    _write_text(folder / "text.html", record, tokens, classes, documents)
    write_json(folder / "dynamics.json", record)


def _draw(folder: Path, record: dict[str, Any]) -> None:
    steps = [about["step"] for about in record["checkpoints"]]
    ascending = all(step < following for step, following in itertools.pairwise(steps))
    x, label = (steps, "step of the checkpoint") if ascending else (list(range(len(steps))), "checkpoint")
    with figures.drawn(folder, "classes") as (axes,):
        for kind, (name, about) in enumerate(record["classes"].items()):
            if about["tokens"]:
                figures.line(axes, x, about["mean_loss"], f"{name}  {about['share']:.0%}", kind, COLOURS[kind])
        axes.set(xlabel=label, ylabel="mean loss, nats per token")
        figures.legend(axes)
    sources = record["by_source"]
    if len(sources) > 1:
        with figures.drawn(folder, "classes_by_source", width=max(5.4, 1.0 * len(sources))) as (axes,):
            shares = np.array([[about[name] for name in CLASSES] for about in sources.values()])
            figures.stacked(axes, list(sources), CLASSES, shares, COLOURS)
            axes.set(xlabel="share of the source's tokens")
    for name, examples in record["fluctuating"].items():
        if not examples:
            continue
        with figures.drawn(folder, f"fluctuating_{MARKS[CLASSES.index(name)]}", height=4.6) as (axes,):
            for number, about in enumerate(examples):
                before, token = text.one_line(about["before"]), text.one_line(about["token"])
                before = f"…{before[-16:]}" if len(before) > 16 else before
                figures.line(axes, x, about["losses"], f"{before}[{token}]", number)
            axes.set(xlabel=label, ylabel="loss, nats", title=f"{name}: the tokens that fluctuate most")
            figures.legend(axes, below=True, columns=2)


def _write_text(path: Path, record: dict[str, Any], tokens: _Tokens, classes: np.ndarray, documents: int) -> None:
    """Text coloured by class (Figure 10)."""
    rows, losses, _, lines, _ = tokens
    number = np.cumsum(rows.valid).reshape(rows.valid.shape) - 1  # of each token among those of the lines

    def style(row: int, place: int) -> tuple[str, str]:
        kind = int(classes[row, place])
        if kind == NO_CLASS:
            return "none", ""
        mean, change = lines.mean[number[row, place]], lines.change[number[row, place]]
        first, last = losses.values[0, row, place], losses.values[-1, row, place]
        note = f"{CLASSES[kind]}: line {mean - change / 2:.2f} to {mean + change / 2:.2f}, "
        return MARKS[kind], note + f"loss {first:.2f} first, {last:.2f} last"

    chosen = text.varied(text.segments(rows), documents)
    values = {
        "title": record["run"] or record["corpus"],
        "checkpoints": len(losses.names),
        "first_step": losses.steps[0],
        "last_step": losses.steps[-1],
        "rise": f"{record['rise']:g}",
        "fall": f"{record['fall']:g}",
        "high": f"{record['high']:.2f}",
        "kinds": [
            {"name": name, "mark": mark, "share": f"{record['classes'][name]['share']:.0%}"}
            for name, mark in zip(CLASSES, MARKS, strict=True)
        ],
        "passages": list(text.passages(rows, rows.table.vocabulary(), chosen, style, PASSAGE_TOKENS)),
    }
    write_text(path, render("dynamics.html.j2", **values))
