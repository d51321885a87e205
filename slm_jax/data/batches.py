"""The Batch that every stage reads, and reading ahead."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from slm_jax.data.corpus import Corpus
from slm_jax.data.segments import positions_from_segments


class Batch(NamedTuple):
    """Rows of packed documents: numpy arrays on the host, jax arrays on devices.

    Three arrays for three purposes: attention reads `segment_ids`, rotary embeddings read `positions`, the loss reads
    `loss_mask`. None of them can stand in for another.

    Attributes:
      tokens: ids, int32.
      segment_ids: which document of the row a token belongs to, from 1 on; 0 is padding. int32.
      positions: within the segment, from 0 on. int32.
      loss_mask: whether the token's loss counts.
      source_ids: index into the run's list of sources, int32.
      scores: score columns by name, for example "scores/reference/loss"; float32, at the token that they are about.
    """

    tokens: Int[Any, "B L"]
    segment_ids: Int[Any, "B L"]
    positions: Int[Any, "B L"]
    loss_mask: Bool[Any, "B L"]
    source_ids: Int[Any, "B L"]
    scores: dict[str, Float[Any, "B L"]]


COLUMNS = ("tokens", "segment_ids", "loss_mask", "source_ids")


def make_batch(
    tokens: Integer[np.ndarray, "B L"],
    segment_ids: Integer[np.ndarray, "B L"],
    loss_mask: Bool[np.ndarray, "B L"] | None = None,
    source_ids: Integer[np.ndarray, "B L"] | None = None,
    scores: dict[str, Float[np.ndarray, "B L"]] | None = None,
) -> Batch:
    """A Batch from bare arrays: sets dtypes, derives positions; by default every token but padding has a loss."""
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
    """Reads row `rows[i]` of `corpora[which[i]]` for each i: B rows of several corpora, in the order asked for.

    Args:
      corpora: of one sequence length L.
      which: index of each row's corpus.
      rows: number of each row in its corpus.
      score_columns: columns to read as scores, for example "scores/reference/loss".
      source_maps: for each corpus, its own source ids -> ids in the list of all sources.
    """
    names = (*COLUMNS, *score_columns)
    # One read per corpus; its rows are then put in their places of the batch.
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
            if merged[name].dtype != read[name].dtype:  # uint16 tokens beside uint32, float16 scores beside float32
                merged[name] = merged[name].astype(np.promote_types(merged[name].dtype, read[name].dtype))
            merged[name][mine] = read[name]
    scores = {name: merged[name] for name in score_columns}
    return make_batch(*(merged[name] for name in COLUMNS), scores=scores)


def read_ahead(make: Callable[[int], Any], first: int, last: int, depth: int = 2) -> Generator[Any, None, None]:
    """Yields make(first), ..., make(last - 1), computed in a background thread up to `depth` items ahead.

    An exception in `make` is raised at the reader. Closing the iterator stops the thread.
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
