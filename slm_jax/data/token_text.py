"""The characters of a text that each of its tokens represents, from the ids alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from slm_jax.data.vocabulary import Vocabulary

CONTEXT = 16  # tokens decoded before a token, for vocabularies whose text depends on neighbours
CUT = "\ufffd"  # decoders write it for bytes that are not, or not yet, a character


class TokenText:
    """Reads the tokens of one vocabulary as text."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._empty = vocabulary.token_bytes() == 0  # slow: computed once for all texts

    def spans(self, ids: Sequence[int]) -> tuple[str, Int[np.ndarray, "N 2"]]:
        """The text of `ids`, and the [begin, end) characters of it that each of them represents.

        Tokens that are bytes of one character share its span. Control ids (BOS, EOS, padding) have an empty span at
        their place.
        """
        parts: list[str] = []
        spans = np.zeros((len(ids), 2), np.int64)
        begin = first = 0
        for last, text in self._pieces(ids):
            spans[first : last + 1] = begin, begin + len(text)
            parts.append(text)
            begin, first = begin + len(text), last + 1
        return "".join(parts), spans

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds. A character of several tokens is given to the last of them; control ids add
        their name."""
        text, spans = self.spans(ids)
        shared = np.zeros(len(ids), bool)
        shared[:-1] = (spans[:-1] == spans[1:]).all(axis=1) & (spans[:-1, 1] > spans[:-1, 0])
        return [
            self._vocabulary.piece(token) if self._empty[token] else "" if cut else text[begin:end]
            for token, cut, (begin, end) in zip(ids, shared.tolist(), spans.tolist(), strict=True)
        ]

    def _pieces(self, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """(last token, text) of the shortest runs of tokens that end where a character ends, in order.

        The text of a token is what it adds to the decoded text of the tokens before it: some vocabularies drop the
        space of a first token, and bytes become a character only together. A window keeps the work linear in the number
        of tokens.
        """
        decode = self._vocabulary.decode
        anchor, known, pending = 0, "", ""
        for i, token in enumerate(ids):
            if self._empty[token]:
                if pending:
                    yield i - 1, pending
                yield i, ""
                anchor, known, pending = i + 1, "", ""
                continue
            text = decode(ids[anchor : i + 1])
            pending = text[len(known) :]
            if text.endswith(CUT):
                continue
            yield i, pending
            known, pending = text, ""
            if i - anchor >= 2 * CONTEXT:
                anchor = i + 1 - CONTEXT
                known = decode(ids[anchor : i + 1])
        if pending:
            yield len(ids) - 1, pending
