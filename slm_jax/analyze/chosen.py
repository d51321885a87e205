"""Which tokens a selection takes, and what can be said of a set of tokens: pure functions of arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from slm_jax.data.packing import positions_from_segments
from slm_jax.score import selection as selection_lib
from slm_jax.score.selection import CombinedSelection, Selection


@functools.partial(jax.jit, static_argnums=0)
def _choose(
    selection: Selection | CombinedSelection,
    loss: jax.Array,
    columns: dict[str, jax.Array],
    valid: jax.Array,
    key: jax.Array,
) -> jax.Array:
    return selection_lib.select_tokens(selection, loss, columns, valid, key).selected


def choose(
    selection: Selection | CombinedSelection,
    loss: Float[np.ndarray, "N L"],
    columns: dict[str, Float[np.ndarray, "N L"]],
    valid: Bool[np.ndarray, "N L"],
    batch_size: int,
    seed: int = 0,
) -> Bool[np.ndarray, "N L"]:
    """The tokens that train, where each `batch_size` rows are a batch on one device.

    Args:
      selection: its own functions choose; what it says of devices, micro-batches and gradients has no meaning here.
      loss: of the model.
      columns: what `selection.columns()` names.
      valid: tokens that take part.
      batch_size: the last batch may have fewer.
      seed: of a random selection.
    """
    chosen = np.zeros(valid.shape, bool)
    for batch, first in enumerate(range(0, len(valid), batch_size)):
        rows = slice(first, first + batch_size)
        key = jax.random.fold_in(jax.random.key(seed), batch)
        read = {name: jnp.asarray(column[rows]) for name, column in columns.items()}
        chosen[rows] = np.asarray(_choose(selection, jnp.asarray(loss[rows]), read, jnp.asarray(valid[rows]), key))
    return chosen


def shares(
    chosen: Bool[np.ndarray, "T"], groups: Integer[np.ndarray, "T"], count: int
) -> tuple[Float[np.ndarray, "G"], Int[np.ndarray, "G"]]:
    """Of each of `count` groups the share of its tokens that is chosen, NaN where it has none, and its tokens. Tokens
    of a negative group belong to none."""
    inside = groups >= 0
    tokens = np.bincount(groups[inside], minlength=count)
    with np.errstate(invalid="ignore"):
        return np.bincount(groups[inside], weights=chosen[inside], minlength=count) / tokens, tokens


def jaccard(sets: Bool[np.ndarray, "S T"]) -> Float[np.ndarray, "S S"]:
    """Tokens in both over tokens in either; 1 for two empty sets. By chance, two sets that hold a share r of the tokens
    each have r / (2 - r)."""
    members = sets.astype(np.float32)
    both = np.rint(members @ members.T).astype(np.float64) if sets.shape[1] < 1 << 24 else _both(sets)
    sizes = sets.sum(axis=1).astype(np.float64)
    either = sizes[:, None] + sizes[None, :] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def _both(sets: np.ndarray) -> np.ndarray:
    """Counts that float32 does not hold exactly."""
    return np.array([[np.count_nonzero(a & b) for b in sets] for a in sets], np.float64)


def losses_on(sets: Bool[np.ndarray, "S T"], losses: Float[np.ndarray, "C T"]) -> Float[np.ndarray, "S C"]:
    """The mean loss under each checkpoint of each set's tokens; NaN for an empty set."""
    found = np.full((len(sets), len(losses)), np.nan)
    for number, members in enumerate(sets):
        if members.any():
            found[number] = losses[:, members].mean(axis=1, dtype=np.float64)
    return found


def frequency_deciles(tokens: Integer[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """0 for the rarest tenth of the occurrences up to 9 for the most frequent.

    A vocabulary id stands in one decile, where the middle of its occurrences falls: deciles hold about a tenth each,
    and one may be empty beside a very frequent id.
    """
    _, where, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.argsort(counts, kind="stable")
    middle = np.empty(len(counts))
    middle[order] = np.cumsum(counts[order]) - counts[order] / 2
    return np.minimum(middle * 10 // max(1, len(tokens)), 9).astype(np.int64)[where.reshape(-1)]


def position_bins(segment_ids: Integer[np.ndarray, "N L"]) -> tuple[Int[np.ndarray, "N L"], list[str]]:
    """Bins of a token's position in its document, which is how many tokens the model reads before it, and their
    names: 1, 2–3, 4–7 and so on; -1 for the first token."""
    positions = positions_from_segments(segment_ids)
    bins = np.where(positions > 0, np.log2(np.maximum(positions, 1)).astype(np.int64), -1)
    count = int(bins.max()) + 1
    return bins, [f"{1 << n}–{(2 << n) - 1}" if n else "1" for n in range(count)]


def filtering(
    chosen: Bool[np.ndarray, "T"], noise: Bool[np.ndarray, "T"], among: Bool[np.ndarray, "T"]
) -> dict[str, float | int | None]:
    """How well leaving tokens out finds the noise among `among`: precision is the share of what is left out that is
    noise, recall the share of the noise that is left out; `noise_share` is the precision of chance."""
    left_out = among & ~chosen
    caught, total = int((left_out & noise).sum()), int((noise & among).sum())
    return {
        "tokens": int(among.sum()),
        "noise_share": total / int(among.sum()) if among.any() else None,
        "precision": caught / int(left_out.sum()) if left_out.any() else None,
        "recall": caught / total if total else None,
    }
