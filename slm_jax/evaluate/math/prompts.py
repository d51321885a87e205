"""Few-shot prompts: worked examples, separated by blank lines, and a question that the model answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slm_jax.errors import UserError
from slm_jax.evaluate.math.examples import CHOICES, MATHQA, PROBLEMS, WORDS, Example

BETWEEN = "\n\n\n"
# What a base model writes when it continues with a question of its own.
STOP = ("</s>", "\n\nQuestion:", "\n\nProblem:")


class Style(NamedTuple):
    """Text before and after the question, text between an example and its solution, and the style's examples."""

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


def fitting(style: Style, examples: Sequence[Example], question: str, fits: Callable[[str], bool]) -> Prompt | None:
    """The prompt with as many of the last examples as fit; None where not even the question fits."""
    for first in range(len(examples) + 1):
        prompt = few_shot(style, examples[first:], question)
        if fits(prompt.text):
            return prompt
    return None


def read_examples(path: str | Path) -> tuple[Example, ...]:
    """Reads examples from a JSON file: a list of objects with the texts `question` and `solution`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    remedy = "write a list of objects with the texts 'question' and 'solution'"
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("math-examples-unreadable", f"examples {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError("math-examples-invalid", f"examples {path} are not JSON ({error}): {remedy}") from error
    if not isinstance(items, list) or not items:
        raise UserError("math-examples-invalid", f"examples {path} are not a list: {remedy}")
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in Example._fields):
            raise UserError("math-examples-invalid", f"examples {path}: number {number} has no such texts: {remedy}")
    return tuple(Example(item["question"], item["solution"]) for item in items)
