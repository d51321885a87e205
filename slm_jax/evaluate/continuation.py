"""The text of a row while its tokens are made: where it ends, and what of it will not change any more."""

import dataclasses
from collections.abc import Sequence

from slm_jax.data.vocabularies import Vocabulary

HALF = "\ufffd"  # what a decoder makes of a byte that is no character, or not yet
CONTEXT = 16  # tokens of the prompt that are decoded with the new ones


@dataclasses.dataclass(frozen=True)
class Continuation:
    """text: up to the stop or EOS, which are no part of it, and without the bytes of an unfinished last character.
    tokens: all that were made, the EOS or the one that completed the stop among them.
    ended: 'eos', 'stop', or 'length'.
    """

    text: str
    tokens: list[int]
    ended: str


class Writing:
    """One row: takes its tokens as they come, and finds the end.

    A stop is looked for in the text, so it may begin and end within tokens; where it is found does not depend on how
    many tokens come at a time.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], stop: Sequence[str]):
        self._vocabulary, self._stop = vocabulary, stop
        # Decoded with the new tokens: decoders drop a space before the first word, and a character that the prompt
        # ends within belongs to the text that completes it.
        self._context = list(prompt[-CONTEXT:])
        self._before = vocabulary.decode(self._context)
        self._tokens: list[int] = []
        self._text = ""
        self.ended: str | None = None

    def add(self, tokens: Sequence[int]) -> None:
        """The next tokens; what comes after the end is left out."""
        if self.ended:
            return
        first, eos = len(self._tokens), self._vocabulary.eos_id
        tokens = list(tokens)
        if eos in tokens:
            tokens = tokens[: tokens.index(eos) + 1]
            self.ended = "eos"
        self._tokens += tokens
        self._text = self._decode(len(self._tokens))
        if self._stopped(self._text) is None:
            return
        self.ended = "stop"
        for count in range(first + 1, len(self._tokens) + 1):
            text = self._decode(count)
            if (begin := self._stopped(text)) is not None:
                self._tokens, self._text = self._tokens[:count], text[:begin]
                return

    def __len__(self) -> int:
        """Tokens made."""
        return len(self._tokens)

    def settled(self) -> str:
        """The text that is part of the continuation whatever comes: without what may be half a character or the
        beginning of a stop."""
        if self.ended:
            return _whole(self._text)
        text = _whole(self._text)
        longest = max(map(len, self._stop), default=1) - 1
        for begin in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[begin:]) for stop in self._stop):
                return text[:begin]
        return text

    def finish(self) -> Continuation:
        """What was made; ended by its length where nothing else ended it."""
        return Continuation(_whole(self._text), self._tokens, self.ended or "length")

    def _decode(self, count: int) -> str:
        made = [token for token in self._tokens[:count] if token != self._vocabulary.eos_id]
        text = self._vocabulary.decode(self._context + made)
        before = self._before if text.startswith(self._before) else _whole(self._before)
        return text[len(before) :]

    def _stopped(self, text: str) -> int | None:
        """Where the first stop begins."""
        return min((begin for stop in self._stop if (begin := text.find(stop)) >= 0), default=None)


def _whole(text: str) -> str:
    """Without the bytes, three at most, of a last character that is not finished."""
    kept = text[-3:].rstrip(HALF)
    return text[:-3] + kept
