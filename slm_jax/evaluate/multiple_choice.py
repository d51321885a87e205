"""Multiple choice by log-likelihood: measures of the choices' likelihoods, and an evaluator for the training loop.

Small models answer near chance. The margin between the right and the best wrong choice and the loss of the right one
move long before the accuracy does.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from slm_jax.configurable import Count, configurable
from slm_jax.data.readers import records, resolve
from slm_jax.errors import UserError
from slm_jax.evaluate.likelihood import Likelihoods, Pair, encode_pair, head_ids
from slm_jax.evaluate.perplexity import Measure
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import fitting_vocabulary


class Scored(NamedTuple):
    """One question: log p of each choice in nats, the choices' characters, and which is right."""

    totals: Sequence[float]
    characters: Sequence[int]
    gold: int


class Estimate(NamedTuple):
    """A mean over questions and its standard error; the error is None for a single question."""

    mean: float
    stderr: float | None


def measures(questions: Sequence[Scored]) -> dict[str, Estimate]:
    """Means over questions, raw and with log-likelihoods divided by the characters of their choice:

    `accuracy`: fraction whose right choice is the most likely one, of equals the first; `margin`: log p of the right
    choice minus that of the best wrong one, nats; `gold_loss`: -log p of the right one, nats.
    """
    found: dict[str, list[float]] = {}
    for totals, characters, gold in questions:
        each = np.asarray(totals, np.float64)
        for suffix, values in (("", each), ("_per_character", each / np.maximum(characters, 1))):
            wrong = np.delete(values, gold)
            found.setdefault(f"accuracy{suffix}", []).append(float(np.argmax(values) == gold))
            found.setdefault(f"margin{suffix}", []).append(float(values[gold] - wrong.max(initial=-np.inf)))
            found.setdefault(f"gold_loss{suffix}", []).append(-float(values[gold]))
    return {name: estimate(values) for name, values in found.items()}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and its standard error, from the sample standard deviation."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)))


class Question(NamedTuple):
    text: str
    choices: list[str]
    gold: int


def read_questions(file: str, limit: int | None, owner: str) -> list[Question]:
    """The first questions of a JSONL or Parquet file with the fields question, choices and answer.

    `choices` is a list of texts; `answer` is one of them, or its letter (A, B, ...), or its index from 0.

    Raises:
      UserError: no such file, or a record that is not such a question; the message names `owner`.
    """
    (path,) = resolve([file], owner)
    questions = []
    for record in records(path, ("question", "choices", "answer")):
        if limit is not None and len(questions) == limit:
            break
        fields = record.fields or {}
        text, choices, answer = (fields.get(name) for name in ("question", "choices", "answer"))
        gold = None
        if isinstance(choices, list) and len(choices) > 1:
            # The texts, then their letters: a text counts before a letter.
            names = [*choices, *(chr(ord("A") + number) for number in range(len(choices)))]
            if isinstance(answer, str) and answer in names:
                gold = names.index(answer) % len(choices)
            elif isinstance(answer, int) and 0 <= answer < len(choices):
                gold = answer
        if not isinstance(text, str) or gold is None:
            raise UserError(
                "record-invalid",
                f"{owner}: {record.place} is not a question: write question (text), choices (two texts or more) and "
                "answer (one of them, its letter, or its index from 0)",
            )
        questions.append(Question(text, [str(choice) for choice in choices or []], gold))
    if not questions:
        raise UserError("no-records", f"{owner}: {path} has no questions: check the file")
    return questions


@configurable
@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Multiple-choice questions, each choice scored as the answer to its question: the cloze form of OLMES.

    Attributes:
      name: prefix of the metrics.
      questions: JSONL (plain, .gz, .zst) or Parquet with the fields question, choices (texts) and answer (the text of
        the correct choice, its letter, or its index from 0).
      vocabulary: a corpus, or another directory that has the model's vocabulary.
      limit: number of questions, from the first; None takes all.
      prefix: text placed after the BOS of each question.
      batch_tokens: tokens that go through the model at a time.
    """

    name: str
    questions: str
    vocabulary: str
    limit: Count | None = 200
    prefix: str = ""
    batch_tokens: Count = 8192

    def bind(self, model: ModelConfig, vocabulary_hash: str, mesh: Mesh) -> Measure:
        """Reads and encodes the questions; the returned function of parameters yields (name, value)."""
        questions, pairs = self._pairs(vocabulary_hash)
        likelihoods = Likelihoods(model, mesh, self.batch_tokens)

        def run(params: Params) -> Iterator[tuple[str, Any]]:
            totals = np.zeros(len(pairs))
            for results in likelihoods(params, pairs):
                for place, result in results.items():
                    totals[place] = result.total
            ends = np.cumsum([len(question.choices) for question in questions])
            scored = [
                Scored(each.tolist(), [len(choice) for choice in question.choices], question.gold)
                for question, each in zip(questions, np.split(totals, ends[:-1]), strict=True)
            ]
            for name, (mean, _) in measures(scored).items():
                yield f"{self.name}/{name}", mean

        return run

    def about(self, model: ModelConfig, vocabulary_hash: str) -> dict[str, Any]:
        """The questions in numbers, and the first one down to its first ids."""
        questions, pairs = self._pairs(vocabulary_hash)
        longest = max(len(pair.context) + len(pair.continuation) for pair in pairs)
        return {
            "questions": len(questions),
            "first_ids": list(pairs[0].context[:8]),
            "first_question": questions[0]._asdict(),
            "longest": longest,
            "truncated": sum(len(p.context) + len(p.continuation) > model.max_length + 1 for p in pairs),
        }

    def _pairs(self, vocabulary_hash: str) -> tuple[list[Question], list[Pair]]:
        vocabulary = fitting_vocabulary(self.vocabulary, vocabulary_hash, f"MultipleChoice {self.name}")
        questions = read_questions(self.questions, self.limit, f"MultipleChoice {self.name}")
        head = head_ids(vocabulary, self.prefix)
        return questions, [
            encode_pair(vocabulary, head, f"Question: {question.text}\nAnswer:", f" {choice}")
            for question in questions
            for choice in question.choices
        ]
