"""Conversations as documents: their text, and which of its characters a model learns to say."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from slm_jax.data.readers import BadRecord

# What public data sets call the one who speaks.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

# What a tool answered, as ToRA's responses quote it. The fence that opens it is the model's own: so it asks for it.
_RESULT = re.compile(r"(?<=```output)\n(?:(?:.*?\n)??```\n?|.*)", re.DOTALL)


class Turn(NamedTuple):
    role: str  # system, user or assistant
    content: str


class LossSpan(NamedTuple):
    """Characters [begin, end) of a text that carry loss. `ends`: EOS follows them, with loss, although text goes on."""

    begin: int
    end: int
    ends: bool


@dataclass(frozen=True)
class Template:
    """How the turns of a conversation are written one after the other.

    Attributes:
        opens: what stands before the words of each role.
        closes: what stands behind everybody's words; the model learns to say it behind its own.
        between: what stands between two turns.
        ends: EOS follows every response and not only the last: how the model says that it has finished where `closes`
            does not.
        results: blocks of a tool's results within a response carry no loss.
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


def turns_of(value: Any, names: Sequence[str]) -> list[Turn]:
    """The turns of a list of objects, or of a JSON string of one.

    Args:
        value: what a record has.
        names: of the two fields of a turn: who speaks, and what.

    Raises:
        BadRecord: it is no such list, or a role is not one of `ROLES`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    role, content = names
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRecord(f"not a list of turns with {role!r} and {content!r}")
    for turn in value:
        if turn.get(role) not in ROLES:
            raise BadRecord(f"a turn has {role!r} {turn.get(role)!r}: known are {', '.join(ROLES)}")
        if not isinstance(turn.get(content), str):
            raise BadRecord(f"a turn has {content!r} {turn.get(content)!r}: it is a text")
    return [Turn(ROLES[turn[role]], turn[content]) for turn in value]


def written(turns: Sequence[Turn], template: Template) -> tuple[str, list[LossSpan]]:
    """The text of a conversation up to its last response, and what of it carries loss: the responses.

    The EOS behind the whole text carries loss too, and is not among the spans' own.
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
    """A response that stands at characters [begin, end): all of them but the results that it quotes."""
    results = [result.span() for result in _RESULT.finditer(content)] if template.results else []
    borders = [0, *(border for span in results for border in span), end - begin]
    *before, (first, last) = zip(borders[::2], borders[1::2], strict=True)
    spans = [LossSpan(begin + first, begin + last, False) for first, last in before if last > first]
    return [*spans, LossSpan(begin + first, begin + last, ends)]
