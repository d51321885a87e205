"""Stage `analyze dynamics`: how the loss of each held-out token moves over the checkpoints of a run.

A line is fitted to the losses of each token, which gives it a class: its loss falls, rises, stays high or stays low.
Rho-1 (arXiv 2404.07965) section 2.1, Figures 3 and 10, App D.1. Nothing is trained.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int8, Integer

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.analyze import plots
from slm_jax.analyze.columns import Losses, Rows, named_columns, read_kept_losses, read_losses, read_rows, score_columns
from slm_jax.analyze.page import one_line, render
from slm_jax.analyze.passages import context, passages, segments, varied
from slm_jax.analyze.tables import plain
from slm_jax.configurable import Count, Natural, NotNegative, configurable
from slm_jax.data.token_text import TokenText
from slm_jax.errors import UserError
from slm_jax.files import write_array, write_json, write_text

# A class is an index into CLASSES; NO_CLASS for a token without a finite loss under every checkpoint.
CLASSES = ("H→H", "L→H", "H→L", "L→L")
HIGH, RISING, FALLING, LOW = range(4)
NO_CLASS = -1
COLOURS = ("#d55e00", "#aa4499", "#0072b2", "#009e73")  # of the classes, in all figures
MARKS = ("hh", "lh", "hl", "ll")  # the CSS classes of the page
PASSAGE_TOKENS = 400


@configurable
def analyze_dynamics(
    corpus: str | None = None,
    run: str | None = None,
    columns: str | None = None,
    steps: Sequence[Natural] | None = None,
    trace: str | None = None,
    score_missing: bool = False,
    rows: Count | None = None,
    rise: NotNegative = 0.2,
    fall: NotNegative = 0.2,
    high: float | None = None,
    examples: Natural = 6,
    documents: Natural = 12,
    output: str | None = None,
) -> dict[str, Any]:
    """Analyzes how the loss of each token of a held-out corpus moves over the checkpoints of a run (Rho-1 section 2.1).

    The losses are score columns of the corpus, one for each checkpoint, called <folder of the run>-<step>. A line is
    fitted to each token's losses: it falls (H→L), rises (L→H), or stays high (H→H) or low (L→L). Writes dynamics.json,
    classes.npy (the class of each token, [rows, L]: 0 to 3 in the order H→H, L→H, H→L, L→L, and -1 for none), text.html
    and figures as PNG and SVG. train.keep_checkpoints sets how many checkpoints a run keeps.

    Args:
      corpus: held-out corpus.
      run: run directory whose checkpoints to analyze; if it started from the parameters of another run, these come
        first, as step 0.
      columns: instead of a run, the columns themselves: a pattern such as causal-*, or names in the order of training
        with commas between.
      steps: which checkpoints of the run; all by default.
      trace: instead of columns, the losses that an evaluator of this name (HeldOut.keep_tokens) stored while the run
        trained, on the corpus it names.
      score_missing: score the checkpoints that have no column yet, as the stage `score` does and with its settings
        (score.batch_size, score.dtype, score.mesh).
      rows: how many of the first rows to analyze; all by default.
      rise: a token whose line rises by more than this many nats is L→H.
      fall: a token whose line falls by more than this many nats is H→L.
      high: of the others, H→H if their last loss is above this; by default the mean of all tokens' last losses.
      examples: how many of the most fluctuating tokens of H→H and of L→L to draw.
      documents: how many documents text.html shows.
      output: folder for the results; <run, else corpus>/dynamics by default.
    """
    config_lib.print_unused()

    # ---- Losses: what the run stored, or score columns
    if trace is not None:
        if run is None or columns is not None or corpus is not None:
            raise UserError(
                "dynamics-trace-of-run", "analyze_dynamics.trace needs analyze_dynamics.run, which names the corpus"
            )
        corpus, losses = read_kept_losses(run, trace)
        read = read_rows(corpus, losses.values.shape[1])
        if losses.values.shape[1:] != read.valid.shape or not (np.isfinite(losses.values[0]) == read.valid).all():
            raise UserError(
                "dynamics-other-corpus",
                f"corpus {corpus} is not the one on which {run} stored its token losses: score the checkpoints instead",
            )
    else:
        if corpus is None:
            raise UserError("dynamics-needs-corpus", "set analyze_dynamics.corpus, the corpus whose tokens to analyze")
        if (run is None) == (columns is None):
            raise UserError(
                "dynamics-run-or-columns",
                "set analyze_dynamics.run or analyze_dynamics.columns, one of the two: --run=runs/causal --corpus=...",
            )
        read = read_rows(corpus, rows)
        if columns is not None:
            losses = read_losses(read, named_columns(read.table, columns))
        else:
            assert run is not None
            losses = read_losses(read, score_columns(read.table, run, steps, score_missing))
    folder = Path(output or f"{run or corpus}/dynamics")
    if "://" in str(output or run or corpus):
        raise UserError(
            "output-not-local", f"analyze_dynamics.output: results need a local folder, and {folder} is not"
        )
    if len(losses.names) < 2:
        raise UserError(
            "dynamics-one-checkpoint",
            f"{losses.names[0]} is the only checkpoint: a line needs two, so train with more checkpoints",
        )

    def analyze() -> dict[str, Any]:
        values = losses.values[:, read.valid]  # [C, N, L] -> [C, T]
        lines = fit_lines(values)
        kinds, divides = classify(values, lines, rise, fall, high)
        if (kinds == NO_CLASS).all():
            raise UserError(
                "dynamics-no-finite-loss",
                f"no token of {read.table.path} has a finite loss under every checkpoint: score it again",
            )
        checkpoints = [{"name": name, "step": step} for name, step in zip(losses.names, losses.steps, strict=True)]
        about: dict[str, Any] = {"corpus": read.table.path, "fingerprint": read.table.fingerprint}
        about |= {"rows": len(read.valid), "run": run}
        about |= {"rise": rise, "fall": fall, "high": divides, "checkpoints": checkpoints}
        record = plain(about | _measured(read, values, lines, kinds, examples))
        class_of = np.full(read.valid.shape, NO_CLASS, np.int8)  # [T] -> [N, L]
        class_of[read.valid] = kinds
        write_array(folder / "classes.npy", class_of)
        _draw(folder, record)
        write_text(folder / "text.html", _page(record, read, losses, lines, class_of, documents))
        write_json(folder / "dynamics.json", record)  # last: it says that the rest is there
        return record

    record = processes.on_first(analyze)
    if processes.first():
        shares = ", ".join(f"{name} {about['share']:.1%}" for name, about in record["classes"].items())
        print(f"analyze dynamics: {record['tokens']:,} tokens, {len(losses.names)} checkpoints: {shares}; see {folder}")
    return record


def _measured(read: Rows, values: np.ndarray, lines: "Lines", kinds: np.ndarray, examples: int) -> dict[str, Any]:
    """What dynamics.json says of the valid tokens, with losses [C, T], lines and classes [T]."""
    # ---- Classes of all tokens, and of each source's
    means, total, classes = class_means(values, kinds), int((kinds != NO_CLASS).sum()), {}
    for kind, name in enumerate(CLASSES):
        deviation, count = np.sqrt(lines.variance[kinds == kind]), int((kinds == kind).sum())
        median, high_tail = np.quantile(deviation, (0.5, 0.9)) if count else (np.nan, np.nan)
        about: dict[str, Any] = {"tokens": count, "share": count / total, "mean_loss": means[kind]}
        classes[name] = about | {"deviation_median": median, "deviation_90th": high_tail}
    by_source = {}
    for number, source in enumerate(read.table.source_names):
        of_source = class_counts(kinds[read.source_ids[read.valid] == number])
        if count := sum(of_source):
            shares = {name: tokens / count for name, tokens in zip(CLASSES, of_source, strict=True)}
            by_source[source] = {"tokens": count, **shares}

    # ---- The tokens of a class that fluctuate most, with the text around them (Figures 3b, 3c)
    fluctuating, reader, places = {}, TokenText(read.table.vocabulary()), np.argwhere(read.valid)
    for kind in (HIGH, LOW):
        found = fluctuating[CLASSES[kind]] = []
        ids = read.tokens[read.valid]
        for token in most_fluctuating(kinds, lines.variance, kind, ids, examples).tolist():
            row, place = places[token].tolist()
            before, own, after = context(read, reader, row, place)
            about = {"row": row, "place": place, "before": before, "token": own, "after": after}
            found.append({**about, "losses": values[:, token], "deviation": np.sqrt(lines.variance[token])})
    return {
        "tokens": total,
        "without_class": len(kinds) - total,
        "classes": classes,
        "by_source": by_source,
        "fluctuating": fluctuating,
    }


def _draw(folder: Path, record: dict[str, Any]) -> None:
    steps = [about["step"] for about in record["checkpoints"]]
    # Named columns come in any order: where the steps do not ascend, the x axis counts checkpoints.
    ascending = all(step < following for step, following in itertools.pairwise(steps))
    x, label = (steps, "step of the checkpoint") if ascending else (list(range(len(steps))), "checkpoint")
    with plots.files(folder, "classes") as (axes,):
        for kind, (name, about) in enumerate(record["classes"].items()):
            if about["tokens"]:
                plots.line(axes, x, about["mean_loss"], f"{name}  {about['share']:.0%}", kind, COLOURS[kind])
        axes.set(xlabel=label, ylabel="mean loss, nats per token")
        plots.legend(axes)

    # ---- Shares of the classes in each source
    sources = record["by_source"]
    if len(sources) > 1:
        with plots.files(folder, "classes_by_source", width=max(5.4, 1.0 * len(sources))) as (axes,):
            shares = np.array([[about[name] for name in CLASSES] for about in sources.values()])
            plots.stacked(axes, list(sources), CLASSES, shares, COLOURS)
            axes.set(xlabel="share of the source's tokens")

    # ---- The tokens that fluctuate most, each named by itself and the text before it
    for name, examples in record["fluctuating"].items():
        if not examples:
            continue
        with plots.files(folder, f"fluctuating_{MARKS[CLASSES.index(name)]}", height=4.6) as (axes,):
            for number, about in enumerate(examples):
                before, token = one_line(about["before"]), one_line(about["token"])
                before = f"…{before[-16:]}" if len(before) > 16 else before
                plots.line(axes, x, about["losses"], f"{before}[{token}]", number)
            axes.set(xlabel=label, ylabel="loss, nats", title=f"{name}: the tokens that fluctuate most")
            plots.legend(axes, place="below", columns=2)


def _page(
    record: dict[str, Any], rows: Rows, losses: Losses, lines: "Lines", classes: np.ndarray, documents: int
) -> str:
    """Text coloured by class (Figure 10)."""
    number = np.cumsum(rows.valid).reshape(rows.valid.shape) - 1  # [N, L]: the index of a token in arrays [T]

    def style(row: int, place: int) -> tuple[str, str]:
        kind = int(classes[row, place])
        if kind == NO_CLASS:
            return "none", ""
        mean, change = lines.mean[number[row, place]], lines.change[number[row, place]]
        first, last = losses.values[0, row, place], losses.values[-1, row, place]
        note = f"{CLASSES[kind]}: line {mean - change / 2:.2f} to {mean + change / 2:.2f}, "
        return MARKS[kind], note + f"loss {first:.2f} first, {last:.2f} last"

    kinds = [
        {"name": name, "mark": mark, "share": f"{record['classes'][name]['share']:.0%}"}
        for name, mark in zip(CLASSES, MARKS, strict=True)
    ]
    return render(
        "dynamics.html.j2",
        title=record["run"] or record["corpus"],
        checkpoints=len(losses.names),
        first_step=losses.steps[0],
        last_step=losses.steps[-1],
        **{name: f"{record[name]:g}" for name in ("rise", "fall")},
        high=f"{record['high']:.2f}",
        kinds=kinds,
        passages=list(passages(rows, varied(segments(rows), documents), style, PASSAGE_TOKENS)),
    )


# ---- Lines and classes: pure functions of losses [C, T], C checkpoints in the order of training, T tokens. No class
# ---- depends on the order of the tokens.


class Lines(NamedTuple):
    """The least-squares line through each token's losses, in nats; all arrays are [T].

    mean: of the losses, where the line is in the middle. change: ΔL = L_end - L_start, the line at the last checkpoint
    less the line at the first. variance: the mean squared distance of the losses from the line.
    """

    mean: Float[np.ndarray, "T"]
    change: Float[np.ndarray, "T"]
    variance: Float[np.ndarray, "T"]


def fit_lines(losses: Float[np.ndarray, "C T"]) -> Lines:
    """Fits l = a x + b to each token, with x = 0, ..., C - 1: checkpoints count as evenly spaced, as in the paper.

    NaN where one of a token's losses is not finite. At least two checkpoints.
    """
    count = len(losses)
    assert count >= 2, "a line needs two checkpoints"
    known = np.isfinite(losses).all(axis=0)
    mean, slope, variance = (np.where(known, 0.0, np.nan) for _ in range(3))
    centred = np.arange(count) - (count - 1) / 2

    def checkpoints() -> Iterator[tuple[float, np.ndarray]]:
        # One after the other, so that the sums of a token do not depend on its place in the array.
        for x, loss in zip(centred.tolist(), losses, strict=True):
            yield x, np.where(known, loss, 0.0).astype(np.float64)

    for x, loss in checkpoints():
        mean += loss / count
        slope += loss * (x / np.sum(centred**2))
    for x, loss in checkpoints():
        variance += (loss - (mean + slope * x)) ** 2 / count
    return Lines(mean, slope * (count - 1), variance)


def classify(
    losses: Float[np.ndarray, "C T"],
    lines: Lines,
    rise: float = 0.2,
    fall: float = 0.2,
    high: float | None = None,
) -> tuple[Int8[np.ndarray, "T"], float]:
    """The class of each token (App D.1), and the loss that divides high from low.

    Args:
      losses: of the tokens.
      lines: of the same losses.
      rise: a token whose line rises by more than this is L→H.
      fall: one whose line falls by more than this is H→L.
      high: one that does neither is H→H if its last loss is above this, else L→L. None is the mean of the last losses
        of all tokens that have a class.
    """
    change, last = lines.change, losses[-1]
    known = np.isfinite(change)
    # The exact sum: the mean does not depend on the order of the tokens.
    mean = math.fsum(last[known].tolist()) / known.sum() if known.any() else math.nan
    divides = float(mean if high is None else high)
    with np.errstate(invalid="ignore"):
        classes = np.where(last > divides, HIGH, LOW)
        classes[change > rise] = RISING
        classes[change < -fall] = FALLING
    return np.where(known, classes, NO_CLASS).astype(np.int8), divides


def class_counts(classes: Integer[np.ndarray, "T"]) -> list[int]:
    """How many tokens are of each class."""
    return np.bincount(classes[classes >= 0], minlength=len(CLASSES)).tolist()


def class_means(losses: Float[np.ndarray, "C T"], classes: Integer[np.ndarray, "T"]) -> Float[np.ndarray, "K C"]:
    """The mean loss of each class under each checkpoint (Figure 3a); NaN for a class without tokens."""
    means = np.full((len(CLASSES), len(losses)), np.nan)
    for kind in np.unique(classes[classes >= 0]):
        means[kind] = losses[:, classes == kind].mean(axis=1, dtype=np.float64)
    return means


def most_fluctuating(
    classes: Integer[np.ndarray, "T"],
    variance: Float[np.ndarray, "T"],
    kind: int,
    ids: Integer[np.ndarray, "T"],
    count: int,
) -> Integer[np.ndarray, "E"]:
    """Up to `count` tokens of a class with the highest variance around their line, highest first, no vocabulary id
    (`ids`) twice."""
    mine = np.flatnonzero(classes == kind)
    mine = mine[np.argsort(-variance[mine], kind="stable")]
    _, first = np.unique(ids[mine], return_index=True)
    return mine[np.sort(first)][:count]
