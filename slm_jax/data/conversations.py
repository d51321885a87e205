"""Conversations as documents: their text, and which of its characters carry loss."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int

from slm_jax.data.preprocess import encode_within
from slm_jax.data.readers import BadRecord
from slm_jax.data.vocabulary import Vocabulary

# Names of the roles in public data sets.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

_MARKER = re.compile(r"<\|\w+\|>")  # may be a control token of a vocabulary

# A tool's result as ToRA's responses quote it. The model itself writes the fence that opens it, to ask for the result.
_RESULT = re.compile(r"(?<=```output)\n(?:(?:.*?\n)??```\n?|.*)", re.DOTALL)


class Turn(NamedTuple):
    role: str  # system, user or assistant
    content: str


class LossSpan(NamedTuple):
    """Characters [begin, end) of a text that carry loss. `ends`: EOS follows them, with loss, even before more text."""

    begin: int
    end: int
    ends: bool


@dataclass(frozen=True)
class Template:
    """How to write the turns of a conversation one after the other.

    Attributes:
        opens: the text before the words of each role.
        closes: the text after everybody's words; it carries loss after the model's own.
        between: the text between two turns.
        ends: EOS follows every response, not only the last: it tells the model to stop where `closes` does not.
        results: a tool's results within a response carry no loss.
    """

    opens: Mapping[str, str]
    closes: str = ""
    between: str = ""
    ends: bool = True
    results: bool = False


TEMPLATES = {
    "plain": Template({"system": "", "user": "User:\n", "assistant": "Assistant:\n"}, between="\n\n"),
    # microsoft/ToRA: "<|user|>\n{question}\n<|assistant|>\n", programs and their results in ```python and ```output.
    "tora": Template(
        {"system": "<|system|>\n", "user": "<|user|>\n", "assistant": "<|assistant|>\n"}, between="\n", results=True
    ),
    "chatml": Template(
        {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
        closes="<|im_end|>",
        between="\n",
        ends=False,
    ),
}


def markers(turns: Sequence[Turn], template: Template) -> list[tuple[int, int]]:
    """Character ranges [begin, end) of the template's markers, such as <|im_start|>, in `written(turns, template)`.
    Markers inside a turn stay text."""
    found, at = [], 0
    last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    for number, turn in enumerate(turns[: last + 1]):
        between = template.between if number < last else ""
        for text, own in (
            (template.opens[turn.role], True), (turn.content, False), (template.closes, True), (between, True)
        ):  # fmt: skip
            found += [(at + marker.start(), at + marker.end()) for marker in _MARKER.finditer(text) if own]
            at += len(text)
    return found


def turns_of(value: Any, names: Sequence[str]) -> list[Turn]:
    """The turns of a list of objects, or of a list written as a JSON string.

    Args:
        value: the field of a record.
        names: of the fields of a turn for the role and the words.

    Raises:
        BadRecord: it is no such list, or a role is not one of `ROLES`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    role, content = names
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRecord(f"not a list of turns (with {role!r} and {content!r})")
    for turn in value:
        if turn.get(role) not in list(ROLES):  # a list, since the value may be unhashable
            raise BadRecord(f"unknown role ({role!r} is {turn.get(role)!r}; known are {', '.join(ROLES)})")
        if not isinstance(turn.get(content), str):
            raise BadRecord(f"a turn without text ({content!r} is {turn.get(content)!r})")
    return [Turn(ROLES[turn[role]], turn[content]) for turn in value]


def written(turns: Sequence[Turn], template: Template) -> tuple[str, list[LossSpan]]:
    """The text of a conversation up to its last response, and the responses, which carry loss.

    The EOS after the whole text carries loss too; it belongs to no span.
    """
    text, spans = "", []
    last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    for number, turn in enumerate(turns[: last + 1]):
        text += template.opens[turn.role]
        begin = len(text)
        text += turn.content + template.closes
        if turn.role == "assistant":
            spans += _learned(turn.content, begin, len(text), template, template.ends and number < last)
        text += template.between if number < last else ""
    return text, spans


def _learned(content: str, begin: int, end: int, template: Template, ends: bool) -> list[LossSpan]:
    """The characters [begin, end) of a response without the results that it quotes."""
    results = [result.span() for result in _RESULT.finditer(content)] if template.results else []
    borders = [0, *(border for span in results for border in span), end - begin]
    *before, (first, last) = zip(borders[::2], borders[1::2], strict=True)
    spans = [LossSpan(begin + first, begin + last, False) for first, last in before if last > first]
    return [*spans, LossSpan(begin + first, begin + last, ends)]


class ChatVocabulary(Vocabulary):
    """A vocabulary for prompts formatted by a template: markers in a text become control tokens, as in `prepare`."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self.kind, self.size, self.content_hash = vocabulary.kind, vocabulary.size, vocabulary.content_hash
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.pad_id, self.unk_id = vocabulary.pad_id, vocabulary.unk_id

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return encode_within(text, set(), self._vocabulary, [marker.span() for marker in _MARKER.finditer(text)])

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self._vocabulary.decode(ids)

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        return self._vocabulary.token_bytes()

    def piece(self, token: SupportsIndex) -> str:
        return self._vocabulary.piece(token)

    def control_id(self, text: str) -> int | None:
        return self._vocabulary.control_id(text)
