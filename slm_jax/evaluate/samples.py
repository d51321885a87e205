"""A few continuations as the model is trained, and how much they repeat themselves: an evaluator for the loop."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import gin
from jax.sharding import Mesh

from slm_jax.data.vocabularies import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.continuation import Continuation
from slm_jax.evaluate.generation import Generator
from slm_jax.evaluate.perplexity import Measure
from slm_jax.evaluate.repetition import distinct_ngrams, longest_loop
from slm_jax.evaluate.sampling import Sampling
from slm_jax.files import to_json
from slm_jax.metrics import mean
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.reference import fitting_vocabulary

NGRAMS = (1, 2, 3, 4)


@gin.configurable
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
    """

    name: str
    vocabulary: str
    prompts: Sequence[str] = ("",)
    prefix: str = ""
    sampling: Sampling | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.prompts or isinstance(self.prompts, str):
            raise UserError(f"Samples {self.name}: prompts takes a list of texts; it was given {self.prompts!r}")

    def bind(self, model: ModelConfig, vocabulary_hash: str, mesh: Mesh) -> Measure:
        """Opens the vocabulary; the result, called on parameters, yields (name, value)."""
        vocabulary, sampling = self._vocabulary(vocabulary_hash), self.sampling or Sampling()
        generator: list[Generator] = []  # made with the first parameters; the others use its programs

        def run(params: Params) -> Iterator[tuple[str, Any]]:
            if generator:
                generator[0].load(params)
            else:
                generator.append(Generator(params, model, vocabulary, mesh, self.batch_size))
            texts = generator[0].complete(self.prompts, sampling, self.prefix)
            generator[0].unload()
            rows = [self._row(*each, vocabulary) for each in zip(self.prompts, texts, strict=True)]
            for name in ("longest_loop", *(f"distinct_{n}" for n in NGRAMS)):
                values = [row[name] for row in rows if row[name] is not None]
                yield f"{self.name}/{name}", mean(sum(values), len(values))
            yield f"{self.name}/texts", rows

        return run

    def about(self, model: ModelConfig, vocabulary_hash: str) -> dict[str, Any]:
        """What was continued, down to the first ids."""
        vocabulary = self._vocabulary(vocabulary_hash)
        first = [vocabulary.bos_id, *vocabulary.encode(self.prefix), *vocabulary.encode(self.prompts[0])]
        return {
            "prompts": len(self.prompts),
            "first_ids": first[:8],
            "sampling": to_json(self.sampling or Sampling()),
        }

    def _vocabulary(self, vocabulary_hash: str) -> Vocabulary:
        return fitting_vocabulary(self.vocabulary, vocabulary_hash, f"Samples {self.name}")

    def _row(self, prompt: str, continuation: Continuation, vocabulary: Vocabulary) -> dict[str, Any]:
        """One text and its measures, of its tokens without EOS."""
        tokens = [token for token in continuation.tokens if token != vocabulary.eos_id]
        loop = longest_loop(tokens)
        return {
            "prefix": self.prefix,
            "prompt": prompt,
            "text": continuation.text,
            "ended": continuation.ended,
            "tokens": len(tokens),
            "longest_loop": loop.length,
            "loop_period": loop.period,
            **{f"distinct_{n}": distinct_ngrams(tokens, n) for n in NGRAMS},
        }
