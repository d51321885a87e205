"""Few-shot prompts: worked examples, three empty lines apart, and a question whose answer is to be continued."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slm_jax.errors import UserError
from slm_jax.evaluate.math.examples import CHOICES, MATHQA, PROBLEMS, WORDS, Example

BETWEEN = "\n\n\n"
# What a base model writes when it begins with the next question itself.
STOP = ("</s>", "\n\nQuestion:", "\n\nProblem:")


class Style(NamedTuple):
    """before, after: the question; after it the solution begins. Of an example, `join` stands before the solution."""

    before: str
    after: str
    join: str
    examples: tuple[Example, ...]

    def ask(self, question: str) -> str:
        return f"{self.before}{question}{self.after}"

    def show(self, example: Example) -> str:
        return f"{self.ask(example.question)}{self.join}{example.solution}"


STYLES: Mapping[str, Style] = {
    "words": Style("Question: ", "\nAnswer:", " ", WORDS),
    "problems": Style("Problem:\n", "\nSolution:", "\n", PROBLEMS),
    "choices": Style("Problem:\n", "\nSolution:", "\n", CHOICES),
    "mathqa": Style("Problem:\n", "\nSolution:", "\n", MATHQA),
}


class Prompt(NamedTuple):
    text: str
    shots: int


def few_shot(style: Style, examples: Sequence[Example], question: str) -> Prompt:
    return Prompt(BETWEEN.join([*map(style.show, examples), style.ask(question)]), len(examples))


def fitting(
    style: Style, examples: Sequence[Example], question: str, tokens: Callable[[str], int], room: int
) -> Prompt | None:
    """The prompt with as many examples, the last ones, as have room; None where not even the question has.

    Args:
        style: of the question.
        examples: all that are wanted.
        question: its text.
        tokens: the length of a text in tokens.
        room: tokens of the longest prompt.
    """
    for first in range(len(examples) + 1):
        prompt = few_shot(style, examples[first:], question)
        if tokens(prompt.text) <= room:
            return prompt
    return None


def read_examples(path: str | Path) -> tuple[Example, ...]:
    """Examples of a JSON file: a list of objects with `question` and `solution`, as they are to be read.

    Raises:
        UserError: it is something else.
    """
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"examples {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"examples {path} are not JSON: {error}") from error
    fields = ("question", "solution")
    if not isinstance(items, list) or not items:
        raise UserError(f"examples {path}: takes a list of objects with 'question' and 'solution'")
    for place, item in enumerate(items, 1):
        if not isinstance(item, dict) or not all(isinstance(item.get(field), str) for field in fields):
            raise UserError(
                f"examples {path}: number {place} is not an object with the texts 'question' and 'solution'"
            )
    return tuple(Example(item["question"], item["solution"]) for item in items)
