"""ToRA's format with a scripted model: what is run, what the model reads, and when it ends."""

from collections.abc import Callable, Sequence

import pytest

from slm_jax.evaluate.generation import Continuation, Sampling
from slm_jax.evaluate.math import sandbox as sandbox_lib
from slm_jax.evaluate.math.answers import extract
from slm_jax.evaluate.math.chain_of_thought import Attempt
from slm_jax.evaluate.math.sandbox import Ran, Sandbox
from slm_jax.evaluate.math.tool_use import RESULT_CHARACTERS, STOP, attempts_with_tools, program, tool_prompt

FIRST = "Let us count.\n```python\nprint(6 * 7)\n```\n"


class Script:
    """A model that goes on, behind a text that ends with a key, with its value; and says what it was asked."""

    def __init__(self, lines: dict[str, str]):
        self.lines, self.asked, self.how = lines, [], []

    def __call__(self, texts: Sequence[str], sampling: Sampling) -> list[Continuation]:
        self.asked.append(list(texts))
        self.how.append(sampling)
        return [self._continued(text, sampling) for text in texts]

    def _continued(self, text: str, sampling: Sampling) -> Continuation:
        line = next(value for key, value in self.lines.items() if text.endswith(key))
        cut = min((line.find(stop) for stop in sampling.stop if stop in line), default=-1)
        return Continuation(line[:cut] if cut >= 0 else line, [], "stop" if cut >= 0 else "eos")


def calculated(programs: Sequence[str]) -> list[Ran]:
    """What the programs of these tests print, without running them."""
    answers = {
        "print(6 * 7)\n": Ran("42\n", "", "done"),
        "1 / 0\n": Ran("", "ZeroDivisionError: division by zero", "error"),
    }
    return [answers.get(code, Ran("7\n", "", "done")) for code in programs]


def ask(
    script: Script, questions: Sequence[str], rounds: int = 4, room: int = 10**6, run: Callable = calculated
) -> list[Attempt]:
    prompts = [tool_prompt(question).text for question in questions]
    return attempts_with_tools(script, Sampling(64, seed=5), prompts, run, rounds, lambda text: len(text) <= room)


def test_the_program_runs_and_its_output_is_read():
    script = Script({"<|assistant|>\n": FIRST + "```output\n41\n```\n", "42\n```\n": r"It is $\boxed{42}$."})
    [attempt] = ask(script, ["What is 6 times 7?"])
    told = FIRST.rstrip("\n") + "\n```output\n42\n```\n"
    assert script.asked == [
        ["<|user|>\nWhat is 6 times 7?\n<|assistant|>\n"],
        [f"<|user|>\nWhat is 6 times 7?\n<|assistant|>\n{told}"],
    ]
    assert attempt == Attempt(told + r"It is $\boxed{42}$.", "eos", ("done",))
    assert extract(attempt.text) == "42"
    assert all(how.stop == STOP for how in script.how) and script.how[0].seed != script.how[1].seed


def test_errors_are_told_too():
    script = Script({"<|assistant|>\n": "```python\n1 / 0\n```\n```output", "division by zero\n```\n": r"\boxed{0}"})
    [attempt] = ask(script, ["q"])
    assert attempt.text == "```python\n1 / 0\n```\n```output\nZeroDivisionError: division by zero\n```\n\\boxed{0}"
    assert attempt.programs == ("error",)


def test_long_outputs_are_shortened():
    script = Script({"<|assistant|>\n": FIRST + "```output", "```\n": r"\boxed{1}"})
    long = "a" * 5000 + "b" * 5000
    [attempt] = ask(script, ["q"], run=lambda programs: [Ran(long, "", "done")])
    shown = attempt.text.split("```output\n")[1].split("\n```")[0]
    assert len(shown) == RESULT_CHARACTERS + 3 and shown.startswith("aaa") and shown.endswith("bbb") and "..." in shown


def test_a_model_that_goes_on_for_ever_runs_four_programs():
    script = Script({"": "```python\nprint(7)\n```\n```output"})
    [attempt] = ask(script, ["q"])
    assert len(script.asked) == 5 and attempt.programs == ("done",) * 4 and attempt.ended == "stop"
    assert attempt.text.count("```python") == 5 and attempt.text.count("```output\n7\n```\n") == 4
    [attempt] = ask(script, ["q"], rounds=1)
    assert attempt.programs == ("done",) and len(script.asked) == 7


def test_the_output_of_the_last_program_is_read():
    script = Script({"<|assistant|>\n": FIRST + "```output", "42\n```\n": r"It is $\boxed{42}$."})
    [attempt] = ask(script, ["q"], rounds=1)
    assert extract(attempt.text) == "42" and attempt.programs == ("done",) and attempt.ended == "eos"


def test_each_question_goes_its_own_way():
    """One answers at once, one needs a program, one is stopped elsewhere: each round asks those that go on."""
    lines = {
        "one?\n<|assistant|>\n": r"\boxed{1}",
        "two?\n<|assistant|>\n": FIRST + "```output",
        "three?\n<|assistant|>\n": "3\n\n---\n```python\nprint(1)\n```\n",
        "42\n```\n": r"\boxed{42}",
    }
    script = Script(lines)
    found = ask(script, ["one?", "two?", "three?"])
    assert [extract(attempt.text) for attempt in found] == ["1", "42", "3"]
    assert [attempt.programs for attempt in found] == [(), ("done",), ()]
    assert [len(texts) for texts in script.asked] == [3, 1]


def test_no_room_ends_an_attempt():
    script = Script({"<|assistant|>\n": FIRST + "```output", "42\n```\n": r"\boxed{42}"})
    prompt = tool_prompt("q").text
    [attempt] = ask(script, ["q"], room=len(prompt) + len(FIRST))
    assert attempt.ended == "context" and attempt.programs == ("done",) and len(script.asked) == 1
    [attempt] = ask(script, ["q"], room=len(prompt) - 1)
    assert attempt == Attempt("", "context", ()) and len(script.asked) == 1


@pytest.mark.parametrize(
    "text, code",
    [
        (FIRST, "print(6 * 7)\n"),
        ("```python\na\n```\nno\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nand so on", None),
        ("```python\nunfinished", None),
        ("no program", None),
        ("```output\n```python\n", None),
    ],
)
def test_the_program_that_a_text_ends_with(text, code):
    assert program(text) == code


def test_what_a_program_prints_is_no_program():
    """A printed block runs no more than any other text that the model did not write."""
    script = Script({"<|assistant|>\n": FIRST + "```output", "```\n": r"\boxed{1}"})
    ran: list[str] = []

    def run(programs: Sequence[str]) -> list[Ran]:
        ran.extend(programs)
        return [Ran("```python\nprint(666)\n```", "", "done")] * len(programs)

    ask(script, ["q"], run=run)
    assert ran == ["print(6 * 7)\n"]


@pytest.mark.skipif(sandbox_lib._problem() is not None, reason="no sandbox here: Debian's package is bubblewrap")
def test_with_the_sandbox():
    lines = {
        "roots?\n<|assistant|>\n": "```python\nfrom sympy.abc import x\nfrom sympy import solve\n"
        "print(solve(x**2 - 5*x + 6))\n```\n```output",
        "[2, 3]\n```\n": r"The sum is $\boxed{5}$.",
        "bomb?\n<|assistant|>\n": "```python\nimport os\nwhile True: os.fork()\n```\n```output",
        "unavailable\n```\n": r"$\boxed{7}$",
    }
    sandbox = Sandbox(seconds=60)
    found = ask(Script(lines), ["roots?", "bomb?"], run=sandbox.run_all)
    assert [extract(attempt.text) for attempt in found] == ["5", "7"]
    assert [attempt.programs for attempt in found] == [("done",), ("error",)]
