"""Which tokens of a corpus each checkpoint of a run selects, and what can be said of these sets of tokens.

Rho-1 (arXiv 2404.07965) Figures 6 to 8. Selection uses the functions of training.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from slm_jax.analyze.columns import Losses, Rows, read_columns, read_kept_losses, read_rows
from slm_jax.analyze.dynamics import CLASSES
from slm_jax.analyze.passages import Segment, segments, varied
from slm_jax.analyze.report import Passage, ShownToken
from slm_jax.analyze.selection_metrics import fitted
from slm_jax.data.scores import ScoreName
from slm_jax.data.segments import positions_from_segments
from slm_jax.data.token_text import TokenText
from slm_jax.errors import UserError
from slm_jax.files import read_json
from slm_jax.metrics import progress
from slm_jax.run_directory import RunDirectory
from slm_jax.score import selection as selection_lib
from slm_jax.score.selection import (
    COMBINE,
    CombinedSelection,
    Selection,
    histories,
    in_words,
    selection_entropies,
    selection_of,
)

SHOWN_TOKENS = 90  # of a passage in a report


class Selector(NamedTuple):
    """How tokens are selected: the selection, the rows of a batch, and the seed of a random one."""

    selection: Selection
    batch_size: int
    seed: int

    def of(self, rows: Rows, loss: Float[np.ndarray, "N L"], **changes: Any) -> Bool[np.ndarray, "T"]:
        """The valid tokens of the rows that a model with these losses selects; `changes`: of the selection."""
        selection = dataclasses.replace(self.selection, **changes)
        columns = read_columns(rows.table, np.arange(len(rows.valid)), selection)
        return select(selection, loss, columns, rows.valid, self.batch_size, self.seed)[rows.valid]


def of_tokens(
    rows: Rows,
    losses: Mapping[str, Losses],
    selector: Selector,
    downstream: Mapping[str, tuple[np.ndarray, np.ndarray]],
    classes: Integer[np.ndarray, "N L"] | None,
    scores: Sequence[str],
    references: Sequence[str],
) -> dict[str, Any]:
    """Which tokens of the rows are selected, and by whom: the checkpoints of the first run in `losses` select.

    downstream: (steps, values) of each run. scores, references: others to compare with the selection's own, under the
    last checkpoint.
    """
    first, own = next(iter(losses.items()))
    values = own.values[:, rows.valid]  # [C, N, L] -> [C, T]
    sets = np.empty(values.shape, bool)
    with progress(len(own.names), 0, "select", "checkpoint") as bar:
        for number, loss in enumerate(own.values):
            sets[number] = selector.of(rows, loss)
            bar.update()
    last = sets[-1]

    # ---- Losses of the selected and of the other tokens, and the downstream result at the same steps
    selected, unselected = losses_on(sets, values), losses_on(~sets, values)
    steps, (measured, found) = np.array(own.steps, float), downstream[first]
    # Between measurements by straight lines; NaN outside of them.
    results = np.interp(steps, measured, found, left=np.nan, right=np.nan) if len(measured) else steps * np.nan
    fits = [
        {
            "selected_by": step,
            "selected": fitted(selected[number], steps, results),
            "unselected": fitted(unselected[number], steps, results),
        }
        for number, step in enumerate(own.steps)
    ]
    # The same tokens for all runs: those that the last checkpoint of the first run selects, and the others (Figure 6).
    fixed = {}
    for name, of in losses.items():
        under_it = losses_on(np.stack([last, ~last]), of.values[:, rows.valid])
        fixed[name] = {"steps": of.steps, "selected": under_it[0], "unselected": under_it[1]}

    # ---- Overlap between checkpoints; under the last one, between scores and between references
    families = {
        "checkpoints": dict(zip(map(str, own.steps), sets, strict=True)),
        "scores": {score: selector.of(rows, own.values[-1], score=score) for score in scores},
        "references": {name: selector.of(rows, own.values[-1], reference=name) for name in references},
    }
    share = float(sets[-1].mean())
    overlap: dict[str, Any] = {"by_chance": share / (2 - share)}
    for name, family in families.items():
        if len(family) > 1:
            overlap[name] = {"names": list(family), "jaccard": jaccard(np.stack(list(family.values())))}

    # ---- By source; and where a corpus knows its noise (sources NAME/noise), how well dropping tokens finds it, in all
    # ---- tokens and in those of the documents that hold it
    sources, names = rows.source_ids[rows.valid], rows.table.source_names
    noise, noisy = {}, {number: name for number, name in enumerate(names) if name.endswith("/noise")}
    if noisy:
        is_noise = np.isin(sources, list(noisy))
        noise["all tokens"] = filtering(last, is_noise, np.ones(len(sources), bool))
        for number, name in noisy.items():
            around = name.removesuffix("/noise")
            inside = (sources == number) | (sources == (names.index(around) if around in names else number))
            noise[around] = filtering(last, is_noise, inside)
    by_source = np.stack([shares(members, sources, len(names))[0] for members in sets], axis=1)  # [sources, C]
    return {
        "corpus": rows.table.path,
        "fingerprint": rows.table.fingerprint,
        "tokens": len(sources),
        "selection": dataclasses.asdict(selector.selection),
        "batch_size": selector.batch_size,
        "run": first,
        "checkpoints": own.steps,
        "selected_share": sets.mean(axis=1),
        "loss_of_selected": selected,
        "loss_of_unselected": unselected,
        "fits": fits,
        "fixed_tokens": fixed,
        "shares": _shares(rows, last, classes),
        "share_by_source": {name: by_source[i] for i, name in enumerate(names) if (sources == i).any()},
        "overlap": overlap,
        "noise": noise,
    }


def _shares(rows: Rows, members: np.ndarray, classes: np.ndarray | None) -> dict[str, list[dict[str, Any]]]:
    """The share that is selected by source, frequency, position and class."""
    bins, bin_names = position_bins(rows.segment_ids)
    deciles = ["rarest tenth", "2nd tenth", "3rd tenth", *(f"{n}th tenth" for n in range(4, 10)), "most frequent"]
    by = {
        "source": (rows.source_ids[rows.valid], list(rows.table.source_names)),
        "frequency": (frequency_deciles(rows.tokens[rows.valid]), deciles),
        "position": (bins[rows.valid], bin_names),
    }
    if classes is not None:
        by["class"] = (classes[rows.valid].astype(np.int64), list(CLASSES))
    found = {}
    for name, (groups, names) in by.items():
        lines = zip(names, *shares(members, groups, len(names)), strict=True)
        found[name] = [{"name": group, "share": share, "tokens": count} for group, share, count in lines if count]
    return found


def read_classes(folder: str, rows: Rows) -> Integer[np.ndarray, "N L"]:
    """The classes that `analyze dynamics` wrote, of the same rows of the same corpus.

    Raises:
      UserError: `classes-not-found`; `classes-too-few-rows`; those of Corpus.expect: they are of another corpus.
    """
    about, classes = Path(folder) / "dynamics.json", Path(folder) / "classes.npy"
    if not about.exists() or not classes.exists():
        raise UserError(
            "classes-not-found", f"{folder} holds no dynamics.json and classes.npy: name a folder of `analyze dynamics`"
        )
    rows.table.expect(read_json(about)["fingerprint"], str(classes))
    found = np.load(classes, allow_pickle=False)
    if len(found) < len(rows.valid):
        raise UserError(
            "classes-too-few-rows",
            f"{classes} holds {len(found)} rows of the {len(rows.valid)} to analyze: set analyze_selection.rows = "
            f"{len(found)}, or run `analyze dynamics` on all rows",
        )
    return found[: len(rows.valid)]


# ---- Passages of a report


def passages_of_run(run: str, count: int = 6) -> list[Passage]:
    """Passages with the tokens that a selective run kept and dropped at its last evaluation, noisy ones first.

    They come from an evaluator with keep_tokens on a corpus that has the columns of the run's selection: tokens compete
    within the rows that it kept. Empty for a run without such an evaluator.
    """
    settings = RunDirectory(run).settings()
    phase = next((phase for phase in reversed(settings["phases"]) if phase.get("selection")), None)
    selection = selection_of(phase["selection"]) if phase else None
    for evaluator in settings.get("evaluators") or ():
        if selection is None or not evaluator.get("keep_tokens"):
            continue
        try:
            corpus, losses = read_kept_losses(run, evaluator["name"])
            rows = read_rows(corpus, losses.values.shape[1])
            columns = read_columns(rows.table, np.arange(len(rows.valid)), selection)
        except UserError:  # nothing kept yet, or a corpus that was not scored
            continue
        loss = losses.values[-1]  # [N, L]
        kept = select(selection, loss, columns, rows.valid, batch_size=len(loss))
        reference = reference_losses(selection, columns)
        # [N, L]
        noise = np.array([name.endswith("/noise") for name in rows.table.source_names])[rows.source_ids]

        def share_of_noise(segment: Segment, noise: np.ndarray = noise) -> float:
            """In the part that is shown; a passage of noise alone shows no choice."""
            places = slice(segment.start, segment.start + min(segment.length, SHOWN_TOKENS))
            share = float(noise[segment.row, places].mean())
            return share if share < 0.5 else 0.0

        found, reader = [], TokenText(rows.table.vocabulary())
        whole = [segment for segment in segments(rows) if segment.length >= SHOWN_TOKENS // 2]
        # Documents that begin here read better than pieces.
        whole = [segment for segment in whole if segment.begins] or whole
        for segment in sorted(varied(whole, len(whole)), key=share_of_noise, reverse=True)[:count]:
            places = np.arange(segment.start, segment.start + min(segment.length, SHOWN_TOKENS))
            texts = reader.texts(rows.tokens[segment.row, places].tolist())
            at = [(segment.row, place) for place in places.tolist()]
            tokens = [
                ShownToken(
                    text,
                    loss=float(loss[i]) if rows.valid[i] else None,
                    reference=float(reference[i]) if reference is not None and rows.valid[i] else None,
                    kept=bool(kept[i]) if rows.valid[i] else None,
                    noise=bool(noise[i]),
                )
                for i, text in zip(at, texts, strict=True)
            ]
            found.append(
                Passage(segment.source.removesuffix("/noise"), segment.url, tokens, RunDirectory(run).path.name)
            )
        if found:
            return found
    return []


# ---- Sets of tokens


_select_tokens = jax.jit(selection_lib.select_tokens, static_argnums=0)


def select(
    selection: Selection | CombinedSelection,
    loss: Float[np.ndarray, "N L"],
    columns: Mapping[str, Float[np.ndarray, "N L"]],
    valid: Bool[np.ndarray, "N L"],
    batch_size: int,
    seed: int = 0,
) -> Bool[np.ndarray, "N L"]:
    """The valid tokens that train, where each `batch_size` rows are a batch on one device.

    It uses the functions of training; settings of devices, micro-batches and gradients have no effect here. `columns`
    are those that `selection.columns()` names.
    """
    if selection_entropies(selection) or histories(selection):
        raise UserError(
            "selection-needs-model",
            f"selection {in_words(selection)} needs more of the model than its losses, which are all that is kept "
            "here: choose another selection",
        )
    selected = np.zeros(valid.shape, bool)
    for batch, first in enumerate(range(0, len(valid), batch_size)):
        rows = slice(first, first + batch_size)
        key = jax.random.fold_in(jax.random.key(seed), batch)
        read = {name: jnp.asarray(columns[name][rows]) for name in selection.columns()}
        found = _select_tokens(selection, jnp.asarray(loss[rows]), read, jnp.asarray(valid[rows]), key)
        selected[rows] = np.asarray(found.selected)
    return selected


def reference_losses(
    selection: Selection | CombinedSelection, columns: Mapping[str, Float[np.ndarray, "N L"]]
) -> Float[np.ndarray, "N L"] | None:
    """The reference losses to show: of the first part of the selection whose columns are there, several references
    combined as it says. None without them."""
    for part in selection.parts:
        names = [str(ScoreName(name)) for name in part.references]
        if all(name in columns for name in names):
            # [references, N, L] -> [N, L]
            return np.asarray(COMBINE[part.combine](np.stack([columns[name].astype(np.float32) for name in names])))
    return None


def shares(
    selected: Bool[np.ndarray, "T"], groups: Integer[np.ndarray, "T"], count: int
) -> tuple[Float[np.ndarray, "G"], Int[np.ndarray, "G"]]:
    """Of each of `count` groups the share of its tokens that is selected, NaN where it has none, and its tokens. Tokens
    of a negative group belong to none."""
    inside = groups >= 0
    tokens = np.bincount(groups[inside], minlength=count)
    with np.errstate(invalid="ignore"):
        return np.bincount(groups[inside], weights=selected[inside], minlength=count) / tokens, tokens


def jaccard(sets: Bool[np.ndarray, "S T"]) -> Float[np.ndarray, "S S"]:
    """Tokens in both over tokens in either; 1 for two empty sets. By chance, two sets that hold a share r of the tokens
    each have r / (2 - r)."""
    both = np.array([[np.count_nonzero(a & b) for b in sets] for a in sets], np.float64)
    sizes = sets.sum(axis=1).astype(np.float64)
    either = sizes[:, None] + sizes[None, :] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def losses_on(sets: Bool[np.ndarray, "S T"], losses: Float[np.ndarray, "C T"]) -> Float[np.ndarray, "S C"]:
    """The mean loss under each checkpoint of each set's tokens; NaN for an empty set."""
    found = np.full((len(sets), len(losses)), np.nan)
    for number, members in enumerate(sets):
        if members.any():
            found[number] = losses[:, members].mean(axis=1, dtype=np.float64)
    return found


def frequency_deciles(tokens: Integer[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """0 for the rarest tenth of the occurrences up to 9 for the most frequent.

    A vocabulary id is in one decile, where the middle of its occurrences falls: deciles hold about a tenth each, and
    one may be empty beside a very frequent id.
    """
    _, where, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.argsort(counts, kind="stable")
    middle = np.empty(len(counts))
    middle[order] = np.cumsum(counts[order]) - counts[order] / 2
    return np.minimum(middle * 10 // max(1, len(tokens)), 9).astype(np.int64)[where.reshape(-1)]


def position_bins(segment_ids: Integer[np.ndarray, "N L"]) -> tuple[Int[np.ndarray, "N L"], list[str]]:
    """The bin of each token by its position in its document (the number of tokens that the model reads before it), and
    the names of the bins: 1, 2–3, 4–7 and so on; -1 for the first token."""
    positions = positions_from_segments(segment_ids)
    bins = np.where(positions > 0, np.log2(np.maximum(positions, 1)).astype(np.int64), -1)
    count = int(bins.max()) + 1
    return bins, [f"{1 << n}–{(2 << n) - 1}" if n else "1" for n in range(count)]


def filtering(
    selected: Bool[np.ndarray, "T"], noise: Bool[np.ndarray, "T"], among: Bool[np.ndarray, "T"]
) -> dict[str, float | int | None]:
    """How well dropping tokens finds the noise among `among`: precision is the share of the dropped tokens that is
    noise, recall the share of the noise that is dropped; `noise_share` is the precision of chance."""
    dropped = among & ~selected
    caught, total = int((dropped & noise).sum()), int((noise & among).sum())
    return {
        "tokens": int(among.sum()),
        "noise_share": total / int(among.sum()) if among.any() else None,
        "precision": caught / int(dropped.sum()) if dropped.any() else None,
        "recall": caught / total if total else None,
    }
