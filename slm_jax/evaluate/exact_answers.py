"""Exact answers by greedy generation: an evaluator for the loop."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from slm_jax.configurable import Count, configurable
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.evaluate.perplexity import Measure
from slm_jax.files import to_json
from slm_jax.metrics import mean
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import fitting_vocabulary

NUMBER = re.compile(r"-?\d+")


@configurable
@dataclasses.dataclass(frozen=True)
class ExactAnswers:
    """Share of questions whose greedy continuation begins with the right number.

    Attributes:
      name: of its numbers.
      vocabulary: a corpus, or another place of the model's vocabulary.
      file: JSON lines with `prompt` and `answer`.
      directory: in which it is looked up.
      questions: how many of them, from the first on.
      max_new_tokens: in which the answer must come.
      batch_size: prompts continued together.
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
        asked, generator = self._questions(), []
        prompts = [question["prompt"] for question in asked]

        def run(params: Params) -> Iterator[tuple[str, Any]]:
            if generator:
                generator[0].load(params)
            else:
                generator.append(Generator(params, model, vocabulary, mesh, self.batch_size))
            texts = [made.text for made in generator[0].complete(prompts, Sampling(self.max_new_tokens))]
            generator[0].unload()
            rows = [question | {"text": text} for question, text in zip(asked, texts, strict=True)]
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
        lines = path.read_text(encoding="utf-8").splitlines()[: self.questions]
        return [{"prompt": row["prompt"], "answer": str(row["answer"])} for row in map(json.loads, lines)]
