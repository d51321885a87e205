"""A step's rows and score columns as one `Batch`, and a thread that reads batches ahead."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from slm_jax.data.corpus import COLUMNS, Corpus
from slm_jax.data.segments import positions_from_segments


class Batch(NamedTuple):
    """Rows of packed documents: numpy arrays on the host, jax arrays on devices.

    Attention reads `segment_ids`, rotary embeddings read `positions`, the loss reads `loss_mask`: metadata
    before a document, for example, is attended to and has no loss.

    Attributes:
      tokens: ids, int32.
      segment_ids: which document of the row a token belongs to, from 1 on; 0 is padding. int32.
      positions: of the token within its segment, from 0 on. int32.
      loss_mask: whether the token's loss counts.
      source_ids: index into the run's list of sources, int32.
      scores: score columns by name, for example "scores/reference/loss"; float32, stored at the scored token.
    """

    tokens: Int[Any, "B L"]
    segment_ids: Int[Any, "B L"]
    positions: Int[Any, "B L"]
    loss_mask: Bool[Any, "B L"]
    source_ids: Int[Any, "B L"]
    scores: dict[str, Float[Any, "B L"]]


def make_batch(
    tokens: Integer[np.ndarray, "B L"],
    segment_ids: Integer[np.ndarray, "B L"],
    loss_mask: Bool[np.ndarray, "B L"] | None = None,
    source_ids: Integer[np.ndarray, "B L"] | None = None,
    scores: dict[str, Float[np.ndarray, "B L"]] | None = None,
) -> Batch:
    """A Batch from plain arrays. By default every token except padding has a loss, and there is one source."""
    # Corpora store narrow unsigned integers to save space; JAX indexes with int32.
    return Batch(
        tokens=tokens.astype(np.int32),
        segment_ids=segment_ids.astype(np.int32),
        positions=positions_from_segments(segment_ids).astype(np.int32),  # not stored: segments determine them
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
    """Reads row `rows[i]` of `corpora[which[i]]` for each i of the batch.

    Args:
      corpora: all of the same sequence length L.
      which: index in `corpora` of each row's corpus.
      rows: number of each row in its corpus.
      score_columns: columns to read as scores, for example "scores/reference/loss".
      source_maps: for each corpus, the run's id of each of its source ids; None keeps the corpus' ids.

    Returns:
      A Batch of [B, L] numpy arrays, in the order of `rows`.
    """
    names = (*COLUMNS, *score_columns)
    # One read per corpus, of all its rows at once, whose results then go to their places in the batch.
    merged: dict[str, np.ndarray] = {}  # [B, L] per column
    for i, corpus in enumerate(corpora):
        mine = np.flatnonzero(which == i)  # places in the batch
        if not len(mine):
            continue
        read = corpus.read(rows[mine], names)  # [len(mine), L] per column
        if source_maps is not None:
            read["source_ids"] = source_maps[i][read["source_ids"]]  # the corpus' ids -> the run's, per token
        for name in names:
            if name not in merged:
                merged[name] = np.empty((len(which), corpus.sequence_length), read[name].dtype)
            # Corpora may differ in dtype: uint16 and uint32 tokens, float16 and float32 scores.
            if merged[name].dtype != read[name].dtype:
                merged[name] = merged[name].astype(np.promote_types(merged[name].dtype, read[name].dtype))
            merged[name][mine] = read[name]
    scores = {name: merged[name] for name in score_columns}
    return make_batch(*(merged[name] for name in COLUMNS), scores=scores)  # its arguments are in the order of COLUMNS


def read_ahead(make: Callable[[int], Any], first: int, last: int, depth: int = 2) -> Generator[Any, None, None]:
    """Yields make(first), ..., make(last - 1), computed in a background thread up to `depth` items ahead.

    An exception in `make` is raised where the items are read. Closing the generator stops the thread.
    """
    # A thread is enough: TensorStore reads and decompresses without holding the interpreter lock.
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item: tuple[Any, BaseException | None]) -> None:
        # A put without timeout would wait forever on a full queue that nobody reads any more.
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
            except BaseException as error:  # raised again by the reader
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
