"""What the losses of a corpus' tokens under a run's checkpoints say of selection: which tokens each of them selects.

Rho-1 (arXiv 2404.07965) Figures 6 to 8. Selection is by the functions that training uses.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.analyze import chosen
from slm_jax.analyze.columns import Losses, Rows, read_column
from slm_jax.analyze.selection_runs import fitted
from slm_jax.analyze.trajectories import CLASSES
from slm_jax.errors import UserError
from slm_jax.metrics import progress
from slm_jax.score.selection import Selection


class Choices(NamedTuple):
    """How tokens are chosen: the selection, the rows of a batch, and the seed of a random one."""

    selection: Selection
    batch_size: int
    seed: int

    def of(self, rows: Rows, loss: np.ndarray, **changes: Any) -> np.ndarray:
        """The tokens [T] that a model with these losses [N, L] selects, among the valid ones of the rows."""
        selection = dataclasses.replace(self.selection, **changes)
        columns = {name: read_column(rows, *name.split("/")[1:]) for name in selection.columns()}
        return chosen.choose(selection, loss, columns, rows.valid, self.batch_size, self.seed)[rows.valid]


def of_tokens(
    rows: Rows,
    losses: dict[str, Losses],
    choices: Choices,
    downstream: dict[str, tuple[np.ndarray, np.ndarray]],
    classes: np.ndarray | None,
    scores: Sequence[str],
    references: Sequence[str],
) -> dict[str, Any]:
    """What is selected in the rows, by whom.

    Args:
      rows: of the corpus.
      losses: of runs' checkpoints; those of the first run select.
      choices: how.
      downstream: (steps, values) of each run.
      classes: of tokens, [N, L], as `analyze dynamics` writes them.
      scores: scores to compare with choices.selection's own, under the last checkpoint.
      references: references to compare with its own, likewise.
    """
    first, *_ = losses
    own = losses[first]
    sets = np.empty((len(own.names), int(rows.valid.sum())), bool)
    with progress(len(own.names), 0, "select", "checkpoint") as bar:
        for number, loss in enumerate(own.values):
            sets[number] = choices.of(rows, loss)
            bar.update()
    values = own.values[:, rows.valid]
    selected, unselected = (chosen.losses_on(members, values) for members in (sets, ~sets))
    steps = np.array(own.steps, float)
    results = _at(steps, *downstream[first])
    fits = []
    for number, step in enumerate(own.steps):
        parts = {"selected": selected[number], "unselected": unselected[number]}
        fits.append({"selected_by": step} | {part: fitted(loss, steps, results) for part, loss in parts.items()})
    return {
        "corpus": rows.table.path,
        "fingerprint": rows.table.fingerprint,
        "tokens": sets.shape[1],
        "selection": dataclasses.asdict(choices.selection),
        "batch_size": choices.batch_size,
        "run": first,
        "checkpoints": own.steps,
        "selected_share": sets.mean(axis=1),
        "loss_of_selected": selected,
        "loss_of_unselected": unselected,
        "fits": fits,
        "fixed_tokens": _fixed_tokens(rows, losses, sets[-1]),
        "shares": _shares(rows, sets[-1], classes),
        "share_by_source": _source_shares(rows, sets),
        "overlap": _overlap(rows, own, sets, choices, scores, references),
        "noise": _noise(rows, sets[-1]),
    }


def _at(steps: np.ndarray, measured: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A result at the steps, between measurements by straight lines; NaN outside of them."""
    if not len(measured):
        return np.full(len(steps), np.nan)
    return np.interp(steps, measured, values, left=np.nan, right=np.nan)


def _fixed_tokens(rows: Rows, losses: dict[str, Losses], members: np.ndarray) -> dict[str, Any]:
    """The loss under every run's checkpoints of the tokens that the first run's last checkpoint selects, and of the
    others: the same tokens for all (Figure 6)."""
    found = {}
    for name, of in losses.items():
        selected, unselected = chosen.losses_on(np.stack([members, ~members]), of.values[:, rows.valid])
        found[name] = {"steps": of.steps, "selected": selected, "unselected": unselected}
    return found


def _shares(rows: Rows, members: np.ndarray, classes: np.ndarray | None) -> dict[str, list[dict[str, Any]]]:
    """The share that the last checkpoint selects by source, frequency, position and class."""
    bins, bin_names = chosen.position_bins(rows.segment_ids)
    tenths = [f"{n}th tenth" for n in range(4, 10)]
    deciles = ["rarest tenth", "2nd tenth", "3rd tenth", *tenths, "most frequent"]
    by = {
        "source": (rows.source_ids[rows.valid], list(rows.table.source_names)),
        "frequency": (chosen.frequency_deciles(rows.tokens[rows.valid]), deciles),
        "position": (bins[rows.valid], bin_names),
    }
    if classes is not None:
        by["class"] = (classes[rows.valid].astype(np.int64), list(CLASSES))
    found = {}
    for name, (groups, names) in by.items():
        shares, tokens = chosen.shares(members, groups, len(names))
        rows_of = zip(names, shares, tokens, strict=True)
        found[name] = [{"name": group, "share": share, "tokens": count} for group, share, count in rows_of if count]
    return found


def _source_shares(rows: Rows, sets: np.ndarray) -> dict[str, np.ndarray]:
    """The share of each source under every checkpoint."""
    names, of = rows.table.source_names, rows.source_ids[rows.valid]
    every = np.stack([chosen.shares(members, of, len(names))[0] for members in sets], axis=1)
    return {name: every[number] for number, name in enumerate(names) if (of == number).any()}


def _overlap(
    rows: Rows, own: Losses, sets: np.ndarray, choices: Choices, scores: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
    """Jaccard overlap between checkpoints; under the last one, between scores and between references."""
    last = own.values[-1]
    by_score = {score: choices.of(rows, last, score=score) for score in scores}
    by_reference = {name: choices.of(rows, last, reference=name) for name in references}
    families = {
        "checkpoints": dict(zip(map(str, own.steps), sets, strict=True)),
        "scores": by_score,
        "references": by_reference,
    }
    found = {}
    for name, family in families.items():
        if len(family) > 1:
            found[name] = {"names": list(family), "jaccard": chosen.jaccard(np.stack(list(family.values())))}
    share = float(sets[-1].mean())
    return {"by_chance": share / (2 - share), **found}


def _noise(rows: Rows, members: np.ndarray) -> dict[str, Any]:
    """Where a corpus knows its noise (sources NAME/noise): how well leaving tokens out finds it, in all tokens, and in
    those of the documents that hold it."""
    names, of = rows.table.source_names, rows.source_ids[rows.valid]
    noisy = {number: name for number, name in enumerate(names) if name.endswith("/noise")}
    if not noisy:
        return {}
    noise = np.isin(of, list(noisy))
    found = {"all tokens": chosen.filtering(members, noise, np.ones(len(of), bool))}
    for number, name in noisy.items():
        around = name.removesuffix("/noise")
        inside = (of == number) | (of == (names.index(around) if around in names else number))
        found[around] = chosen.filtering(members, noise, inside)
    return found


def read_classes(folder: str, rows: Rows) -> np.ndarray:
    """The classes that `analyze dynamics` wrote, of the same rows of the same corpus.

    Raises:
      UserError: nothing there, or of another corpus or other rows.
    """
    about, classes = Path(folder) / "dynamics.json", Path(folder) / "classes.npy"
    if not about.exists() or not classes.exists():
        raise UserError(f"{folder} holds no dynamics.json and classes.npy: name a folder of `analyze dynamics`")
    rows.table.expect(json.loads(about.read_text())["fingerprint"], f"{classes}")
    found = np.load(classes, allow_pickle=False)
    if len(found) < len(rows.valid):
        raise UserError(
            f"{classes} holds {len(found)} rows, {len(rows.valid)} are looked at: set analyze_selection.rows = "
            f"{len(found)}, or make it with all rows"
        )
    return found[: len(rows.valid)]
