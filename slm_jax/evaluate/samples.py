"""Evaluators that generate during training: `Samples` measures repetition, `ExactAnswers` right answers."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from slm_jax.configurable import Count, configurable
from slm_jax.data import readers
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Continuation, Generator, Sampling
from slm_jax.evaluate.perplexity import Measure
from slm_jax.files import to_json
from slm_jax.metrics import mean
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import fitting_vocabulary

NGRAMS = (1, 2, 3, 4)
NUMBER = re.compile(r"-?\d+")

Complete = Callable[[Params, Sequence[str], Sampling, str], list[Continuation]]  # texts, each after BOS and a prefix


def _completer(model: ModelConfig, vocabulary: Vocabulary, mesh: Mesh, batch_size: int) -> Complete:
    """Continues texts with one parameters after the other; the programs are compiled once, and no parameters are kept
    between calls."""
    generator: Generator | None = None

    def complete(params: Params, texts: Sequence[str], sampling: Sampling, prefix: str) -> list[Continuation]:
        nonlocal generator
        if generator is None:
            generator = Generator(params, model, vocabulary, mesh, batch_size)
        else:
            generator.load(params)
        made = generator.complete(texts, sampling, prefix)
        generator.unload()
        return made

    return complete


@configurable
@dataclasses.dataclass(frozen=True)
class Samples:
    """Continuations of prompts, stored as JSON lines, and how much they repeat themselves.

    Attributes:
      name: prefix of the metrics.
      vocabulary: a corpus, or another directory that has the model's vocabulary.
      prompts: texts to continue; '' is BOS alone, and the same text twice gives two samples.
      prefix: text placed after the BOS of each prompt.
      sampling: how to sample; by default the most likely token.
      batch_size: prompts continued at a time.
      per_prompt: samples of each prompt.
    """

    name: str
    vocabulary: str
    prompts: Sequence[str] = ("",)
    prefix: str = ""
    sampling: Sampling | None = None
    batch_size: Count = 8
    per_prompt: Count = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("setting-empty", f"Samples {self.name}: prompts is (): set a list of texts")

    def bind(self, model: ModelConfig, vocabulary_hash: str, mesh: Mesh) -> Measure:
        """Opens the vocabulary; the returned function of parameters yields (name, value)."""
        vocabulary, sampling = self._vocabulary(vocabulary_hash), self.sampling or Sampling()
        complete = _completer(model, vocabulary, mesh, self.batch_size)
        prompts = [prompt for prompt in self.prompts for _ in range(self.per_prompt)]

        def run(params: Params) -> Iterator[tuple[str, Any]]:
            rows = []
            for prompt, made in zip(prompts, complete(params, prompts, sampling, self.prefix), strict=True):
                tokens = [token for token in made.tokens if token != vocabulary.eos_id]
                loop = longest_loop(tokens)
                row = {"prefix": self.prefix, "prompt": prompt, "text": made.text, "ended": made.ended}
                row |= {"tokens": len(tokens), "longest_loop": loop.length, "loop_period": loop.period}
                rows.append(row | {f"distinct_{n}": distinct_ngrams(tokens, n) for n in NGRAMS})
            for name in ("longest_loop", *(f"distinct_{n}" for n in NGRAMS)):
                values = [row[name] for row in rows if row[name] is not None]
                yield f"{self.name}/{name}", mean(sum(values), len(values))
            yield f"{self.name}/texts", rows

        return run

    def about(self, model: ModelConfig, vocabulary_hash: str) -> dict[str, Any]:
        """What was continued: the number of prompts, the first ids and the sampling."""
        vocabulary = self._vocabulary(vocabulary_hash)
        first = [vocabulary.bos_id, *vocabulary.encode(self.prefix), *vocabulary.encode(self.prompts[0])]
        return {
            "prompts": len(self.prompts),
            "first_ids": first[:8],
            "sampling": to_json(self.sampling or Sampling()),
        }

    def _vocabulary(self, vocabulary_hash: str) -> Vocabulary:
        return fitting_vocabulary(self.vocabulary, vocabulary_hash, f"Samples {self.name}")


@configurable
@dataclasses.dataclass(frozen=True)
class ExactAnswers:
    """The share of questions whose greedy continuation begins with the right number.

    Attributes:
      name: of its numbers.
      vocabulary: a corpus, or another place of the model's vocabulary.
      file: JSON lines with `prompt` and `answer`.
      directory: folder of the file.
      questions: number of questions, from the first on.
      max_new_tokens: maximum number of tokens for an answer.
      batch_size: number of prompts to continue together.
    """

    name: str
    vocabulary: str
    file: str
    directory: str = ""
    questions: Count = 100
    max_new_tokens: Count = 8
    batch_size: Count = 32

    def bind(self, model: ModelConfig, vocabulary_hash: str, mesh: Mesh) -> Measure:
        """Reads the questions; the result, called on parameters, yields (name, value)."""
        vocabulary = fitting_vocabulary(self.vocabulary, vocabulary_hash, f"ExactAnswers {self.name}")
        complete = _completer(model, vocabulary, mesh, self.batch_size)
        asked = self._questions()
        prompts, sampling = [question["prompt"] for question in asked], Sampling(self.max_new_tokens)

        def run(params: Params) -> Iterator[tuple[str, Any]]:
            found = zip(asked, complete(params, prompts, sampling, ""), strict=True)
            rows = [question | {"text": made.text} for question, made in found]
            right = [bool((found := NUMBER.search(row["text"])) and found[0] == row["answer"]) for row in rows]
            yield f"{self.name}/accuracy", mean(sum(right), len(right))
            yield f"{self.name}/texts", [row | {"right": ok} for row, ok in zip(rows, right, strict=True)]

        return run

    def about(self, model: ModelConfig, vocabulary_hash: str) -> dict[str, Any]:
        return to_json(self) | {"questions": len(self._questions())}

    def _questions(self) -> list[dict[str, str]]:
        path = Path(self.directory) / self.file
        if not path.is_file():
            raise UserError(
                "questions-not-found",
                f"ExactAnswers {self.name}: {path} does not exist: check ExactAnswers.file and .directory",
            )
        remedy, questions = "write one object with 'prompt' and 'answer' per line", []
        for record in itertools.islice(readers.records(str(path), ()), self.questions):
            fields = record.fields or {}
            if not isinstance(fields.get("prompt"), str) or "answer" not in fields:
                raise UserError("record-invalid", f"{record.place} {record.problem or 'lacks one of them'}: {remedy}")
            questions.append({"prompt": fields["prompt"], "answer": str(fields["answer"])})
        return questions


# ---- Repetition


def distinct_ngrams(tokens: Sequence[Hashable], n: int) -> float | None:
    """Distinct n-grams per n-gram (arXiv 1510.03055): 1 if none occurs twice; None for a text shorter than n."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


class Loop(NamedTuple):
    """A stretch that repeats one unit: tokens in all, and tokens of the unit; (0, 0) if nothing repeats."""

    length: int
    period: int


def longest_loop(tokens: Sequence[Hashable]) -> Loop:
    """The longest stretch that repeats a unit of `period` tokens, at least twice; its last unit may be cut.

    `a b c b c b` has a loop of 5 tokens with the period 2. Of equally long loops the one with the shortest period
    counts.
    """
    best = Loop(0, 0)
    for period in range(1, len(tokens) // 2 + 1):
        run = longest = 0  # tokens in a row that equal the one a period before
        for before, now in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if before == now else 0
            longest = max(longest, run)
        if longest >= period and longest + period > best.length:
            best = Loop(longest + period, period)
    return best
