"""A trained model that answers the three questions of lm-evaluation-harness in text; knows nothing of the harness.

Every text stands behind BOS and a prefix, which is conditional inference where models were trained with metadata (MeCo,
arXiv 2501.01956, section 3.3). Answers are kept as they come, so that a second command asks for no answer twice.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from slm_jax.data.vocabularies import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.evaluate.likelihood import Likelihood, Likelihoods, Pair, encode_pair, head_ids
from slm_jax.evaluate.request_cache import RequestCache, request_key
from slm_jax.files import to_json
from slm_jax.metrics import progress
from slm_jax.models.trained_model import TrainedModel

FIRST_IDS = 16  # ids of the first request that a record shows: enough to see BOS, once, and the prefix
KEPT_AFTER = 8  # batches of generation whose texts are kept together


@dataclasses.dataclass
class Asked:
    """What was asked since the last record: requests, those answered before, those cut from the left and their lost
    tokens, and how the first one begins."""

    requests: int = 0
    known: int = 0
    truncated: int = 0
    dropped_tokens: int = 0
    first_ids: list[int] = dataclasses.field(default_factory=list)
    first_text: str = ""


class Answers:
    """Answers of one model.

    Args:
        model: its parameters and what they are.
        vocabulary: its vocabulary.
        mesh: the devices.
        cache: where answers are kept.
        batch_tokens: tokens of a batch of log-likelihoods.
        batch_size: rows that are generated together.
    """

    def __init__(
        self,
        model: TrainedModel,
        vocabulary: Vocabulary,
        mesh: Mesh,
        cache: RequestCache,
        batch_tokens: int,
        batch_size: int,
    ):
        self.model, self.vocabulary, self.mesh, self.cache, self.batch_size = model, vocabulary, mesh, cache, batch_size
        self.prefix, self.asked = "", Asked()
        self._likelihoods = Likelihoods(model.config, mesh, batch_tokens)
        self._generator: Generator | None = None
        self._identity = [model.fingerprint, to_json(model.config)]

    @property
    def max_length(self) -> int:
        return self.model.config.max_length

    def head(self) -> list[int]:
        """Ids before every text."""
        return head_ids(self.vocabulary, self.prefix)

    @contextlib.contextmanager
    def recorded(self, prefix: str) -> Iterator[Asked]:
        """While this lasts, texts stand behind the prefix; yields what is counted meanwhile."""
        self.prefix, self.asked = prefix, Asked()
        try:
            yield self.asked
        finally:
            self.prefix = ""

    def loglikelihoods(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy decoding would give it) of each (context, continuation)."""
        head = self.head()
        pairs = [encode_pair(self.vocabulary, head, *request) for request in requests]
        return [(result.total, result.greedy) for result in self._answered(pairs, "loglikelihood")]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p in nats of each text, every token of it predicted once, behind as much as the model reads."""
        windows = [rolling_windows(self.head(), self.vocabulary.encode(text), self.max_length) for text in texts]
        results = iter(self._answered([pair for pairs in windows for pair in pairs], "rolling windows"))
        return [sum(next(results).total for _ in pairs) for pairs in windows]

    def generate(self, requests: Sequence[tuple[str, Sampling]]) -> list[str]:
        """What follows each text, up to the first stop string or EOS.

        A text too long for its new tokens loses its beginning.

        Raises:
          UserError: more new tokens are asked for than the model reads.
        """
        answers: dict[int, str] = {}
        by_sampling: dict[Sampling, list[int]] = {}
        for place, (_, sampling) in enumerate(requests):
            by_sampling.setdefault(sampling, []).append(place)
        with progress(len(requests), 0, "generate", "text") as bar:
            for sampling, places in by_sampling.items():
                room = self.max_length - sampling.max_new_tokens
                if room < 1:
                    raise UserError(
                        f"a task asks for {sampling.max_new_tokens} new tokens, the model reads {self.max_length}: set "
                        "max_gen_toks in its generation_kwargs"
                    )
                for found in self._generated([requests[place][0] for place in places], sampling, room):
                    answers |= {places[number]: text for number, text in found.items()}
                    bar.update(len(found))
        return [answers[place] for place in range(len(requests))]

    def _answered(self, pairs: Sequence[Pair], what: str) -> list[Likelihood]:
        """The same pair is asked once; what has no token at all is certain."""
        answers = {place: Likelihood(0.0, True, 0) for place, pair in enumerate(pairs) if not len(pair.continuation)}
        keys = [self._key("likelihood", list(pair.context), list(pair.continuation)) for pair in pairs]
        places: dict[str, list[int]] = {}
        for place in range(len(pairs)):
            if place not in answers:
                places.setdefault(keys[place], []).append(place)
        wanted = [key for key in places if self.cache.get(key) is None]
        self._count([[*pair.context, *pair.continuation] for pair in pairs], len(places) - len(wanted))
        if wanted:
            self._ask([pairs[places[key][0]] for key in wanted], wanted, what)
        for key, mine in places.items():
            result = Likelihood(*self.cache.get(key) or ())
            answers |= dict.fromkeys(mine, result)
            self.asked.truncated += len(mine) * (result.dropped > 0)
            self.asked.dropped_tokens += len(mine) * result.dropped
        return [answers[place] for place in range(len(pairs))]

    def _ask(self, pairs: Sequence[Pair], keys: Sequence[str], what: str) -> None:
        """The answers are in the cache then."""
        with jax.set_mesh(self.mesh), progress(len(pairs), 0, what, "text") as bar:
            for found in self._likelihoods(self.model.params, pairs):
                self.cache.add({keys[number]: list(result) for number, result in found.items()})
                bar.update(len(found))

    def _generated(self, texts: Sequence[str], sampling: Sampling, room: int) -> Iterator[dict[int, str]]:
        """Place -> continuation, some texts at a time; those that are known come first."""
        whole = [[*self.head(), *self.vocabulary.encode(text)] for text in texts]
        prompts = [ids[-room:] for ids in whole]
        self.asked.truncated += sum(len(ids) > room for ids in whole)
        self.asked.dropped_tokens += sum(max(0, len(ids) - room) for ids in whole)
        keys = [self._key("generate", prompt, to_json(sampling)) for prompt in prompts]
        kept = sampling.temperature == 0  # what chance gave depends on its place among the others
        before = [self.cache.get(key) if kept else None for key in keys]
        known = {place: str(text) for place, text in enumerate(before) if text is not None}
        self._count(whole, len(known))
        yield known
        left = [place for place in range(len(texts)) if place not in known]
        if left and self._generator is None:
            model = self.model
            self._generator = Generator(model.params, model.config, self.vocabulary, self.mesh, self.batch_size)
        size = self.batch_size * KEPT_AFTER
        for first in range(0, len(left), size):
            now = left[first : first + size]
            assert self._generator is not None
            made = self._generator.continue_ids([prompts[place] for place in now], sampling, first)
            found = {place: continuation.text for place, continuation in zip(now, made, strict=True)}
            if kept:
                self.cache.add({keys[place]: text for place, text in found.items()})
            yield found

    def _count(self, asked: Sequence[Sequence[int]], known: int) -> None:
        self.asked.requests += len(asked)
        self.asked.known += known
        if asked and not self.asked.first_ids:
            self.asked.first_ids = list(asked[0][:FIRST_IDS])
            self.asked.first_text = "".join(map(self.vocabulary.piece, self.asked.first_ids))

    def _key(self, kind: str, *asked: Any) -> str:
        return request_key(kind, *self._identity, *asked)


def rolling_windows(head: Sequence[int], ids: Sequence[int], max_length: int) -> list[Pair]:
    """Pieces of a text, each as long as the model can predict, behind as much of what stands before it as is read.

    The first stands behind `head`; the others are read without it. The same windows as lm-evaluation-harness makes.
    """
    if not ids:
        return []
    first = max_length + 1 - len(head)
    if first < 1:
        raise UserError(f"BOS and the prefix have {len(head)} tokens, the model reads {max_length}: shorten the prefix")
    windows = [Pair(head, ids[:first])]
    for begin in range(first, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        windows.append(Pair(ids[max(0, end - max_length - 1) : begin], ids[begin:end]))
    return windows
