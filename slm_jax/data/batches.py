"""The Batch contract, and reading ahead."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from slm_jax.data.corpus import Corpus
from slm_jax.data.packing import positions_from_segments


class Batch(NamedTuple):
    """Rows of packed documents. Three arrays for three things: attention reads `segment_ids` (0 is padding), rotary
    reads `positions`, the loss reads `loss_mask`. `scores` holds the score columns by name, e.g.
    "scores/reference/loss". Arrays are numpy on the host, jax on devices."""

    tokens: Any  # int32 [B, L]
    segment_ids: Any  # int32 [B, L]
    positions: Any  # int32 [B, L]
    loss_mask: Any  # bool [B, L]
    source_ids: Any  # int32 [B, L]
    scores: dict[str, Any]  # float32 [B, L] each


COLUMNS = ("tokens", "segment_ids", "loss_mask", "source_ids")


def make_batch(
    tokens: Integer[np.ndarray, "B L"],
    segment_ids: Integer[np.ndarray, "B L"],
    loss_mask: Bool[np.ndarray, "B L"] | None = None,
    source_ids: Integer[np.ndarray, "B L"] | None = None,
    scores: dict[str, Float[np.ndarray, "B L"]] | None = None,
) -> Batch:
    """A Batch from bare arrays: dtypes set, positions derived; by default the loss counts everywhere but in padding."""
    return Batch(
        tokens=tokens.astype(np.int32),
        segment_ids=segment_ids.astype(np.int32),
        positions=positions_from_segments(segment_ids).astype(np.int32),
        loss_mask=segment_ids > 0 if loss_mask is None else loss_mask.astype(bool),
        source_ids=np.zeros(tokens.shape, np.int32) if source_ids is None else source_ids.astype(np.int32),
        scores={name: score.astype(np.float32) for name, score in (scores or {}).items()},
    )


def read_batch(
    corpora: Sequence[Corpus],
    which: Int[np.ndarray, " B"],
    rows: Int[np.ndarray, " B"],
    score_columns: Sequence[str] = (),
    source_maps: Sequence[Int[np.ndarray, " _"]] | None = None,
) -> Batch:
    """Reads row `rows[i]` of `corpora[which[i]]` for each i.

    `source_maps[d][local id]` numbers the sources of several corpora as one list.
    """
    names = (*COLUMNS, *score_columns)
    merged: dict[str, np.ndarray] = {}
    for i, corpus in enumerate(corpora):
        mine = np.flatnonzero(which == i)
        if not len(mine):
            continue
        read = corpus.read(rows[mine], names)
        if source_maps is not None:
            read["source_ids"] = source_maps[i][read["source_ids"]]
        for name in names:
            if name not in merged:
                merged[name] = np.empty((len(which), corpus.sequence_length), read[name].dtype)
            if merged[name].dtype != read[name].dtype:
                merged[name] = merged[name].astype(np.promote_types(merged[name].dtype, read[name].dtype))
            merged[name][mine] = read[name]
    scores = {name: merged[name] for name in score_columns}
    return make_batch(*(merged[name] for name in COLUMNS), scores=scores)


def read_ahead(make: Callable[[int], Any], first: int, last: int, depth: int = 2) -> Generator[Any, None, None]:
    """Yields make(first), ..., make(last - 1), each made in a background thread up to `depth` ahead.

    An exception in `make` is raised to the reader; closing the iterator stops the thread.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item: tuple[Any, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        for number in range(first, last):
            if stopped.is_set():
                return
            try:
                offer((make(number), None))
            except BaseException as error:  # handed over, not swallowed
                return offer((None, error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()
