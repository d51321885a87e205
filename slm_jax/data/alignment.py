"""One text in two vocabularies: aligns the tokens of one with those of the other, and carries losses across.

Both are placed on one axis: the bytes of the text, and one place for every BOS and EOS. The loss of a token is spread
evenly over its bytes, and each of our tokens sums up what lies on its own bytes, so sums are preserved.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from slm_jax.data.preprocess import encode_within
from slm_jax.data.token_text import CUT
from slm_jax.data.vocabulary import Vocabulary

CHARACTER_BYTES = 4  # maximum in UTF-8: a cut leaves up to three of them


class Aligned(NamedTuple):
    """A piece of a document: T tokens of ours, N of theirs.

    Attributes:
        ids: the tokens that the reference reads, BOS first.
        theirs: [begin, end) of each of them on the axis; empty for a BOS that our piece lacks.
        ours: [begin, end) of our tokens; empty for those without a text that the reference could read.
    """

    ids: Int[np.ndarray, "N"]
    theirs: Int[np.ndarray, "N 2"]
    ours: Int[np.ndarray, "T 2"]


class Aligner:
    """From the tokens of one vocabulary to those of another."""

    def __init__(self, ours: Vocabulary, theirs: Vocabulary):
        self._ours, self.theirs = ours, theirs
        self._sizes = ours.token_bytes()

    def align(self, tokens: Integer[np.ndarray, "T"], loss_mask: Bool[np.ndarray, "T"]) -> Aligned:
        """Aligns the tokens of one segment, which begins with BOS or within a document.

        The reference's tokens begin with its BOS either way: few models work without one. No token of theirs crosses
        the end of metadata or of a prompt, where `loss_mask` changes. A character that was cut at the end of a row is
        not read.
        """
        controls = {self._ours.bos_id: self.theirs.bos_id, self._ours.eos_id: self.theirs.eos_id}
        spans, place = np.zeros((len(tokens), 2), np.int64), 0
        ids, theirs = [], []
        if not len(tokens) or tokens[0] != self._ours.bos_id:
            ids, theirs = [self.theirs.bos_id], [np.zeros((1, 2), np.int64)]
        is_text = self._sizes[tokens] > 0
        edges = [0, *(np.flatnonzero(np.diff(is_text)) + 1).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(edges if len(tokens) else []):
            if is_text[begin]:
                more, their_spans, spans[begin:end] = self._text(tokens[begin:end], loss_mask[begin:end])
            else:
                known = np.isin(tokens[begin:end], list(controls))
                more = [controls[int(token)] for token in tokens[begin:end][known]]
                if begin == 0 and tokens[0] == self._ours.bos_id:  # which may be our EOS too
                    more[0] = self.theirs.bos_id
                ends = np.cumsum(known)
                spans[begin:end] = np.stack([ends - known, ends], axis=1)
                their_spans = spans[begin:end][known]
            spans[begin:end] += place
            ids += more
            theirs.append(their_spans + place)
            place = int(spans[begin:end].max())
        return Aligned(np.array(ids, np.int64), np.concatenate(theirs), spans)

    def _text(self, tokens: np.ndarray, loss_mask: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Their ids, their spans and ours, from 0 on, of tokens that are all text."""
        sizes = self._sizes[tokens].copy()
        first, last, text = self._readable(tokens, sizes)
        sizes[:first] = sizes[last:] = 0
        ends = np.cumsum(sizes)
        character_ends = np.concatenate([[0], np.cumsum(_utf8_lengths(text))])
        changes = ends[:-1][np.diff(loss_mask)]
        ids, offsets = encode_within(text, set(np.searchsorted(character_ends, changes).tolist()), self.theirs)
        their_spans = character_ends[np.array(offsets, np.int64).reshape(-1, 2)]
        return ids, their_spans, np.stack([ends - sizes, ends], axis=1)

    def _readable(self, tokens: np.ndarray, sizes: np.ndarray) -> tuple[int, int, str]:
        """The range of tokens that make up a text, and the text; an empty range where their bytes are not its bytes.

        A vocabulary that puts a space before a text, and removes it again, has it in its first token: `sizes` is
        corrected for that.
        """
        cuts = sorted(itertools.product(range(CHARACTER_BYTES), repeat=2), key=sum)
        for left, right in cuts if len(tokens) else ():
            first, last = left, len(tokens) - right
            if first >= last:
                continue
            text = self._ours.decode(tokens[first:last].tolist())
            missing = int(sizes[first:last].sum()) - len(text.encode("utf-8"))
            if missing == 1 and len(self._ours.decode([int(tokens[first])]).encode("utf-8")) == sizes[first] - 1:
                sizes[first] -= 1
                missing = 0
            if missing == 0 and not text.startswith(CUT) and not text.endswith(CUT):
                return first, last, text
        return 0, 0, ""


def carried(losses: Float[np.ndarray, "N"], aligned: Aligned) -> Float[np.ndarray, "T"]:
    """The losses of their tokens as losses of ours; the loss of their first token, a BOS, is ignored.

    NaN for a token of ours that overlaps none of theirs, or one whose loss is not finite. The loss of a token of theirs
    without text is added to the next.
    """
    begins, ends = aligned.theirs[1:].T
    length = int(max(aligned.ours.max(initial=0), ends.max(initial=0)))
    begins = np.where(ends > begins, begins, np.minimum(begins, length - 1))
    ends = np.maximum(ends, begins + 1)
    losses = losses[1:].astype(np.float64)
    finite = np.isfinite(losses)

    def up_to(values: np.ndarray) -> np.ndarray:
        """The sum before each place of the axis, of values that are spread over their tokens' bytes."""
        steps = np.zeros(length + 1)
        np.add.at(steps, begins, values)
        np.add.at(steps, ends, -values)
        return np.concatenate([[0.0], np.cumsum(np.cumsum(steps)[:length])])

    def of_ours(values: np.ndarray) -> np.ndarray:
        total = up_to(values)
        return total[aligned.ours[:, 1]] - total[aligned.ours[:, 0]]

    result = of_ours(np.where(finite, losses, 0.0) / (ends - begins))
    return np.where((of_ours(finite * 1.0) > 0) & (of_ours(~finite * 1.0) == 0), result, np.nan)


def _utf8_lengths(text: str) -> np.ndarray:
    """Bytes of each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
