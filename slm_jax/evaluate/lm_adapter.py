"""Answers the three kinds of request of lm-evaluation-harness, in text, with a trained model.

Every text comes after BOS and a prefix, which is conditional inference where models were trained with metadata (MeCo,
arXiv 2501.01956, section 3.3). Answers are kept as JSON lines as they come, so that a second command repeats no
request. (lm_eval's own cache is a database of pickles, which run code when they are read.)
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.evaluate.likelihood import Likelihood, Likelihoods, Pair, encode_pair, head_ids
from slm_jax.files import to_json
from slm_jax.jsonl import ResumableJsonl
from slm_jax.metrics import progress
from slm_jax.models.trained_model import TrainedModel

FIRST_IDS = 16  # ids of the first request in a record: enough to see BOS, once, and the prefix
BATCHES = 8  # batches of generation whose texts are kept together


@dataclasses.dataclass
class RequestStats:
    """Requests since `LMAdapter.recorded` began.

    Attributes:
      requests: all of them.
      known: those answered before.
      truncated: those cut on the left.
      dropped_tokens: tokens that these lost in all.
      first_ids: the first ids of the first request.
      first_text: the text of these ids.
    """

    requests: int = 0
    known: int = 0
    truncated: int = 0
    dropped_tokens: int = 0
    first_ids: list[int] = dataclasses.field(default_factory=list)
    first_text: str = ""


class LMAdapter:
    """Answers of one model, kept as JSON lines in the file `requests`.

    batch_tokens: tokens in a batch of log-likelihoods. batch_size: rows that are generated together.
    """

    def __init__(
        self,
        model: TrainedModel,
        vocabulary: Vocabulary,
        mesh: Mesh,
        requests: Path,
        batch_tokens: int,
        batch_size: int,
    ):
        self.model, self.vocabulary, self.mesh, self.batch_size = model, vocabulary, mesh, batch_size
        self.prefix, self.stats = "", RequestStats()
        self._likelihoods = Likelihoods(model.config, mesh, batch_tokens)
        self._generator: Generator | None = None
        self._file = ResumableJsonl(requests)
        self._answers = {row["key"]: row["value"] for row in self._file.rows() if row.keys() >= {"key", "value"}}

    @property
    def max_length(self) -> int:
        return self.model.config.max_length

    @contextlib.contextmanager
    def recorded(self, prefix: str) -> Iterator[RequestStats]:
        """Puts the prefix before every text while the block runs; yields the counts of its requests."""
        self.prefix, self.stats = prefix, RequestStats()
        try:
            yield self.stats
        finally:
            self.prefix = ""

    def loglikelihoods(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy decoding would produce it) of each (context, continuation)."""
        head = head_ids(self.vocabulary, self.prefix)
        pairs = [encode_pair(self.vocabulary, head, *request) for request in requests]
        return [(result.total, result.greedy) for result in self._answer(pairs, "loglikelihood")]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p in nats of each text, with every token predicted once from as much context as the model reads."""
        head = head_ids(self.vocabulary, self.prefix)
        windows = [rolling_windows(head, self.vocabulary.encode(text), self.max_length) for text in texts]
        results = iter(self._answer([pair for pairs in windows for pair in pairs], "rolling windows"))
        return [sum(next(results).total for _ in pairs) for pairs in windows]

    def generate(self, requests: Sequence[tuple[str, Sampling]]) -> list[str]:
        """The continuation of each text, up to the first stop string or EOS.

        A text that leaves no room for its new tokens loses its beginning.

        Raises:
          UserError: more new tokens are requested than the model reads.
        """
        texts: dict[int, str] = {}
        by_sampling: dict[Sampling, list[int]] = {}
        for place, (_, sampling) in enumerate(requests):
            by_sampling.setdefault(sampling, []).append(place)
        with progress(len(requests), 0, "generate", "text") as bar:
            for sampling, places in by_sampling.items():
                for found in self._generate([requests[place][0] for place in places], sampling):
                    texts |= {places[number]: text for number, text in found.items()}
                    bar.update(len(found))
        return [texts[place] for place in range(len(requests))]

    def _answer(self, pairs: Sequence[Pair], what: str) -> list[Likelihood]:
        """Computes equal pairs once and known ones not at all; an empty continuation is certain."""
        keys = [self._key("likelihood", list(pair.context), list(pair.continuation)) for pair in pairs]
        first = {key: pair for key, pair in zip(keys, pairs, strict=True) if len(pair.continuation)}
        wanted = [key for key in first if key not in self._answers]
        self._count([[*pair.context, *pair.continuation] for pair in pairs], len(first) - len(wanted))
        if wanted:
            with jax.set_mesh(self.mesh), progress(len(wanted), 0, what, "text") as bar:
                for found in self._likelihoods(self.model.params, [first[key] for key in wanted]):
                    self._keep({wanted[number]: list(result) for number, result in found.items()})
                    bar.update(len(found))
        results = [Likelihood(*self._answers[key]) if key in first else Likelihood(0.0, True, 0) for key in keys]
        self.stats.truncated += sum(result.dropped > 0 for result in results)
        self.stats.dropped_tokens += sum(result.dropped for result in results)
        return results

    def _generate(self, texts: Sequence[str], sampling: Sampling) -> Iterator[dict[int, str]]:
        """Yields place -> continuation: first of the texts answered before, then of a few batches at a time."""
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                "task-too-many-new-tokens",
                f"a task asks for {sampling.max_new_tokens} new tokens, the model reads {self.max_length}: set "
                "max_gen_toks in its generation_kwargs",
            )
        head = head_ids(self.vocabulary, self.prefix)
        whole = [[*head, *self.vocabulary.encode(text)] for text in texts]
        prompts = [ids[-room:] for ids in whole]
        keys = [self._key("generate", prompt, to_json(sampling)) for prompt in prompts]
        greedy = sampling.temperature == 0  # a random draw depends on the prompt's place: it is not kept
        known = {place: str(self._answers[key]) for place, key in enumerate(keys) if greedy and key in self._answers}
        self._count(whole, len(known))
        self.stats.truncated += sum(len(ids) > room for ids in whole)
        self.stats.dropped_tokens += sum(max(0, len(ids) - room) for ids in whole)
        yield known
        left = [place for place in range(len(texts)) if place not in known]
        for first in range(0, len(left), self.batch_size * BATCHES):
            now = left[first : first + self.batch_size * BATCHES]
            if self._generator is None:
                model = self.model
                self._generator = Generator(model.params, model.config, self.vocabulary, self.mesh, self.batch_size)
            made = self._generator.continue_ids([prompts[place] for place in now], sampling, first)
            found = {place: continuation.text for place, continuation in zip(now, made, strict=True)}
            if greedy:
                self._keep({keys[place]: text for place, text in found.items()})
            yield found

    def _key(self, kind: str, *request: Any) -> str:
        """A hash of the model and the request, the same on any machine."""
        parts = (kind, self.model.fingerprint, to_json(self.model.config), *request)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _keep(self, answers: Mapping[str, Any]) -> None:
        self._answers |= answers
        self._file.append([{"key": key, "value": value} for key, value in answers.items()])

    def _count(self, requests: Sequence[Sequence[int]], known: int) -> None:
        self.stats.requests += len(requests)
        self.stats.known += known
        if requests and not self.stats.first_ids:
            self.stats.first_ids = list(requests[0][:FIRST_IDS])
            self.stats.first_text = "".join(map(self.vocabulary.piece, self.stats.first_ids))


def rolling_windows(head: Sequence[int], ids: Sequence[int], max_length: int) -> list[Pair]:
    """Cuts a text into continuations as long as the model can predict, each with as much context as it reads.

    The first comes after `head`; the others are read without it. The same windows as lm-evaluation-harness makes.
    """
    if not ids:
        return []
    first = max_length + 1 - len(head)
    if first < 1:
        raise UserError(
            "prefix-too-long",
            f"BOS and the prefix have {len(head)} tokens, the model reads {max_length}: shorten the prefix",
        )
    windows = [Pair(head, ids[:first])]
    for begin in range(first, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        windows.append(Pair(ids[max(0, end - max_length - 1) : begin], ids[begin:end]))
    return windows
