"""Stage `analyze selection`: what runs selected, and what it did to the losses of those tokens and of the others.

Rho-1 (arXiv 2404.07965) Figures 6 to 9. Nothing is trained.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import numpy as np

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.analyze.columns import Losses, Rows, read_losses, read_rows, score_columns
from slm_jax.analyze.records import RunRecord, read_records
from slm_jax.analyze.selection_figures import draw, summary
from slm_jax.analyze.selection_runs import of_runs
from slm_jax.analyze.selection_tokens import Choices, of_tokens, read_classes
from slm_jax.analyze.tables import plain
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.files import write_json, write_text
from slm_jax.score.selection import SCORES, Selection, selection_of

COMPARED = ("excess", "loss", "reference", "random")  # scores
FALLBACK_ROWS = 16  # of a batch, where no run tells


@gin.configurable
def analyze_selection(
    runs: Sequence[str] = (),
    downstream: str = "target/loss",
    corpus: str | None = None,
    steps: Sequence[int] | None = None,
    score_missing: bool = False,
    rows: int | None = None,
    selection: Selection | None = None,
    batch_size: int | None = None,
    scores: Sequence[str] | None = None,
    references: Sequence[str] = (),
    dynamics: str | None = None,
    seed: int = 0,
    output: str | None = None,
) -> dict[str, Any]:
    """Which tokens runs selected, and what became of their losses (Rho-1, Figures 6 to 9).

    `slm-jax analyze selection RUN [RUN ...]` reads metrics: losses of selected and unselected tokens and of a
    downstream set over training, the share selected by source, the downstream result by share kept, and the fit
    result = log(a loss + c). With a corpus that has a score column for each checkpoint of the first run, called
    <folder of the run>-<step>, also which tokens each checkpoint selects: their perplexity under every checkpoint, the
    share by source, frequency, position and class, overlaps, and what of the noise is left out. Further runs whose
    checkpoints have columns are compared on the same tokens. Writes selection.json, summary.md and figures as PNG and
    SVG.

    Args:
      runs: run directories; the first is the one looked at token by token.
      downstream: metric of the runs to set against the losses: <name of a HeldOut>/loss, or an accuracy.
      corpus: a corpus whose tokens to select from, best held out; without it only metrics are read.
      steps: which checkpoints of the runs; all by default.
      score_missing: score the checkpoints of all runs that have no column yet, as the stage `score` does.
      rows: how many of the first rows of the corpus to look at; all by default.
      selection: how tokens are chosen; as the first run that selects by default.
      batch_size: rows among which tokens compete; those of that run's batches by default.
      scores: kinds of score to compare under the last checkpoint; by default excess, loss, reference and random, as far
        as the corpus has their columns.
      references: names of further score columns to compare with selection.reference.
      dynamics: folder that `analyze dynamics` wrote for the corpus: shares by class.
      seed: of random selection.
      output: folder for the results; <first run>/selection by default.
    """
    records = _checked(runs, rows, batch_size, scores)
    config_lib.print_unused()
    record = of_runs(records, downstream)
    record["downstream"] = downstream
    folder = Path(output or f"{runs[0]}/selection")
    if corpus is not None:
        choices = _choices(records, selection, batch_size, seed)
        read = read_rows(corpus, rows)
        classes = read_classes(dynamics, read) if dynamics else None
        compared = _scores(read.table, choices.selection, scores, references)
        losses = _losses(read, records, steps, score_missing)  # last: it may compute much
    elif dynamics or selection or references:
        raise UserError("analyze_selection.corpus is missing: dynamics, selection and references are about its tokens")

    def analyze() -> dict[str, Any]:
        if corpus is not None:
            names = tuple(dict.fromkeys([*choices.selection.references, *references]))
            results = {name: record["runs"][name]["downstream"] for name in losses}
            curves = {name: (about["steps"], about["values"]) for name, about in results.items()}
            record["tokens"] = of_tokens(read, losses, choices, curves, classes, compared, names if references else ())
        found = plain(record)
        figures = draw(folder, found)
        write_text(folder / "summary.md", summary(found, figures))
        write_json(folder / "selection.json", found)
        print(f"analyze selection: {len(records)} runs, {len(figures)} figures; see {folder}/summary.md")
        return found

    return processes.on_first(analyze)


def _checked(
    runs: Sequence[str], rows: int | None, batch_size: int | None, scores: Sequence[str] | None
) -> list[RunRecord]:
    if not runs:
        raise UserError("analyze selection needs a run: slm-jax analyze selection runs/selective")
    for name, value in (("rows", rows), ("batch_size", batch_size)):
        if value is not None:
            config_lib.at_least(1, **{f"analyze_selection.{name}": value})
    if unknown := [score for score in scores or () if score not in SCORES]:
        raise UserError(f"analyze_selection.scores: {unknown[0]!r} is unknown: known are {', '.join(SCORES)}")
    return read_records(runs)


def _scores(
    table: Corpus, selection: Selection, scores: Sequence[str] | None, references: Sequence[str]
) -> Sequence[str]:
    """The scores to compare. Refuses what needs a column that the corpus lacks, before anything is computed."""

    def lacks(**changes: Any) -> str | None:
        try:
            for column in dataclasses.replace(selection, **changes).columns():
                table.read(np.zeros(1, np.int64), [column])
        except UserError as error:
            return str(error)
        return None

    wanted = {"analyze_selection.selection": {}}
    wanted |= {f"analyze_selection.references = {name!r}": {"reference": name} for name in references}
    wanted |= {f"analyze_selection.scores = {name!r}": {"score": name} for name in scores or ()}
    for setting, changes in wanted.items():
        if problem := lacks(**changes):
            raise UserError(f"{setting}: {problem}")
    return [name for name in COMPARED if not lacks(score=name)] if scores is None else scores


def _losses(
    read: Rows, records: Sequence[RunRecord], steps: Sequence[int] | None, score_missing: bool
) -> dict[str, Losses]:
    """The first run's losses, and those of the others that have columns."""
    losses = {}
    for record in records:
        try:
            names = score_columns(read.table, record.path, steps, score_missing)
        except UserError as error:
            if not losses or score_missing:
                raise
            print(f"analyze selection: {record.name} is compared by its metrics only: {error}")
            continue
        losses[record.name] = read_losses(read, names)
    return losses


def _choices(records: Sequence[RunRecord], selection: Selection | None, batch_size: int | None, seed: int) -> Choices:
    phases = [phase for record in records if (phase := record.selective_phase())]
    if selection is None:
        chosen = selection_of(phases[0]["selection"]) if phases else Selection()
        if not isinstance(chosen, Selection):
            raise UserError(
                "the first run that selects combines several selections: name one of them with "
                "analyze_selection.selection"
            )
        selection = chosen
    return Choices(selection, batch_size or (phases[0]["batch_size"] if phases else FALLBACK_ROWS), seed)
