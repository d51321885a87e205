"""The place of an answer in a text, its one form, and every gold solution of GSM8K and MATH against its own answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slm_jax.data.readers import records
from slm_jax.evaluate.math.answers import LONGEST, extract, extract_choice, normalise
from slm_jax.evaluate.math.equality import Grader
from slm_jax.evaluate.math.questions import parsed

REAL = Path(__file__).parents[2] / "shared" / "data"


def shared(file: str) -> Iterator[dict[str, Any]]:
    path = REAL / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return (record.fields or {} for record in records(str(path), ()))


@pytest.mark.parametrize(
    "output, answer",
    [
        # The order of looking: each of these holds what the next would find.
        (r"So \boxed{1}. The answer is 2. Final Answer: The final answer is $3$. I hope it is correct.", "3"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}. The answer is 2.", r"\frac{1}{2}"),
        ("The answer is 2. No, the answer is 4.", "4"),
        ("Hence the final answer is 7", "7"),
        ("It costs 3 dollars, or 1,250.50 in all", "1250.50"),
        ("none", ""),
        ("", ""),
        # What is around it.
        ("The answer is: 18.", "18"),
        ("The answer is 18. I hope it is correct.", "18"),
        ("The answer is $18.50.\nQuestion: How many", "$18.50"),
        ("The answer is 3.14", "3.14"),
        ("Thus $x = \\boxed{\\text{(A)}}$ of \\boxed 5", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{unfinished", ""),
        ("He has <<2+3=5>>5 and <<5*2=10>>10 apples.", "10"),
        ("The answer is <<8=8>>8.\n#### 8", "8"),
    ],
)
def test_extraction(output: str, answer: str):
    assert extract(output) == answer


@pytest.mark.parametrize(
    "output, letter",
    [
        ("Final Answer: The final answer is (B).", "B"),
        ("so the answer is c) 12", "C"),
        ("The right choice is D, as shown", "D"),
        ("the answer is a number", ""),
        ("the answer is A because", "A"),
        ("the answer is (a) because", "A"),
        ("the answer is everything", ""),
        (r"Therefore \boxed{\text{(E)}}", "E"),
        ("Nothing.\n\nProblem: the answer is (A).", ""),
        ("12", ""),
    ],
)
def test_choices(output: str, letter: str):
    assert extract_choice(output) == letter


@pytest.mark.parametrize(
    "form, written",
    [
        (r"\frac{1}{2}", [r"\frac12", r"\dfrac{1}{2}", r"\tfrac1{2}", "1/2", r"$\frac{1}2$", r" \frac {1} {2} "]),
        (r"-\frac{2}{3}", [r"-\frac23", "-2/3"]),
        (r"2\frac{3}{4}", ["2 3/4", r"2\frac34"]),
        (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}\text{ cm}", r"\dfrac{\sqrt 3}{2}"]),
        ("1234", ["1,234", r"1,\!234", "1{,}234", "1234.0", "1,234 miles per hour", r"\$1,234", "1234."]),
        ("0.5", [".5", "0.5", r"0.5\%"]),
        ("30", [r"30^\circ", r"30^{\circ}", "30°", "30.", "x = 30", r"\theta = 30", r"30 \text{ degrees}"]),
        ("12", ["twelve", r"\text{twelve}", r"12\mbox{ cm}^2", r"12 \text{ square feet}", r"12\mathrm{~m}", "12 cm^2"]),
        ("C", [r"\text{(C)}", r"(\text{C})", "(C)", "C", r"\textbf{C}"]),
        ("2:30pm", [r"2:30\text{ p.m.}", "2:30 pm"]),
        ("3,-2", [r"3 \text{ or } -2", "3, -2", r"3\text{, and }-2"]),
        ("[-2,7]", [r"x \in [-2,7]", r"\left[ -2, 7 \right]"]),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{array}{c} 1 \\ 2 \end{array}"]),
        (r"\sqrt{2}", ["sqrt(2)", r"\sqrt2", r"\sqrt 2"]),
        (r"x^{2}+3\cdot x", ["x**2 + 3*x"]),
        ("24_5", [r"24_{5}", "24_5"]),
        (r"\cos x", [r"\cos x", r"\cos  x"]),
        ("", ["", " ", "9" * (LONGEST + 1)]),
    ],
)
def test_one_form(form: str, written: list[str]):
    assert [normalise(text) for text in written] == [form] * len(written)


@pytest.mark.parametrize(
    "text",
    ["5pm", r"5\pi", "5 pi", r"3\sqrt{2}", "2x", "3xy", r"\sin x", r"5 \text{ a.m.}", "(1,000)", "x+y=5", r"\log_2 3"],
)
def test_what_belongs_to_an_answer_stays(text: str):
    kept = normalise(text)
    assert kept and kept not in ("5", "3", "2", "1000")


def test_normalising_twice_changes_nothing_more():
    for record in shared("math_test"):
        once = normalise(record["answer"])
        assert normalise(once, thousands=False) == once


# A solution that calls a calculation "the final answer", and two whose box is empty.
EXCEPTIONS = {
    "gsm8k_train": {7157: "120"},
    "gsm8k_test": {},
    "math_train": {5529: "", 5531: ""},
    "math_test": {},
}


@pytest.mark.parametrize("file", EXCEPTIONS)
def test_every_gold_solution_is_right(file: str):
    """Of all 20,042; and the gold answer in the words of the prompts, too."""
    name = file.split("_")[0]
    field, ending = (
        ("answer", "The answer is {}.") if name == "gsm8k" else ("solution", "The final answer is ${}$. I hope")
    )
    grader, wrong = Grader(), {}
    for number, record in enumerate(shared(file)):
        question = parsed(name, record)
        assert question is not None
        outputs = [record[field], "So it is. " + ending.format(question.gold)]
        if not all(grader.grade(extract(output), question.gold).correct for output in outputs):
            wrong[number] = question.gold
    grader.close()
    assert wrong == EXCEPTIONS[file]
    assert grader.symbolic.lost == 0
