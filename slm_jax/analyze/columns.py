"""Per-token losses over the checkpoints of a run: score columns of a corpus, one for each checkpoint.

The column of a checkpoint is called <name of the run's folder>-<step>. The stage `score` writes it, or an analysis that
may score what is missing; nothing is trained.
"""

import contextlib
import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.checkpoint import read_about, saved_steps
from slm_jax.data.corpus import Corpus
from slm_jax.data.scores import ScoreName
from slm_jax.errors import UserError
from slm_jax.models.trained_model import load_model
from slm_jax.run_directory import RunDirectory
from slm_jax.score.kept_losses import kept_column
from slm_jax.score.score_corpus import score
from slm_jax.score.selection import CombinedSelection, Selection
from slm_jax.score.token_loss import predicted


class Rows(NamedTuple):
    """The first rows of a corpus, [N, L] each, and which of their tokens have a loss that counts."""

    table: Corpus
    tokens: np.ndarray
    segment_ids: np.ndarray
    source_ids: np.ndarray
    valid: Bool[np.ndarray, "N L"]


class Losses(NamedTuple):
    """Losses of the tokens of a corpus under checkpoints, in the order of training.

    names: of the columns. steps: of the checkpoints. values: nats, NaN where a token has no loss.
    """

    names: list[str]
    steps: list[int]
    values: Float[np.ndarray, "C N L"]


def read_rows(corpus: str, rows: int | None) -> Rows:
    """Opens a corpus and reads its first rows, or all.

    Raises:
      UserError: `corpus-without-losses`.
    """
    table = Corpus.open(corpus)
    columns = table.read(np.arange(table.num_rows if rows is None else min(rows, table.num_rows)))
    segment_ids = columns["segment_ids"].astype(np.int32)
    valid = columns["loss_mask"] & np.asarray(predicted(jnp.asarray(segment_ids)))
    if not valid.any():
        raise UserError(
            "corpus-without-losses", f"no token of corpus {corpus} has a loss: name a corpus that holds text"
        )
    return Rows(table, columns["tokens"].astype(np.int32), segment_ids, columns["source_ids"].astype(np.int32), valid)


def read_columns(
    table: Corpus, rows: np.ndarray, selection: Selection | CombinedSelection
) -> dict[str, Float[np.ndarray, "N L"]]:
    """The columns that a selection reads, and the losses of its references where the corpus has them, float32.

    Raises:
      UserError: the corpus lacks a column that the selection reads.
    """
    names = list(selection.columns())
    with contextlib.suppress(UserError):  # a selection by its own loss needs no reference
        for name in (name for part in selection.parts for name in part.references):
            table.score(name)
            names.append(str(ScoreName(name)))
    names = list(dict.fromkeys(names))
    return {name: column.astype(np.float32) for name, column in (table.read(rows, names) if names else {}).items()}


# ---- The columns of a run's checkpoints


def checkpoint_columns(run: str, steps: Sequence[int] | None) -> list[tuple[str, str, int]]:
    """(column, run, step of that run) of each checkpoint, in the order of training.

    Where the run started from the parameters of another, these come first, as step 0: the paper's x_0. Without `steps`,
    all checkpoints that it keeps.

    Raises:
      UserError: `checkpoint-not-found`; `checkpoint-origin-not-found`: where the run started from is gone.
    """
    kept, name = saved_steps(run), Path(run).name
    found = [(f"{name}-{step}", run, step) for step in kept]
    identity = RunDirectory(run).identity()
    # A branch continues with the whole state: its steps include those of the other run, which has its own step 0.
    origin = None if identity.get("whole_state") else identity.get("init_from")
    if origin and 0 not in kept and (steps is None or 0 in steps):
        try:
            saved_steps(origin)
        except UserError as error:
            raise UserError(
                "checkpoint-origin-not-found",
                f"{run} started from {origin}, which is no longer there ({error}): restore it, or leave out step 0 by "
                "naming the steps",
            ) from error
        found.insert(0, (f"{name}-0", origin, identity["init_step"]))
    if steps is None:
        return found
    known = {int(column.rsplit("-", 1)[1]): (column, of, step) for column, of, step in found}
    if missing := [step for step in steps if step not in known]:
        there = ", ".join(map(str, sorted(known)))
        raise UserError("checkpoint-not-found", f"{run} has no checkpoint of step {missing[0]}: it has {there}")
    return [known[step] for step in sorted(steps)]


def score_columns(corpus: Corpus, run: str, steps: Sequence[int] | None, score_missing: bool) -> list[str]:
    """Names of the columns of a run's checkpoints, in the order of training; scores those that are not there.

    Raises:
      UserError: `columns-missing`: one is not there and may not be scored; `column-of-another-model`: it was made by a
        model of the same name and step.
    """

    def finished(name: str) -> bool:
        try:
            return corpus.score(name).complete
        except UserError:  # the stage `score` says the same where it cannot continue
            return False

    wanted = checkpoint_columns(run, steps)
    missing = processes.on_first(lambda: [name for name, _, _ in wanted if not finished(name)])
    if missing and not score_missing:
        raise UserError(
            "columns-missing",
            f"corpus {corpus.path} lacks the losses of {len(missing)} of the {len(wanted)} checkpoints of {run}, "
            f"beginning with score {missing[0]!r}: make them with --score_missing",
        )
    for name, of, step in wanted:
        if name in missing:
            score(corpus.path, of, name=name, step=step)
            continue
        made_by = corpus.score(name).reference
        now = read_about(of, step).get("params_fingerprint") or load_model(of, mesh_lib.make_mesh(), step).fingerprint
        if made_by.get("fingerprint") != now:
            raise UserError(
                "column-of-another-model",
                f"score {name!r} of {corpus.path} was made by step {made_by.get('step')} of {made_by.get('run')}, "
                f"which is another model than step {step} of {of}: delete {corpus.path}/scores/{name}, or rename the "
                "folder of the run",
            )
    return [name for name, _, _ in wanted]


def named_columns(corpus: Corpus, names: str) -> list[str]:
    """The columns that a pattern such as 'causal-*' matches, in the order of their steps; or those named with commas
    between, as given.

    Raises:
      UserError: `columns-unmatched`: nothing matches; `columns-repeated`: one is named twice.
    """
    if "*" not in names:
        listed = names.split(",")
        if len(set(listed)) < len(listed):
            raise UserError("columns-repeated", f"columns {names!r} name one twice: name each checkpoint once")
        return listed
    found = [name for name in corpus.score_names() if fnmatch.fnmatchcase(name, names)]
    if not found:
        there = ", ".join(corpus.score_names()) or "none"
        raise UserError("columns-unmatched", f"no score of corpus {corpus.path} matches {names!r}: it has {there}")
    return sorted(found, key=lambda name: _step(corpus, name))


def _step(corpus: Corpus, name: str) -> int:
    """The step of a column's checkpoint, from its name, else from its reference."""
    number = re.search(r"-(\d+)$", name)
    return int(number[1]) if number else int(corpus.score(name).reference.get("step", 0))


def read_losses(rows: Rows, names: Sequence[str]) -> Losses:
    """Reads the losses of columns, in the order given.

    Raises:
      UserError: a column is missing, unfinished or of another corpus; `columns-of-one-model`: two were made by the same
        model.
    """
    made_by: dict[str, str] = {}
    values = np.empty((len(names), *rows.valid.shape), np.float32)  # [C, N, L]
    for place, name in enumerate(names):
        model = str(rows.table.score(name).reference.get("fingerprint"))
        if model in made_by:
            raise UserError(
                "columns-of-one-model",
                f"scores {made_by[model]!r} and {name!r} of {rows.table.path} were made by the same model: name each "
                "checkpoint once",
            )
        made_by[model] = name
        column = str(ScoreName(name))
        loss = rows.table.read(np.arange(len(rows.valid)), [column])[column].astype(np.float32)
        values[place] = np.where(rows.valid, loss, np.nan)
    return Losses(list(names), [_step(rows.table, name) for name in names], values)


def read_kept_losses(run: str, name: str) -> tuple[str, Losses]:
    """What a HeldOut with keep_tokens kept while the run trained: its corpus, and the losses of its first rows.

    They are score columns of the corpus; earlier versions stored token_losses/NAME/STEP.npy in the run directory.

    Raises:
      UserError: `kept-losses-not-found`: the run has no such evaluator, or it kept nothing.
    """
    directory = RunDirectory(run)
    evaluators = directory.settings().get("evaluators") or []
    corpora = {about["name"]: about["corpus"] for about in evaluators if about.get("keep_tokens")}
    found: dict[int, np.ndarray] = {}  # step -> [N, L]
    if name in corpora:
        files = directory.token_losses_files(name)
        found = {step: np.load(file, allow_pickle=False) for step, file in files.items()}
        corpus = Corpus.open(corpora[name])
        columns = set(corpus.score_names())
        # Only steps in metrics.jsonl: an earlier run in the same directory may have left columns of others.
        for step in (row["step"] for row in directory.metrics() if f"{name}/loss" in row):
            if (column := kept_column(run, name, step)) in columns:
                score = corpus.score(column, partial=True)
                rows = score.reference["rows"]
                if score.finished()[:rows].all():  # else a kill came while it was written
                    found[step] = score.read("loss", rows)
    if not found:
        raise UserError(
            "kept-losses-not-found",
            f"{run} kept no token losses of an evaluator {name!r} (it has {', '.join(corpora) or 'none'}): train with "
            "HeldOut.keep_tokens = True, or score its checkpoints",
        )
    steps = sorted(found)
    rows = min(map(len, found.values()))  # a run may have been resumed with other rows
    values = np.stack([found[step][:rows] for step in steps])
    return corpora[name], Losses([f"{name}-{step}" for step in steps], steps, values)
