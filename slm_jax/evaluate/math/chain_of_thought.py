"""Questions to prompts, to outputs, to answers, to verdicts."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slm_jax.evaluate.math.answers import extract, extract_choice, normalise
from slm_jax.evaluate.math.equality import Grader, Verdict
from slm_jax.evaluate.math.prompts import Prompt
from slm_jax.evaluate.math.questions import Question
from slm_jax.evaluate.math.results import Row


@dataclasses.dataclass(frozen=True)
class Attempt:
    """text: what the model wrote, and what programs answered it. ended: as `Continuation.ended`, or 'context' where the
    model could read no more. programs: how each of its programs ended (`sandbox.Ran`); None without tools."""

    text: str
    ended: str
    programs: tuple[str, ...] | None = None


Attempts = Callable[[Sequence[str], int], list[Attempt]]  # of prompts; the seed is all that chance depends on


class Judge:
    """Finds the answer in an output, and the verdict about it."""

    def __init__(self, grader: Grader):
        self._grader = grader

    @property
    def not_compared(self) -> int:
        """Comparisons so far that used up their time or memory, and counted as not equal."""
        return self._grader.not_compared

    def answer(self, question: Question, output: str) -> str:
        return extract_choice(output) if question.choice else extract(output)

    def verdict(self, question: Question, answer: str) -> Verdict:
        if question.choice:
            return Verdict(answer == question.gold, answer == question.gold)
        return self._grader.grade(answer, question.gold, question.percent)

    def majority(self, question: Question, answers: Sequence[str]) -> str:
        """The answer that most of the answers are equal to, the earliest of several; '' where there is none."""
        groups: list[list[str]] = []
        for answer in filter(normalise, answers):
            same = (group for group in groups if answer == group[0] or self._same(question, answer, group[0]))
            group = next(same, None)
            if group is None:
                groups.append([answer])
            else:
                group.append(answer)
        return max(groups, key=len, default=[""])[0]

    def _same(self, question: Question, answer: str, other: str) -> bool:
        return not question.choice and self._grader.grade(answer, other, question.percent).correct


def judged(question: Question, prompt: Prompt | None, attempts: Sequence[Attempt], judge: Judge) -> Row:
    """The row of a question: all that its verdict came from."""
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
) -> Iterator[list[tuple[Question, Prompt | None, list[Attempt]]]]:
    """Asks questions batch by batch.

    Args:
        questions: of the set.
        prompt_of: a question's prompt; None where it is too long for the model, which then is not asked.
        attempts: answers prompts.
        samples: attempts at each question.
        batch: questions that are asked together.
        done: questions that have been asked before. A batch of which some were asked is asked again, as chance gives
            an answer by its place in the batch, and those are left out of what is yielded.
        seed: of all; each batch has one of its own, which depends on nothing but this and its place.
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
