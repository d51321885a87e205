"""Stage `analyze inspect`: rows of a corpus as text, each token shaded by what models predict of it."""

import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Integer

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.analyze.columns import read_columns, read_kept_losses
from slm_jax.analyze.inspector_page import Column, Model, Predictions, Rows, inspector_page
from slm_jax.analyze.selected_tokens import reference_losses, select
from slm_jax.checkpoint import saved_steps
from slm_jax.configurable import Count, Natural, configurable
from slm_jax.data.batches import Batch, make_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.scores import ScoreName
from slm_jax.errors import UserError
from slm_jax.files import write_text
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import TrainedModel, check_fits, load_model
from slm_jax.score.selection import CombinedSelection, Selection
from slm_jax.score.token_loss import CHUNK_LOGITS, from_predictors, predicted, token_loss

ROWS = 64


@configurable
def analyze_inspect(
    corpus: str,
    runs: Sequence[str] = (),
    columns: Sequence[str] = (),
    kept: str | None = None,
    steps: Sequence[Natural] = (),
    selection: Selection | CombinedSelection | None = None,
    output: str = "inspect.html",
    rows: Count | None = None,
    first_row: Natural = 0,
    predictions: Natural = 5,
    batch_size: Count = 8,
    mesh: MeshConfig | None = None,
) -> None:
    """Writes a page on which to look at tokens: `slm-jax analyze inspect RUN [RUN] --corpus=CORPUS`.

    The page needs no other file and no network. It shows documents as text, shaded by loss, reference loss, excess loss
    or what a selection keeps, at every checkpoint, for two models side by side. It contains the text of the corpus:
    share it only as you would share that.

    Args:
      corpus: whose rows are shown.
      runs: model directories. The losses of their checkpoints are computed here, with the likeliest tokens.
      columns: score columns of the corpus. Those of one run are checkpoints of one model, in the order of their steps.
      kept: a HeldOut of the runs with keep_tokens on this corpus: the losses it kept during training are shown too.
      steps: only these steps of the runs' checkpoints and kept losses; all by default.
      selection: what is shown as selected, within these rows as one batch: a Selection or a CombinedSelection. It also
        names the reference columns. By default Selection(), where the corpus has its column.
      output: the HTML file.
      rows: how many; by default 64, or as many as were kept.
      first_row: the first of them. Rows of a corpus are shuffled, so any are a sample.
      predictions: how many of the likeliest tokens are shown where losses are computed here.
      batch_size: rows computed at a time, over all devices.
      mesh: how devices share the work.
    """
    if not runs and not columns:
        raise UserError(
            "inspect-nothing",
            "nothing to look at: name runs after `analyze inspect`, or score columns as columns=('a',)",
        )
    table = Corpus.open(corpus)
    runs = list(dict.fromkeys(os.path.normpath(run) for run in runs))

    # ---- Which rows and steps
    stored, places = _steps_of(runs, kept, steps, table)
    there = min([table.num_rows, *(len(loss) for steps_of_run in stored.values() for loss in steps_of_run.values())])
    count = min(rows or (there if kept else ROWS), there - first_row)
    if count < 1:
        what = "the runs kept" if kept else f"corpus {table.path} has"
        raise UserError(
            "inspect-first-row",
            f"analyze_inspect.first_row is {first_row}, and {what} {there} rows: choose a smaller one",
        )
    wanted = np.arange(first_row, first_row + count)

    # ---- Reference losses and score columns
    shown_selection, scores = selection or Selection(), {}
    try:
        scores = read_columns(table, wanted, shown_selection)
    except UserError as missing:
        if selection:
            raise
        print(f"inspect: without reference losses and selection: {missing}")
        shown_selection = None
    models: dict[str, list[Column]] = {run: [] for run in runs}
    for name in columns:
        # A column belongs to the run and step in its manifest; one without them is a model by itself.
        about = table.score(name).reference
        values = table.read(wanted, [str(ScoreName(name))])[str(ScoreName(name))].astype(np.float32)
        column = Column(int(about.get("step") or 0), f"score column {name}", values)
        models.setdefault(os.path.normpath(about.get("run") or name), []).append(column)
    devices = mesh_lib.make_mesh(mesh)
    mesh_lib.check_batch(devices, batch_size, "analyze_inspect")
    config_lib.print_unused()
    block = table.read(wanted)
    tokens, segment_ids = block["tokens"], block["segment_ids"]
    about = f"{len(wanted)} rows of {corpus} ({int((segment_ids > 0).sum()):,} tokens)"
    print(f"inspect: {about}, {', '.join([*runs, *columns])} -> {output}")

    # ---- Losses at every step: computed where the run has a checkpoint, else as it kept them
    for run, of_run in places.items():
        for step in of_run:
            if step not in saved_steps(run):
                models[run].append(Column(step, "kept by the run during training", stored[run][step][wanted]))
                continue
            model = load_model(run, devices, step)
            check_fits(model.config, model.vocabulary_hash, table, f"model {run}")
            found = predict_rows(model, tokens, segment_ids, devices, batch_size, min(predictions, table.vocab_size))
            models[run].append(Column(step, "computed from the checkpoint", found.loss, found))

    # ---- What each of them would select; losses become NaN where a token has none
    has_loss = np.asarray(predicted(segment_ids.astype(np.int32)))
    shown = []
    for name, of_model in models.items():
        at_steps = []
        for column in sorted(of_model, key=lambda column: column.step):
            loss = np.where(has_loss, column.loss, np.nan).astype(np.float32)
            valid, selected = has_loss & block["loss_mask"], None
            if shown_selection:
                selected = select(shown_selection, loss, scores, valid, batch_size=len(loss))
            at_steps.append(column._replace(loss=loss, selected=selected))
        shown.append(Model(name, at_steps))
    reference = reference_losses(shown_selection, scores) if shown_selection else None
    if reference is not None:
        reference = np.where(has_loss, reference, np.float32(np.nan))
    page = inspector_page(Rows.of(table, corpus, wanted, block, reference, shown_selection), shown)
    processes.on_first(lambda: write_text(output, page))
    print(f"inspect: done; open {output} ({len(page) / 1e6:.1f} MB)")


def _steps_of(
    runs: Sequence[str], kept: str | None, steps: Sequence[int], table: Corpus
) -> tuple[dict[str, dict[int, np.ndarray]], dict[str, list[int]]]:
    """For each run the losses that it kept, by step; and the steps to show: those wanted, or all of which it has
    checkpoints or kept losses."""
    stored: dict[str, dict[int, np.ndarray]] = {}  # run -> step -> losses [R, L] of the first rows
    if kept:
        for run in runs:
            of, losses = read_kept_losses(run, kept)
            table.expect(Corpus.open(of).fingerprint, f"what {run} kept as {kept!r}")
            stored[run] = dict(zip(losses.steps, losses.values, strict=True))
    places = {}
    for run in runs:
        known = {*saved_steps(run), *stored.get(run, {})}
        if unknown := sorted(set(steps) - known):
            raise UserError(
                "inspect-unknown-step",
                f"analyze_inspect.steps: {run} has nothing of step {unknown[0]}: it has "
                f"{', '.join(map(str, sorted(known)))}",
            )
        places[run] = sorted(steps or known)
    return stored, places


# ---- Predictions


def predict_rows(
    model: TrainedModel,
    tokens: Integer[np.ndarray, "N L"],
    segment_ids: Integer[np.ndarray, "N L"],
    mesh: Mesh,
    batch_size: int,
    top: int,
) -> Predictions:
    """Losses and the `top` most likely tokens at every position, `batch_size` rows at a time on the mesh."""
    with progress(len(tokens), 0, f"step {model.step}", "row") as bar:
        found = mesh_lib.map_rows(
            lambda batch: _predict(model.params, model.config, batch, top),
            lambda rows: make_batch(tokens[rows], segment_ids[rows]),
            *(len(tokens), batch_size, mesh),
            done=bar.update,
        )
    return Predictions(*found)


@functools.partial(jax.jit, static_argnames=("model", "top"))  # checkpoints of a model share the compiled program
def _predict(params: Params, model: ModelConfig, batch: Batch, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss [B, L], the likeliest tokens and their probabilities [B, L, K] at each token."""
    hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)
    head = forward.head_matrix(params, model)
    loss = token_loss(hidden, head, batch.tokens, batch.segment_ids, model.vocab_size)
    batch_size, length, width = hidden.shape
    if not top:
        return loss, jnp.zeros((batch_size, length, 0), jnp.int32), jnp.zeros((batch_size, length, 0))

    # ---- A few positions of all rows at a time, so that a device never holds more than CHUNK_LOGITS logits.
    rows = max(1, batch_size // mesh_lib.num_shards())
    chunk = min(length, max(1, CHUNK_LOGITS // (rows * model.padded_vocab_size)))
    padded = jnp.pad(hidden, ((0, 0), (0, -length % chunk), (0, 0)))

    def likeliest(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = forward.logits(params, model, part)
        values, ids = jax.lax.top_k(logits, top)
        return ids, jnp.exp(values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    parts = padded.reshape(batch_size, -1, chunk, width).swapaxes(0, 1)  # [B, L, D] -> [L / C, B, C, D]
    found = jax.lax.map(likeliest, parts)
    # [L / C, B, C, K] -> [B, L, K]
    ids, probabilities = (x.swapaxes(0, 1).reshape(batch_size, -1, top)[:, :length] for x in found)
    return loss, from_predictors(ids), from_predictors(probabilities)
