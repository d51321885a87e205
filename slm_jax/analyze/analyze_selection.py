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
from slm_jax.analyze.columns import read_losses, read_rows, score_columns
from slm_jax.analyze.runs import read_run
from slm_jax.analyze.selected_tokens import Selector, of_tokens, read_classes
from slm_jax.analyze.selection_figures import draw, summary
from slm_jax.analyze.selection_metrics import of_runs
from slm_jax.analyze.tables import plain
from slm_jax.configurable import Count, Natural, OneOf, Seed, configurable
from slm_jax.errors import UserError
from slm_jax.files import write_json, write_text
from slm_jax.score.selection import SCORES, Selection, selection_of

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
        found = plain(record)
        figures = draw(folder, found)
        write_text(folder / "summary.md", summary(found, figures))
        write_json(folder / "selection.json", found)
        print(f"analyze selection: {len(read)} runs, {len(figures)} figures; see {folder}/summary.md")
        return found

    return processes.on_first(analyze)
