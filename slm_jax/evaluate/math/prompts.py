"""Few-shot prompts: worked examples, separated by blank lines, and a question that the model answers.

The built-in examples follow the published ones in style and number; they were written for this project.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slm_jax.errors import UserError
from slm_jax.files import parse_json

BETWEEN = "\n\n\n"
# What a base model writes when it continues with a question of its own.
STOP = ("</s>", "\n\nQuestion:", "\n\nProblem:")


class Example(NamedTuple):
    """A question as it is asked, and a worked solution that says its answer where `answers.extract` finds it."""

    question: str
    solution: str


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
        items = parse_json(Path(path).read_bytes(), f"examples {path}", remedy)
    except OSError as error:
        raise UserError("math-examples-unreadable", f"examples {path} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError("math-examples-invalid", str(error)) from error
    if not isinstance(items, list) or not items:
        raise UserError("math-examples-invalid", f"examples {path} are not a list: {remedy}")
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in Example._fields):
            raise UserError("math-examples-invalid", f"examples {path}: number {number} has no such texts: {remedy}")
    return tuple(Example(item["question"], item["solution"]) for item in items)


# ---- The built-in examples, by style

WORDS = (
    Example(
        "A bakery bakes 24 rolls in the morning and 18 in the afternoon. It sells 35 of them. How many rolls are left?",
        "The bakery bakes 24 + 18 = 42 rolls. It sells 35 of them, so 42 - 35 = 7 rolls are left. The answer is 7.",
    ),
    Example(
        "A ticket for the zoo costs $9 for an adult and $5 for a child. How much do 2 adults and 4 children pay?",
        "The adults pay 2 * 9 = 18 dollars. The children pay 4 * 5 = 20 dollars. Together they pay 18 + 20 = 38 "
        "dollars. The answer is 38.",
    ),
    Example(
        "Lena reads 15 pages on each of the 5 working days and 40 pages on each of the 2 days of the weekend. How "
        "many pages does she read in a week?",
        "On working days she reads 5 * 15 = 75 pages. On the weekend she reads 2 * 40 = 80 pages. In the week she "
        "reads 75 + 80 = 155 pages. The answer is 155.",
    ),
    Example(
        "A tank holds 300 liters. A pump brings in 12 liters a minute, while 2 liters a minute leak out. After how "
        "many minutes is the empty tank full?",
        "Every minute 12 - 2 = 10 liters stay in the tank. It is full after 300 / 10 = 30 minutes. The answer is 30.",
    ),
    Example(
        "Tom has 3 times as many stamps as Mia. Together they have 64 stamps. How many stamps does Tom have?",
        "Mia has one part and Tom has three parts, which makes 1 + 3 = 4 parts. One part is 64 / 4 = 16 stamps. Tom "
        "has 3 * 16 = 48 stamps. The answer is 48.",
    ),
    Example(
        "A shirt costs $40. It is reduced by 25%, and a coupon takes another $6 off the reduced price. How many "
        "dollars does it cost now?",
        "The reduction is 40 * 25 / 100 = 10 dollars, so the reduced price is 40 - 10 = 30 dollars. With the coupon it "
        "costs 30 - 6 = 24 dollars. The answer is 24.",
    ),
    Example(
        "A farmer packs 150 eggs into boxes of 12. How many eggs are left over when no other box can be filled?",
        "12 boxes hold 12 * 12 = 144 eggs, and 13 boxes would need 156. So 150 - 144 = 6 eggs are left over. The "
        "answer is 6.",
    ),
    Example(
        "A train travels 90 kilometers in the first hour and 105 kilometers in each of the next 2 hours. What is its "
        "average speed in kilometers per hour?",
        "In the next two hours it travels 2 * 105 = 210 kilometers, so 90 + 210 = 300 kilometers in all. It needs 3 "
        "hours for them, which is 300 / 3 = 100 kilometers per hour. The answer is 100.",
    ),
)

_INTERVAL = (
    "Find all real numbers $x$ with $x^2 - 5x + 6 \\le 0$. Write the answer in interval notation.",
    "The left side factors as $(x - 2)(x - 3)$. A product of two factors is at most zero when one of them is at most "
    "zero and the other is at least zero. As $x - 3$ is the smaller one, this means $x - 3 \\le 0$ and $x - 2 \\ge 0$",
)
_COEFFICIENT = (
    "What is the coefficient of $x^3$ in the expansion of $(x + 2)^5$?",
    "By the binomial theorem the term with $x^3$ is $\\binom{5}{3} x^3 \\cdot 2^2$. Since $\\binom{5}{3} = 10$ and "
    "$2^2 = 4$, the coefficient is $10 \\cdot 4",
)
_HYPOTENUSE = (
    "The legs of a right triangle are $6$ and $4$ long. How long is its hypotenuse? Write the answer in simplest "
    "radical form.",
    "By the Pythagorean theorem the square of the hypotenuse is $6^2 + 4^2 = 36 + 16 = 52$. Since $52 = 4 \\cdot 13$, "
    "the hypotenuse is $\\sqrt{52}",
)
_DICE = (
    "Two fair dice are rolled. What is the probability that the sum of the two numbers is $9$?",
    "There are $6 \\cdot 6 = 36$ equally likely outcomes. The sum is $9$ for $(3, 6)$, $(4, 5)$, $(5, 4)$ and "
    "$(6, 3)$, which are $4$ outcomes. The probability is $\\frac{4}{36}",
)


def _boxed(question: str, solution: str, end: str, answer: str) -> Example:
    final = f"Final Answer: The final answer is ${answer}$. I hope it is correct."
    return Example(question, f"{solution}{end}\\boxed{{{answer}}}$.\n{final}")


PROBLEMS = (
    _boxed(*_INTERVAL, ", so the solutions are $", "[2, 3]"),
    _boxed(*_COEFFICIENT, " = ", "40"),
    _boxed(*_HYPOTENUSE, " = ", "2\\sqrt{13}"),
    _boxed(*_DICE, " = ", "\\frac{1}{9}"),
)


def choices_text(question: str, choices: tuple[str, ...] | list[str]) -> str:
    """A question with its choices, lettered from A on."""
    lettered = ", ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False))
    return f"{question}\nWhat of the following is the right choice? Explain your answer.\n{lettered}"


def _choice(question: str, choices: tuple[str, ...], solution: str, letter: str) -> Example:
    return Example(choices_text(question, choices), f"{solution}\nFinal Answer: The final answer is ({letter}).")


CHOICES = (
    _choice(_INTERVAL[0], ("$(2, 3)$", "$[-3, -2]$", "$[2, 3]$", "$[1, 6]$"), _INTERVAL[1] + ": $[2, 3]$.", "C"),
    _choice(_COEFFICIENT[0], ("40", "10", "80", "20"), _COEFFICIENT[1] + " = 40$.", "A"),
    _choice(
        _HYPOTENUSE[0],
        ("$10$", "$2\\sqrt{13}$", "$2\\sqrt{5}$", "$13\\sqrt{2}$"),
        _HYPOTENUSE[1] + " = 2\\sqrt{13}$.",
        "B",
    ),
    _choice(
        _DICE[0],
        ("$\\frac{1}{6}$", "$\\frac{5}{36}$", "$\\frac{1}{4}$", "$\\frac{1}{9}$"),
        _DICE[1] + " = \\frac{1}{9}$.",
        "D",
    ),
)

MATHQA = (
    _choice(
        "the average of 5 numbers is 18 . if one number is left out , the average of the others is 16 . which number "
        "was left out ?",
        ("20", "22", "24", "26", "30"),
        "The 5 numbers add up to 5 * 18 = 90. The 4 others add up to 4 * 16 = 64. The number left out is 90 - 64 = 26.",
        "D",
    ),
    _choice(
        "a car covers 270 km in 4.5 hours . what is its speed in km per hour ?",
        ("54", "60", "65", "72", "75"),
        "The speed is the distance by the time, 270 / 4.5 = 60 km per hour.",
        "B",
    ),
    _choice(
        "a sum of rs . 800 is lent at 5 % simple interest per year . how much interest does it bring in 3 years ?",
        ("rs . 40", "rs . 100", "rs . 120", "rs . 126", "rs . 160"),
        "In one year it brings 800 * 5 / 100 = 40. In 3 years it brings 3 * 40 = 120.",
        "C",
    ),
    _choice(
        "how many integers from 1 to 100 are divisible by 4 and by 6 ?",
        ("16", "12", "10", "9", "8"),
        "A number is divisible by 4 and by 6 when it is divisible by 12, their least common multiple. From 1 to 100 "
        "there are 8 multiples of 12, as 8 * 12 = 96 and 9 * 12 = 108.",
        "E",
    ),
)

STYLES: Mapping[str, Style] = {
    "words": Style("Question: ", "\nAnswer:", " ", WORDS),
    "problems": Style("Problem:\n", "\nSolution:", "\n", PROBLEMS),
    "choices": Style("Problem:\n", "\nSolution:", "\n", CHOICES),
    "mathqa": Style("Problem:\n", "\nSolution:", "\n", MATHQA),
}
