"""Stage `analyze inspect`: rows of a corpus as text, each token shaded by what models make of it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gin
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.analyze import chosen
from slm_jax.analyze.inspector_page import Column, Model, Rows, inspector_page
from slm_jax.checkpoint import saved_steps
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.evaluate.predictions import predict_rows
from slm_jax.files import read_json, write_text
from slm_jax.mesh import MeshConfig
from slm_jax.models.trained_model import check_fits, load_model
from slm_jax.score.selection import COMBINE, CombinedSelection, Selection
from slm_jax.score.token_loss import predicted

ROWS = 64


class Computed(NamedTuple):
    """How losses are computed where no column holds them."""

    mesh: Mesh
    batch_size: int
    top: int


@gin.configurable
def analyze_inspect(
    corpus: str,
    runs: Sequence[str] = (),
    columns: Sequence[str] = (),
    kept: str | None = None,
    steps: Sequence[int] = (),
    selection: Selection | CombinedSelection | None = None,
    output: str = "inspect.html",
    rows: int | None = None,
    first_row: int = 0,
    predictions: int = 5,
    batch_size: int = 8,
    mesh: MeshConfig | None = None,
) -> None:
    """Writes a page on which one looks at tokens: `slm-jax analyze inspect RUN [RUN] --corpus=CORPUS`.

    The page stands alone and needs no network. It shows documents as text, shaded by loss, reference loss, excess or
    what a selection keeps, at every checkpoint, for two models side by side. Its text is that of the corpus: share it
    as you would share that.

    Args:
      corpus: whose rows are shown.
      runs: model directories. The losses of their checkpoints are computed here, with the likeliest tokens.
      columns: score columns of the corpus. Those of one run are checkpoints of one model, in the order of their steps.
      kept: a HeldOut of the runs with keep_tokens on this corpus: the losses they kept while training are shown too.
      steps: of the runs' checkpoints and kept losses, only these; by default all.
      selection: what is shown as selected, within these rows as one batch, a Selection or several CombinedSelection;
        also which
        columns hold the reference losses. By default Selection(), where the corpus has its column.
      output: the HTML file.
      rows: how many; by default 64, or as many as were kept.
      first_row: the first of them. Rows of a corpus are shuffled, so any are a sample.
      predictions: how many of the likeliest tokens are shown where losses are computed here.
      batch_size: rows computed at a time, over all devices.
      mesh: how devices share the work.
    """
    if not runs and not columns:
        raise UserError("nothing to look at: name runs behind `analyze inspect`, or score columns as columns = ('a',)")
    config_lib.at_least(0, **{"analyze_inspect.first_row": first_row, "analyze_inspect.predictions": predictions})
    if rows is not None:
        config_lib.at_least(1, **{"analyze_inspect.rows": rows})
    table = Corpus.open(corpus)
    runs = list(dict.fromkeys(os.path.normpath(run) for run in runs))
    losses_kept = {run: _kept(run, kept, table) for run in runs} if kept else {}
    wanted = _rows(table, first_row, rows, losses_kept)
    places = {run: _steps(run, losses_kept.get(run, {}), steps) for run in runs}
    shown_selection = _selection(table, selection)
    scores = table.read(wanted, _score_names(table, shown_selection))
    read = list(_from_columns(table, wanted, columns))
    devices = mesh_lib.make_mesh(mesh)
    mesh_lib.check_batch(devices, batch_size, "analyze_inspect")
    config_lib.print_unused()
    block = table.read(wanted)
    about = f"{len(wanted)} rows of {corpus} ({int((block['segment_ids'] > 0).sum()):,} tokens)"
    print(f"inspect: {about}, {', '.join([*runs, *columns])} -> {output}")

    how, measured = Computed(devices, batch_size, min(predictions, table.vocab_size)), {}
    for run, steps_of_run in places.items():
        here = {step: x[wanted] for step, x in losses_kept.get(run, {}).items()}
        measured[run] = [_column(run, step, here, table, block, how) for step in steps_of_run]
    for model, column in read:
        measured.setdefault(model, []).append(column)
    shown = _with_selection(measured, block, scores, shown_selection)
    page = inspector_page(Rows.of(table, corpus, wanted, block, shown.reference, shown_selection), shown.models)
    processes.on_first(lambda: write_text(output, page))
    print(f"inspect: done; open {output} ({len(page) / 1e6:.1f} MB)")


def _rows(table: Corpus, first: int, number: int | None, kept: dict[str, dict[int, np.ndarray]]) -> np.ndarray:
    """The rows to be shown."""
    there = min([table.num_rows, *(len(x) for steps in kept.values() for x in steps.values())])
    number = min(number or (there if kept else ROWS), there - first)
    if number < 1:
        what = "the runs kept" if kept else f"corpus {table.path} has"
        raise UserError(f"analyze_inspect.first_row is {first}, and {what} {there} rows: take a smaller one")
    return np.arange(first, first + number)


def _kept(run: str, name: str, table: Corpus) -> dict[int, np.ndarray]:
    """Step -> [rows, L] of the losses that a run kept of the first rows of this corpus; NaN where none counts."""
    path = Path(run) / "run.json"
    settings = read_json(path)["settings"] if path.exists() else {}
    evaluators = {about["name"]: about for about in settings.get("evaluators", ()) if about.get("keep_tokens")}
    if name not in evaluators:
        names = ", ".join(evaluators) or "none"
        raise UserError(f"{run} has no evaluator {name!r} that keeps tokens (it has {names}): see HeldOut.keep_tokens")
    table.expect(Corpus.open(evaluators[name]["corpus"]).fingerprint, f"what {run} kept as {name!r}")
    files = sorted((Path(run) / "token_losses" / name).glob("*.npy"), key=lambda file: int(file.stem))
    if not files:
        raise UserError(f"{run} has kept nothing as {name!r} yet: let it reach an evaluation")
    return {int(file.stem): np.load(file, allow_pickle=False) for file in files}


def _selection(table: Corpus, given: Selection | CombinedSelection | None) -> Selection | CombinedSelection | None:
    """The selection to show; none where it was not asked for and the corpus lacks its column."""
    selection = given or Selection()
    try:
        for column in selection.columns():
            table.score(column.split("/")[1])
    except UserError as missing:
        if given:
            raise
        print(f"inspect: without reference losses and selection: {missing}")
        return None
    return selection


def _score_names(table: Corpus, selection: Selection | CombinedSelection | None) -> list[str]:
    """The columns that a selection reads, and the losses of its references."""
    if selection is None:
        return []
    names = list(selection.columns())
    with contextlib.suppress(UserError):  # a selection by own loss needs no reference
        for name in (name for part in selection.parts for name in part.references):
            table.score(name)
            names.append(f"scores/{name}/loss")
    return list(dict.fromkeys(names))


def _reference(selection: Selection | CombinedSelection, scores: dict[str, np.ndarray]) -> np.ndarray | None:
    """The reference losses to show: of the first part that has them, several references combined as it says."""
    for part in selection.parts:
        names = [f"scores/{name}/loss" for name in part.references]
        if all(name in scores for name in names):
            return np.asarray(COMBINE[part.combine](np.stack([scores[name].astype(np.float32) for name in names])))
    return None


def _from_columns(table: Corpus, rows: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, Column]]:
    """(model, losses) of score columns. A column belongs to the run and step that its manifest names; one that names
    none is a model of its own."""
    for name in names:
        about = table.score(name).reference
        values = table.read(rows, [f"scores/{name}/loss"])[f"scores/{name}/loss"].astype(np.float32)
        column = Column(int(about.get("step") or 0), f"score column {name}", values)
        yield os.path.normpath(about.get("run") or name), column


def _steps(run: str, kept: dict[int, np.ndarray], wanted: Sequence[int]) -> list[int]:
    """The steps of a run to be shown: those wanted, or all it has checkpoints or kept losses of."""
    there = {*saved_steps(run), *kept}
    if unknown := sorted(set(wanted) - there):
        known = ", ".join(map(str, sorted(there)))
        raise UserError(f"analyze_inspect.steps: {run} has nothing of step {unknown[0]}: it has {known}")
    return sorted(wanted or there)


def _column(
    run: str,
    step: int,
    kept: dict[int, np.ndarray],
    table: Corpus,
    block: dict[str, np.ndarray],
    how: Computed,
) -> Column:
    """The losses of a run at one step: computed where it has a checkpoint, else as it kept them."""
    if step in kept and step not in saved_steps(run):
        return Column(step, "kept by the run while it trained", kept[step].astype(np.float32))
    model = load_model(run, how.mesh, step)
    check_fits(model.config, model.vocabulary_hash, table, f"model {run}")
    found = predict_rows(model, block["tokens"], block["segment_ids"], how.mesh, how.batch_size, how.top)
    return Column(step, "computed from the checkpoint", found.loss, found)


class Shown(NamedTuple):
    models: list[Model]
    reference: Float[np.ndarray, "N L"] | None


def _with_selection(
    measured: dict[str, list[Column]],
    block: dict[str, np.ndarray],
    scores: dict[str, np.ndarray],
    selection: Selection | CombinedSelection | None,
) -> Shown:
    """Adds what would be selected at each checkpoint; losses become NaN where a token has none."""
    has_loss = np.asarray(predicted(block["segment_ids"].astype(np.int32)))
    reference = _reference(selection, scores) if selection else None
    if reference is not None:
        reference = np.where(has_loss, reference, np.float32(np.nan))
    models = []
    for name, of_model in measured.items():
        places = []
        for column in sorted(of_model, key=lambda column: column.step):
            loss = np.where(has_loss, column.loss, np.float32(np.nan))
            kept = None
            if selection:
                columns = {name: scores[name] for name in selection.columns()}
                kept = chosen.choose(selection, loss, columns, has_loss & block["loss_mask"], batch_size=len(loss))
            places.append(column._replace(loss=loss, selected=kept))
        models.append(Model(name, places))
    return Shown(models, reference)
