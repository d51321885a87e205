"""The stage `evaluate math`: what is asked, recorded and summed up, with a scripted model; and with a real one."""

import dataclasses
import json
import math
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import toy

from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Continuation, Generator, Sampling
from slm_jax.evaluate.math import evaluate_math as stage
from slm_jax.evaluate.math import sandbox as sandbox_lib
from slm_jax.evaluate.math.chain_of_thought import Judge, wilson
from slm_jax.evaluate.math.equality import Grader
from slm_jax.evaluate.math.evaluate_math import evaluate_math
from slm_jax.evaluate.math.prompts import STOP
from slm_jax.evaluate.math.questions import Question
from slm_jax.evaluate.math.sandbox import Ran, Sandbox
from slm_jax.evaluate.math.symbolic import Symbolic

# Ten sums; the scripted model below knows the first six.
SUMS = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(10)]
CHOICES = [{"question": f"{n}+1?", "choices": ["1", "2", "3", "4"], "answer": n} for n in range(4)]


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, records in (("svamp", SUMS), ("mmlu_stem", CHOICES)):
        (folder / f"{name}_test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


class Scripted(Generator):
    """Answers the last question of a prompt by rule; a token is a byte."""

    calls: ClassVar[list[tuple[list[str], Sampling]]] = []
    context = 4000

    def __init__(self, params, model, vocabulary, mesh, batch_size=8):
        self.model, self.batch_size = dataclasses.replace(model, max_length=self.context), batch_size

    def encode(self, text: str, prefix: str = "") -> list[int]:
        return [1, *text.encode()]

    def complete(self, texts: Sequence[str], sampling: Sampling, prefix: str = "") -> list[Continuation]:
        assert all(len(self.encode(text)) + sampling.max_new_tokens <= self.context for text in texts)
        type(self).calls.append((list(texts), sampling))
        return [self.answer(text, place, sampling) for place, text in enumerate(texts)]

    @staticmethod
    def answer(text: str, place: int, sampling: Sampling) -> Continuation:
        n = int(re.findall(r"(\d)\+\d\?", text)[-1])
        if "Explain your answer" in text:
            return Continuation(f" So.\nFinal Answer: The final answer is ({'ABCD'[n]}).", [], "stop")
        return Continuation(f" {n} and {n}. The answer is {2 * n if n < 6 else 77}.", [], "stop")


@pytest.fixture
def scripted(monkeypatch) -> type[Scripted]:
    monkeypatch.setattr(Scripted, "calls", [])
    monkeypatch.setattr(stage, "Generator", Scripted)
    return Scripted


@pytest.fixture
def ask(reference, data, tmp_path) -> Callable[..., dict]:
    def ask(**settings) -> dict:
        wanted = {"sets": ["svamp"], "data": str(data), "output": str(tmp_path / "solved"), "max_new_tokens": 64}
        with toy.one_device():
            return evaluate_math(str(reference), **{**wanted, **settings})

    return ask


def rows(folder: Path, name: str = "svamp") -> list[dict]:
    return [json.loads(line) for line in (folder / "solved" / f"{name}.jsonl").read_text().splitlines()]


def test_accuracy_and_all_that_it_came_from(ask, scripted, tmp_path):
    record = ask(sets=["svamp", "mmlu_stem"])
    summary = record["results"]["svamp"]
    assert (summary["questions"], summary["accuracy"], summary["published"]["accuracy"]) == (10, 0.6, 0.6)
    assert summary["interval"] == list(wilson(6, 10))
    assert summary["ended"] == {"stop": 10} and summary["shots"] == {"8": 10} and "majority" not in summary
    assert summary["first_ids"] == [1, *b"Question: A bak"]
    assert record["results"]["mmlu_stem"]["accuracy"] == 1.0 and record["results"]["mmlu_stem"]["shots"] == {"4": 4}
    assert record["stop"] == STOP and record["step"] == 6
    written = json.loads((tmp_path / "solved" / "summary.json").read_text())
    assert written["results"] == json.loads(json.dumps(record["results"]))
    row = rows(tmp_path)[7]
    assert row["prompt"].endswith("Question: 7+7?\nAnswer:") and row["prompt"].startswith("Question: A bakery")
    assert (row["number"], row["question"], row["gold"], row["shots"]) == (7, "7+7?", "14", 8)
    [sample] = row["samples"]
    assert sample == {
        "output": " 7 and 7. The answer is 77.",
        "ended": "stop",
        "answer": "77",
        "correct": False,
        "published": False,
    }
    assert [row["samples"][0]["answer"] for row in rows(tmp_path, "mmlu_stem")] == ["A", "B", "C", "D"]
    assert all(sampling.stop == STOP and sampling.temperature == 0 for _, sampling in scripted.calls)
    assert all(sampling.max_new_tokens == 64 for _, sampling in scripted.calls)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_killed_command_asks_what_is_left(drawn, ask, scripted, tmp_path, monkeypatch):
    """After any batch, and also within the writing of one; the results are those of a command that was not killed."""
    settings = {"samples": 2, "temperature": 0.7} if drawn else {}

    def answer(text: str, place: int, sampling: Sampling) -> Continuation:
        return Continuation(f" The answer is {(sampling.seed + place) % 11}.", [], "stop")

    if drawn:
        monkeypatch.setattr(scripted, "answer", staticmethod(answer))
    whole = ask(batch_size=1, output=str(tmp_path / "whole"), **settings)["results"]
    expected = (tmp_path / "whole" / "svamp.jsonl").read_bytes()
    total = len(scripted.calls)
    assert total == (5 if drawn else 3)

    def fails(*_):
        raise KeyboardInterrupt

    complete = scripted.complete
    partial = tmp_path / "solved" / "svamp.jsonl.partial"
    for cut in (0, 10):
        scripted.calls.clear()
        monkeypatch.setattr(scripted, "complete", lambda *a: fails() if len(scripted.calls) == 2 else complete(*a))
        with pytest.raises(KeyboardInterrupt):
            ask(batch_size=1, **settings)
        kept = partial.read_bytes()
        assert expected.startswith(kept) and 0 < len(kept) < len(expected)
        partial.write_bytes(kept[: len(kept) - cut])
        scripted.calls.clear()
        monkeypatch.setattr(scripted, "complete", complete)
        assert ask(batch_size=1, **settings)["results"] == whole
        assert (tmp_path / "solved" / "svamp.jsonl").read_bytes() == expected
        assert len(scripted.calls) == total - 2 + (cut > 0)
        (tmp_path / "solved" / "svamp.jsonl").unlink()
    ask(batch_size=1, **settings)
    scripted.calls.clear()
    assert ask(batch_size=1, **settings)["results"] == whole and not scripted.calls


def test_answers_of_other_settings_are_kept_aside(ask, scripted, tmp_path, monkeypatch):
    ask(shots=2)
    scripted.calls.clear()
    ask(shots=1)
    assert len(scripted.calls[0][0]) == 10
    assert {row["shots"] for row in rows(tmp_path)} == {1}
    assert {row["shots"] for row in rows(tmp_path, "svamp.before1")} == {2}
    monkeypatch.setattr(stage.importlib.metadata, "version", lambda package: "99")
    ask(shots=1)  # graded by others
    assert {row["shots"] for row in rows(tmp_path, "svamp.before2")} == {1}


def test_sets_come_together_in_the_summary(ask, scripted, tmp_path):
    """Where model and settings are the same; else the first summary is kept as another file."""

    def summary(name: str = "summary") -> dict:
        return json.loads((tmp_path / "solved" / f"{name}.json").read_text())

    first = ask()
    ask(sets=["mmlu_stem"])
    assert {name: found["accuracy"] for name, found in summary()["results"].items()} == {"svamp": 0.6, "mmlu_stem": 1.0}
    assert list(summary()["files"]) == ["svamp", "mmlu_stem"]
    assert summary()["results"]["svamp"] == json.loads(json.dumps(first["results"]["svamp"]))
    ask(sets=["mmlu_stem"], max_new_tokens=32)
    assert list(summary()["results"]) == ["mmlu_stem"] and summary()["max_new_tokens"] == 32
    assert list(summary("summary.before1")["results"]) == ["svamp", "mmlu_stem"]


def test_comparisons_that_were_given_up_are_counted_by_question(ask, scripted, tmp_path, monkeypatch):
    """The same sum by a command that asks nothing; and of an answer that was met before."""

    def answer(text: str, place: int, sampling: Sampling) -> Continuation:
        n = int(re.findall(r"(\d)\+\d\?", text)[-1])
        return Continuation(f" The answer is ${'9^{9^{9^{9}}}+1/3' if n < 2 else 2 * n}$.", [], "stop")

    (tmp_path / "data" / "svamp_test.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}+{n}?", "answer": "1/3"}) + "\n" for n in range(3))
    )
    monkeypatch.setattr(scripted, "answer", staticmethod(answer))
    monkeypatch.setattr(stage, "Grader", lambda: Grader(Symbolic(seconds=0.3)))
    assert ask()["results"]["svamp"]["not_compared"] == 2
    assert [row["not_compared"] for row in rows(tmp_path)] == [1, 1, 0]
    scripted.calls.clear()
    assert ask()["results"]["svamp"]["not_compared"] == 2 and not scripted.calls


def test_several_samples_and_their_majority(ask, scripted, tmp_path, monkeypatch):
    """Of three samples two are right for even sums, one for odd: pass@1 is the mean, the majority is right for half."""

    def answer(text: str, place: int, sampling: Sampling) -> Continuation:
        n = int(re.findall(r"(\d)\+\d\?", text)[-1])
        right = place % 3 < (2 if n % 2 == 0 else 1)
        return Continuation(f" The answer is {2 * n if right else 99}{'.0' if place % 2 else ''}.", [], "stop")

    monkeypatch.setattr(scripted, "answer", staticmethod(answer))
    summary = ask(samples=3, temperature=0.7, top_p=0.9)["results"]["svamp"]
    assert summary["accuracy"] == pytest.approx(0.5)
    assert summary["majority"]["accuracy"] == 0.5 and summary["majority"]["interval"] == list(wilson(5, 10))
    first, second = rows(tmp_path)[2:4]
    assert len(first["samples"]) == 3 and first["majority"]["correct"] and not second["majority"]["correct"]
    assert {sampling.top_p for _, sampling in scripted.calls} == {0.9}


def test_majority_counts_equal_answers_and_prefers_the_earliest():
    grader = Grader()
    judge, question = Judge(grader), Question("q", "1/2")
    assert judge.majority(question, ["3", "0.5", r"\frac{1}{2}", "4"]) == "0.5"
    assert judge.majority(question, ["3", "", "4", ""]) == "3"
    assert judge.majority(question, ["", ""]) == ""
    assert judge.majority(Question("q", "A", choice=True), ["B", "A", "A"]) == "A"
    grader.close()


def test_examples_are_dropped_where_the_model_reads_too_little(ask, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(scripted, "context", 700)
    summary = ask()["results"]["svamp"]
    [shots] = summary["shots"]
    assert 0 < int(shots) < 8 and summary["accuracy"] == 0.6
    prompt = rows(tmp_path)[0]["prompt"]
    assert prompt.count("The answer is") == int(shots) and "A train travels" in prompt and "A bakery" not in prompt


def test_questions_that_are_too_long_are_wrong_and_counted(ask, scripted, data, tmp_path):
    with (data / "svamp_test.jsonl").open("a") as file:
        file.write(json.dumps({"question": f"{'so ' * 2000} 1+1?", "answer": "2"}) + "\n")
    summary = ask()["results"]["svamp"]
    assert summary["questions"] == 11 and summary["accuracy"] == pytest.approx(6 / 11) and summary["too_long"] == 1
    last = rows(tmp_path)[-1]
    assert last["prompt"] is None and last["samples"] == []


def test_new_tokens_are_half_of_what_the_model_reads_at_most(ask, scripted, capsys):
    assert ask(max_new_tokens=100_000)["max_new_tokens"] == 2000
    assert "evaluate math: 2000 new tokens instead of 100000: the model reads 4000" in capsys.readouterr().out


def test_examples_of_the_user_and_no_examples(ask, scripted, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"question": "0+0?", "solution": "Nothing. The answer is 0."}] * 3))
    ask(examples={"svamp": str(path)}, shots=2)
    assert rows(tmp_path)[1]["prompt"] == "\n\n\n".join(
        ["Question: 0+0?\nAnswer: Nothing. The answer is 0."] * 2 + ["Question: 1+1?\nAnswer:"]
    )
    ask(shots=0)
    assert rows(tmp_path)[1]["prompt"] == "Question: 1+1?\nAnswer:"


def test_with_tools(ask, scripted, tmp_path, monkeypatch):
    def answer(text: str, place: int, sampling: Sampling) -> Continuation:
        if text.endswith("<|assistant|>\n"):
            n = int(re.findall(r"(\d)\+\d\?", text)[-1])
            return Continuation(f"```python\nprint({n} + {n})\n```\n", [], "stop")
        return Continuation(rf"It is $\boxed{{{text.split('```')[-2].split()[-1]}}}$.", [], "eos")

    def run_all(self, programs: Sequence[str]) -> list[Ran]:
        return [Ran(f"{2 * int(code[6])}\n", "", "done") for code in programs]

    monkeypatch.setattr(scripted, "answer", staticmethod(answer))
    monkeypatch.setattr(Sandbox, "run_all", run_all)
    monkeypatch.setattr(sandbox_lib, "_problem", lambda: None)
    summary = ask(tools=True, rounds=3)["results"]["svamp"]
    assert summary["accuracy"] == 1.0 and summary["programs"] == {"done": 10} and summary["shots"] == {"0": 10}
    row = rows(tmp_path)[4]
    assert row["prompt"] == "<|user|>\n4+4?\n<|assistant|>\n"
    output = "```python\nprint(4 + 4)\n```\n```output\n8\n```\nIt is $\\boxed{8}$."
    assert row["samples"][0]["output"] == output and row["samples"][0]["programs"] == ["done"]


def test_tools_without_a_sandbox_are_refused_before_anything_is_loaded(ask, scripted, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox_lib, "_problem", lambda: "bubblewrap (bwrap) is not installed")
    monkeypatch.setattr(stage, "load_model", None)
    assert "bubblewrap" in toy.refused("sandbox-not-working", ask, tools=True)
    assert not (tmp_path / "solved").exists()


@pytest.mark.parametrize(
    "settings, code, named",
    [
        ({"sets": []}, "math-invalid-sets", "evaluate_math.sets ()"),
        ({"sets": ["svamp", "svamp"]}, "math-invalid-sets", "svamp"),
        ({"sets": ["svamq"]}, "setting-unknown-value", "'svamq'"),
        ({"sets": ["gsm8k"]}, "math-set-not-found", "gsm8k"),
        ({"samples": 4}, "sampling-greedy", "evaluate_math.samples = 4"),
        ({"samples": 0}, "setting-out-of-range", "evaluate_math.samples is 0"),
        ({"questions": 0}, "setting-out-of-range", "evaluate_math.questions is 0"),
        ({"shots": -1}, "setting-out-of-range", "evaluate_math.shots is -1"),
        ({"examples": {"math": "x.json"}}, "math-examples-of-other-set", "'math'"),
    ],
)
def test_mistakes_are_refused(settings, code, named, ask, scripted, tmp_path):
    assert named in toy.refused(code, ask, **settings)
    assert not (tmp_path / "solved").exists() and not scripted.calls


def test_a_missing_grader_is_refused(ask, scripted, monkeypatch):
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None)
    assert "pip install latex2sympy2_extended[" in toy.refused("math-grader-not-installed", ask)


def test_wilson():
    """Against the roots of its defining equation, (p - share)^2 = z^2 p (1 - p) / n."""
    for right, count in ((0, 20), (6, 10), (500, 1000), (32, 32), (2.5, 7)):
        low, high = wilson(right, count)
        for p in (low, high):
            difference = (p - right / count) ** 2 - 1.959964**2 * p * (1 - p) / count
            assert math.isclose(difference, 0, abs_tol=1e-9)
        assert 0 <= low <= right / count <= high <= 1
    assert wilson(0, 20)[0] == 0 and wilson(32, 32)[1] == 1 and wilson(0, 0) == (0, 1)


def test_a_real_model_from_the_command_line(shell, reference, data, tmp_path):
    """The toy model reads 64 bytes: there is no room for examples. Given again, the command asks nothing."""
    command = ["evaluate", "math", f"--run={reference}", f"--data={data}", f"--output={tmp_path / 'solved'}"]
    command += toy.settings(evaluate_math={"sets": ["svamp"], "max_new_tokens": 16, "batch_size": 4, "questions": 6})
    code, output, errors = shell(*command, folder=tmp_path)
    assert code == 0, errors
    assert (
        f"evaluate math: step 6 of {reference} on 6 questions of svamp, by chain of thought -> {tmp_path}/solved"
        in output
    )
    assert re.search(r"  svamp: 0\.\d{3} \(0\.000 to 0\.\d{3}\) of 6", output)
    found = rows(tmp_path)
    assert [row["number"] for row in found] == list(range(6))
    assert all(row["prompt"] == f"Question: {row['question']}\nAnswer:" and row["shots"] == 0 for row in found)
    assert all(sample["ended"] in ("eos", "stop", "length") for row in found for sample in row["samples"])
    before = (tmp_path / "solved" / "svamp.jsonl").read_bytes()
    code, again, _ = shell(*command, folder=tmp_path)
    assert code == 0 and again == output and (tmp_path / "solved" / "svamp.jsonl").read_bytes() == before


@pytest.mark.slow
def test_two_processes_answer_as_one(reference, data, tmp_path, shell):
    """The first judges and writes; with tools it runs the programs, of which this model writes none."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = toy.settings(evaluate_math={"sets": ["svamp"], "max_new_tokens": 8, "batch_size": 8})
    command = ["evaluate", "math", f"--run={reference}", f"--data={data}", *settings]
    pair = []
    for index in (0, 1):
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        shared = [*command, f"--output={tmp_path / 'solved'}"]
        pair.append(toy.Command(tmp_path / f"log{index}", *shared, environment=names, devices=4))
    (code, output), (other_code, other) = (process.finish() for process in pair)
    assert (code, other_code) == (0, 0), output + other
    assert "evaluate math: done" in output and "evaluate math:" not in other
    code, _, errors = shell(*command, f"--output={tmp_path / 'one' / 'solved'}", folder=tmp_path)
    assert code == 0, errors
    assert [row["samples"] for row in rows(tmp_path)] == [row["samples"] for row in rows(tmp_path / "one")]


def test_settings_of_the_sandbox_are_checked(ask):
    with pytest.raises(UserError):
        ask(sandbox=Sandbox(processes=0))
