"""Scoring by a reference with another vocabulary, which reads the text of the corpus in its own tokens.

It reads what the model in training reads: one segment of a row at a time, after its own BOS, even if the
segment continues a document that was cut. Its losses are mapped back through the bytes of the text, see
`slm_jax.data.alignment`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from slm_jax.data.alignment import Aligned, Aligner, carried
from slm_jax.data.batches import Batch, read_ahead, read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import prefix_tokens
from slm_jax.data.packing import pack_whole
from slm_jax.data.segments import segments_of
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.models.model_config import ModelConfig

LONGER = 4  # the reference's rows have this many tokens for each token of a corpus row, if it can read them


class Segment(NamedTuple):
    """A segment of a row: the places of the tokens that the reference reads, and these tokens in its vocabulary."""

    row: int
    places: Int[np.ndarray, "T"]
    aligned: Aligned


@dataclasses.dataclass(frozen=True)
class Windows:
    """Sequences of any length packed into rows of one length, longer ones in overlapping windows.

    tokens, segment_ids: the rows [R, L]. sources: for each sequence its windows, as (first, end, at): the part of the
    sequence whose values are taken from this window, and where that part begins in the flattened rows.
    """

    tokens: Int[np.ndarray, "R L"]
    segment_ids: Int[np.ndarray, "R L"]
    sources: list[list[tuple[int, int, int]]]

    def gathered(self, values: Float[np.ndarray, "R L"]) -> Iterator[np.ndarray]:
        """Values of the rows, sequence by sequence."""
        flat = values.reshape(-1)
        for parts in self.sources:
            yield np.concatenate([flat[at : at + end - first] for first, end, at in parts])


def windows(sequences: list[np.ndarray], length: int) -> Windows:
    """Packs sequences into rows. In a sequence longer than a row, each window begins half a row after the one before it
    and counts from where that one ended, so that a token that counts has at least half a row of context."""
    starts = [list(range(0, max(1, len(s) - length + (half := max(1, length // 2))), half)) for s in sequences]
    pieces = [(number, start) for number, many in enumerate(starts) for start in many]
    lengths = np.array([min(length, len(sequences[number]) - start) for number, start in pieces], np.int64)
    packed = pack_whole(lengths, length)
    shape = (packed.num_rows, length)
    tokens, segment_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    sources: list[list[tuple[int, int, int]]] = [[] for _ in sequences]
    for (number, start), size, row, offset, segment in zip(pieces, *packed[2:6], strict=True):
        place = (row, slice(offset, offset + size))
        tokens[place], segment_ids[place] = sequences[number][start : start + size], segment
        first = sources[number][-1][1] if sources[number] else 0
        sources[number].append((first, int(start + size), int(row * length + offset + first - start)))
    return Windows(tokens, segment_ids, sources)


class CrossTokenizerScorer:
    """Losses of rows by a reference with another vocabulary; `removed`: it does not read metadata before documents."""

    def __init__(self, ours: Vocabulary, theirs: Vocabulary, model: ModelConfig, sequence_length: int, removed: bool):
        self._aligner, self._removed = Aligner(ours, theirs), removed
        self._length = min(model.max_length, LONGER * sequence_length)
        if model.vocab_size is not None and theirs.size > model.vocab_size:
            raise UserError(
                "vocabulary-too-large",
                f"the reference embeds {model.vocab_size} ids, its vocabulary has {theirs.size}: import it again",
            )

    def chunks(
        self, table: Corpus, ranges: Sequence[tuple[int, int]], score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """The losses of ranges of rows. The next range is tokenized while the devices score; `score` as in `losses`.
        Prints at the end how many tokens have no loss."""

        def tokenized(number: int) -> tuple[Batch, list[Segment]]:
            rows = np.arange(*ranges[number])
            batch = read_batch([table], np.zeros(len(rows), np.int64), rows)
            return batch, self.segments(batch)

        unread, tokens = 0, 0
        with contextlib.closing(read_ahead(tokenized, 0, len(ranges))) as ahead:
            for batch, segments in ahead:
                loss = self.losses(batch, segments, score)
                counts = batch.loss_mask & (batch.positions > 0)
                unread, tokens = unread + int((np.isnan(loss) & counts).sum()), tokens + int(counts.sum())
                yield {"loss": loss}
        print(f"score: {unread:,} of {tokens:,} tokens have no loss: the reference could not read their text")

    def segments(self, batch: Batch) -> list[Segment]:
        """All segments of rows on the host, in the reference's tokens."""
        unread = (
            prefix_tokens(batch.segment_ids, batch.loss_mask) if self._removed else np.zeros(batch.tokens.shape, bool)
        )
        found = []
        for row, start, length in segments_of(batch.segment_ids).each():
            places = start + np.flatnonzero(~unread[row, start : start + length])
            aligned = self._aligner.align(batch.tokens[row, places], batch.loss_mask[row, places])
            found.append(Segment(row, places, aligned))
        return found

    def losses(
        self, batch: Batch, segments: list[Segment], score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> Float[np.ndarray, "B L"]:
        """The loss of each token of rows on the host; 0 where it has no predecessor in its segment or is not read, NaN
        where the reference cannot represent its text.

        score: tokens and segment ids of rows [R, L] in the reference's tokens -> their losses [R, L].
        """
        rows = windows([segment.aligned.ids for segment in segments], self._length)
        result = np.zeros(batch.tokens.shape, np.float32)
        theirs = rows.gathered(score(rows.tokens, rows.segment_ids)) if segments else iter(())
        for segment, losses in zip(segments, theirs, strict=True):
            known = segment.aligned.ids != self._aligner.theirs.unk_id  # text that it cannot encode has no loss
            result[segment.row, segment.places] = carried(np.where(known, losses, np.nan), segment.aligned)
        result[batch.positions == 0] = 0.0
        return result
