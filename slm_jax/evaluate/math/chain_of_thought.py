"""Asks a model questions, finds the answers in its outputs, judges them and sums up the verdicts."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slm_jax.evaluate.math.answers import extract, extract_choice, normalise
from slm_jax.evaluate.math.equality import Grader, Verdict
from slm_jax.evaluate.math.prompts import Prompt
from slm_jax.evaluate.math.questions import Question

NORMAL_95 = 1.959964  # standard deviations around the mean that hold 95 % of a normal distribution

Row = dict[str, Any]  # a question's line of the results


@dataclasses.dataclass(frozen=True)
class Attempt:
    """text: the model's output, with its programs' outputs. ended: as `Continuation.ended`, or 'context' if the model's
    maximum length was reached. programs: how each of its programs ended (`sandbox.Ran`); None without tools."""

    text: str
    ended: str
    programs: tuple[str, ...] | None = None


Attempts = Callable[[Sequence[str], int], list[Attempt]]  # prompts and seed -> an attempt a prompt
Answered = tuple[Question, Prompt | None, list[Attempt]]


class Judge:
    """Extracts the answer from an output and judges it."""

    def __init__(self, grader: Grader):
        self._grader = grader

    @property
    def not_compared(self) -> int:
        """Comparisons so far that exceeded their time or memory and counted as not equal."""
        return self._grader.not_compared

    def answer(self, question: Question, output: str) -> str:
        return extract_choice(output) if question.choice else extract(output)

    def verdict(self, question: Question, answer: str) -> Verdict:
        if question.choice:
            return Verdict(answer == question.gold, answer == question.gold)
        return self._grader.grade(answer, question.gold, question.percent)

    def majority(self, question: Question, answers: Sequence[str]) -> str:
        """The most frequent answer, counting equal ones together; the earliest of several; '' if there is none."""

        def same(answer: str, other: str) -> bool:
            alike = answer == other
            return alike or (not question.choice and self._grader.grade(answer, other, question.percent).correct)

        groups: list[list[str]] = []
        for answer in filter(normalise, answers):
            group = next((group for group in groups if same(answer, group[0])), None)
            if group is None:
                groups.append([answer])
            else:
                group.append(answer)
        return max(groups, key=len, default=[""])[0]


def judged(question: Question, prompt: Prompt | None, attempts: Sequence[Attempt], judge: Judge) -> Row:
    """A question's row of the results: verdicts, and everything that they depend on."""
    samples: list[dict[str, Any]] = []
    before = judge.not_compared
    for attempt in attempts:
        answer = judge.answer(question, attempt.text)
        sample = {"output": attempt.text, "ended": attempt.ended, "answer": answer}
        sample |= judge.verdict(question, answer)._asdict()
        samples.append(sample if attempt.programs is None else sample | {"programs": list(attempt.programs)})
    row = {
        "number": question.number,
        "question": question.text,
        "gold": question.gold,
        "prompt": prompt.text if prompt else None,
        "shots": prompt.shots if prompt else 0,
        "samples": samples,
    }
    if len(samples) != 1:
        answer = judge.majority(question, [sample["answer"] for sample in samples])
        row["majority"] = {"answer": answer, "correct": bool(answer) and judge.verdict(question, answer).correct}
    row["not_compared"] = judge.not_compared - before
    return row


def ask(
    questions: Sequence[Question],
    prompt_of: Callable[[Question], Prompt | None],
    attempts: Attempts,
    samples: int,
    batch: int,
    done: int,
    seed: int,
) -> Iterator[list[Answered]]:
    """Asks a whole set batch by batch, each question `samples` times; yields the new questions of a batch, with prompt
    and attempts.

    Args:
        prompt_of: a question's prompt; None if it is too long for the model, which is then not asked.
        done: number of questions asked before. A batch that was asked in part is asked again as a whole, since sampling
            depends on the position in the batch, and only its new questions are yielded.
        seed: each batch derives its seed from this one and its position.
    """
    begin = done // batch * batch if done < len(questions) else done
    for first in range(begin, len(questions), batch):
        here = questions[first : first + batch]
        prompts = [prompt_of(question) for question in here]
        texts = [prompt.text for prompt in prompts if prompt is not None for _ in range(samples)]
        found = iter(attempts(texts, (seed * 1_000_003 + first) % 2**31) if texts else [])
        answered = [
            (question, prompt, [next(found) for _ in range(samples)] if prompt is not None else [])
            for question, prompt in zip(here, prompts, strict=True)
        ]
        yield answered[max(0, done - first) :]


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) for a proportion of `right` out of `count`."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracies in [0, 1] with their intervals, and how the outputs ended.

    `accuracy` is pass@1: the fraction of a question's samples that are correct, averaged over questions. `published` is
    the same by the rules of published numbers (`equality.Verdict`), `majority` that of each question's most frequent
    answer. `not_compared` counts comparisons that exceeded their time or memory.
    """

    def accuracy(rights: Sequence[float]) -> dict[str, Any]:
        low, high = wilson(sum(rights), len(rights))
        return {"accuracy": sum(rights) / len(rights), "interval": [low, high]}

    def share(row: Row, verdict: str) -> float:
        return sum(sample[verdict] for sample in row["samples"]) / max(len(row["samples"]), 1)

    samples = [sample for row in rows for sample in row["samples"]]
    summary = {"questions": len(rows), **accuracy([share(row, "correct") for row in rows])}
    summary["published"] = accuracy([share(row, "published") for row in rows])
    if any(len(row["samples"]) > 1 for row in rows):
        summary["majority"] = accuracy([float(row["majority"]["correct"]) for row in rows])
    summary["without_answer"] = sum(not sample["answer"] for sample in samples)
    summary["ended"] = dict(sorted(Counter(sample["ended"] for sample in samples).items()))
    summary["shots"] = {str(shots): count for shots, count in sorted(Counter(row["shots"] for row in rows).items())}
    summary["too_long"] = sum(not row["samples"] for row in rows)
    summary["not_compared"] = sum(row["not_compared"] for row in rows)
    if "programs" in next(iter(samples), {}):
        summary["programs"] = dict(sorted(Counter(end for sample in samples for end in sample["programs"]).items()))
    return summary
