"""Per-token losses over the checkpoints of a run: score columns of a corpus, one for each checkpoint.

A checkpoint's column is called <name of the run's folder>-<step>. The stage `score` writes it, or an analysis that is
told to score what is missing; nothing is trained.
"""

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
from slm_jax.analyze.records import read_run
from slm_jax.checkpoint import read_about, saved_steps
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.models.trained_model import load_model
from slm_jax.score.score_corpus import score
from slm_jax.score.token_loss import predicted


class Losses(NamedTuple):
    """Losses of the tokens of a corpus under checkpoints, in the order of training.

    names: of the columns. steps: of the checkpoints. values: nats, NaN where a token has no loss.
    """

    names: list[str]
    steps: list[int]
    values: Float[np.ndarray, "C N L"]


class Rows(NamedTuple):
    """The first rows of a corpus, [N, L] each, and which of their tokens have a loss that counts."""

    table: Corpus
    tokens: np.ndarray
    segment_ids: np.ndarray
    source_ids: np.ndarray
    valid: Bool[np.ndarray, "N L"]


def read_rows(corpus: str, rows: int | None) -> Rows:
    """Opens a corpus and reads its first rows, or all."""
    table = Corpus.open(corpus)
    columns = table.read(np.arange(table.num_rows if rows is None else min(rows, table.num_rows)))
    segment_ids = columns["segment_ids"].astype(np.int32)
    valid = columns["loss_mask"] & np.asarray(predicted(jnp.asarray(segment_ids)))
    if not valid.any():
        raise UserError(f"no token of corpus {corpus} has a loss: name a corpus that holds text")
    return Rows(table, columns["tokens"].astype(np.int32), segment_ids, columns["source_ids"].astype(np.int32), valid)


def column_name(run: str, step: int) -> str:
    """What the column of a run's checkpoint is called."""
    return f"{Path(run).name}-{step}"


def checkpoint_columns(run: str, steps: Sequence[int] | None) -> list[tuple[str, str, int]]:
    """(column, run, step of that run) of each checkpoint, in the order of training.

    Where the run started from the weights of another, those stand first, as step 0: the paper's x_0.

    Args:
      run: run directory.
      steps: which checkpoints; None for all that it keeps.

    Raises:
      UserError: the run holds none of them.
    """
    kept = saved_steps(run)
    found = [(column_name(run, step), run, step) for step in kept]
    first = _first_model(run) if 0 not in kept else None
    if first and (steps is None or 0 in steps):
        found.insert(0, (column_name(run, 0), *first))
    if steps is None:
        return found
    known = {int(name.rsplit("-", 1)[1]): (name, of, step) for name, of, step in found}
    if missing := [step for step in steps if step not in known]:
        raise UserError(f"{run} has no checkpoint of step {missing[0]}: it has {', '.join(map(str, sorted(known)))}")
    return [known[step] for step in sorted(steps)]


def _first_model(run: str) -> tuple[str, int] | None:
    """The run and step whose parameters a run started from; None where they were random or it is a branch."""
    identity = read_run(run).get("identity", {})
    if not identity.get("init_from") or identity.get("whole_state"):
        return None
    try:
        saved_steps(identity["init_from"])
    except UserError as error:
        raise UserError(
            f"{run} started from {identity['init_from']}, which is not there any more ({error}): bring it back, or "
            "leave step 0 out by naming the steps"
        ) from error
    return identity["init_from"], identity["init_step"]


def score_columns(corpus: Corpus, run: str, steps: Sequence[int] | None, score_missing: bool) -> list[str]:
    """Names of the columns of a run's checkpoints, in the order of training; scores those that are not there.

    Raises:
      UserError: one is not there and is not to be scored, or was made by another model of the same name and step.
    """
    wanted = checkpoint_columns(run, steps)
    missing = processes.on_first(lambda: [name for name, _, _ in wanted if not _finished(corpus, name)])
    if missing and not score_missing:
        raise UserError(
            f"corpus {corpus.path} lacks the losses of {len(missing)} of the {len(wanted)} checkpoints of {run}, first "
            f"of all score {missing[0]!r}: let them be made with --score_missing"
        )
    for name, of, step in wanted:
        if name in missing:
            score(corpus.path, of, name=name, step=step)
        else:
            _check_model(corpus, name, of, step)
    return [name for name, _, _ in wanted]


def _check_model(corpus: Corpus, name: str, run: str, step: int) -> None:
    made_by = corpus.score(name).reference
    now = read_about(run, step).get("params_fingerprint") or load_model(run, mesh_lib.make_mesh(), step).fingerprint
    if made_by.get("fingerprint") != now:
        raise UserError(
            f"score {name!r} of {corpus.path} was made by step {made_by.get('step')} of {made_by.get('run')}, which is "
            f"another model than step {step} of {run}: delete {corpus.path}/scores/{name}, or give the run's folder "
            "another name"
        )


def _finished(corpus: Corpus, name: str) -> bool:
    try:
        return corpus.score(name).complete
    except UserError:  # which the stage `score` repeats, where it cannot go on
        return False


def named_columns(corpus: Corpus, names: str | Sequence[str]) -> list[str]:
    """The columns that a pattern such as 'causal-*' matches, in the order of their steps; or the named ones, as given.

    Raises:
      UserError: nothing matches, or one is named twice.
    """
    if not isinstance(names, str):
        if len(set(names)) < len(names):
            raise UserError(f"columns {list(names)} name one twice: each checkpoint counts once")
        return list(names)
    found = [name for name in corpus.score_names() if fnmatch.fnmatchcase(name, names)]
    if not found:
        there = ", ".join(corpus.score_names()) or "none"
        raise UserError(f"no score of corpus {corpus.path} matches {names!r}: it has {there}")
    return sorted(found, key=lambda name: _step(corpus, name))


def _step(corpus: Corpus, name: str) -> int:
    """The step of a column's checkpoint, as its name tells it, else its reference."""
    number = re.search(r"-(\d+)$", name)
    return int(number[1]) if number else int(corpus.score(name).reference.get("step", 0))


def read_losses(rows: Rows, names: Sequence[str]) -> Losses:
    """Reads the losses of columns, in the order given.

    Raises:
      UserError: a column is missing, half finished or of another corpus; two were made by the same model.
    """
    made_by: dict[str, str] = {}
    values = np.empty((len(names), *rows.valid.shape), np.float32)
    for place, name in enumerate(names):
        model = str(rows.table.score(name).reference.get("fingerprint"))
        if model in made_by:
            raise UserError(
                f"scores {made_by[model]!r} and {name!r} of {rows.table.path} were made by the same model: each "
                "checkpoint counts once"
            )
        made_by[model] = name
        values[place] = np.where(rows.valid, read_column(rows, name), np.nan)
    return Losses(list(names), [_step(rows.table, name) for name in names], values)


def read_column(rows: Rows, name: str, statistic: str = "loss") -> Float[np.ndarray, "N L"]:
    """One statistic of a score of the rows, float32."""
    column = f"scores/{name}/{statistic}"
    return rows.table.read(np.arange(len(rows.valid)), [column])[column].astype(np.float32)


def read_trace(run: str, name: str) -> tuple[str, Losses]:
    """What a HeldOut with keep_tokens stored while the run trained: its corpus, and the losses of its first rows.

    Raises:
      UserError: the run has no such evaluator, or it stored nothing.
    """
    evaluators = read_run(run).get("settings", {}).get("evaluators") or []
    corpora = {about["name"]: about["corpus"] for about in evaluators if about.get("keep_tokens")}
    files = {int(path.stem): path for path in (Path(run) / "token_losses" / name).glob("*.npy")}
    if name not in corpora or not files:
        there = sorted(path.name for path in (Path(run) / "token_losses").glob("*"))
        raise UserError(
            f"{run} stored no token losses of an evaluator {name!r} (it has {', '.join(there) or 'none'}): train with "
            "HeldOut.keep_tokens = True, or score its checkpoints"
        )
    steps = sorted(files)
    values = np.stack([np.load(files[step], allow_pickle=False) for step in steps])
    return corpora[name], Losses([f"{name}-{step}" for step in steps], steps, values)
