"""Log-likelihoods of continuations: many short texts, each after its context, in batches of a few widths.

Every multiple-choice question and every rolling perplexity is made of these. The last token of a text is predicted but
not read, so a context and its continuation may have one token more than the model reads.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch, make_batch
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import power_of_two
from slm_jax.evaluate.prefix import KERNEL_ROWS
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.token_loss import inputs_and_targets, target_loss_and_greedy


class Pair(NamedTuple):
    """Ids of a continuation and of the context before it; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


def head_ids(vocabulary: Vocabulary, prefix: str = "") -> list[int]:
    """The start of every text: BOS, and the prefix, tokenized separately as in training."""
    return [vocabulary.bos_id, *vocabulary.encode(prefix)]


def encode_pair(vocabulary: Vocabulary, head: Sequence[int], context: str, continuation: str) -> Pair:
    """Ids of a continuation and of its context after `head`, split as in lm-evaluation-harness.

    Blanks at the end of the context move to the continuation. Both are tokenized together; the continuation begins
    after as many ids as the context has by itself.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return Pair(head, vocabulary.encode(continuation))
    ids = vocabulary.encode(stripped)
    return Pair([*head, *ids], vocabulary.encode(stripped + continuation)[len(ids) :])


class Likelihood(NamedTuple):
    """The result for one Pair.

    Attributes:
      total: log p(continuation | context) in nats.
      greedy: whether each token of the continuation is the most likely one.
      dropped: tokens cut from the beginning of the context because the model reads no more.
    """

    total: float
    greedy: bool
    dropped: int


class Likelihoods:
    """Called on parameters and pairs, yields results batch by batch.

    Pairs are sorted by length, the longest first, and padded to a few widths, each of which is compiled once. A batch
    holds about `batch_tokens` tokens, but at least one row per shard of the mesh.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, batch_tokens: int):
        self.model, self.mesh, self.batch_tokens = model, mesh, batch_tokens

        def compute(params: Params, rows: tuple[Batch, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            batch, targets, wanted = rows
            hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)
            return target_loss_and_greedy(hidden, forward.head_matrix(params, model), targets, wanted, model.vocab_size)

        self._compute = jax.jit(compute)

    def __call__(self, params: Params, pairs: Sequence[Pair]) -> Iterator[dict[int, Likelihood]]:
        """Yields index of the pair -> result for one batch after the other.

        Raises:
          UserError: a continuation alone is longer than the model reads.
        """
        longest, max_length = max((len(pair.continuation) for pair in pairs), default=0), self.model.max_length
        if longest > max_length:
            raise UserError(
                "continuation-too-long",
                f"a continuation has {longest} tokens, the model reads {max_length}: remove it, or evaluate a model "
                "with a larger max_length",
            )
        lengths = np.array(
            [min(len(pair.context) + len(pair.continuation) - 1, max_length) for pair in pairs], np.int64
        )
        known, shards = np.array(widths(max_length)), mesh_lib.batch_shards(self.mesh)
        width_of = known[np.searchsorted(known, lengths)]
        for width in sorted(set(width_of.tolist()), reverse=True):
            places = np.flatnonzero(width_of == width)
            places = places[np.argsort(-lengths[places], kind="stable")].tolist()
            # Rows of a batch: no more than a power of two that holds all pairs.
            most, enough = self.batch_tokens // (width * shards), power_of_two(-(-len(places) // shards))
            rows = shards * max(1, min(most, enough))
            for first in range(0, len(places), rows):
                now = places[first : first + rows]
                yield dict(zip(now, self._batch(params, [pairs[place] for place in now], rows, width), strict=True))

    def _batch(self, params: Params, pairs: Sequence[Pair], rows: int, width: int) -> list[Likelihood]:
        shape = (len(pairs), width)
        tokens, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
        wanted, dropped = np.zeros(shape, bool), []
        for row, pair in enumerate(pairs):
            whole = [*pair.context, *pair.continuation]
            read, predicted = inputs_and_targets(whole[-(self.model.max_length + 1) :])
            dropped.append(len(whole) - len(read) - 1)
            tokens[row, : len(read)], targets[row, : len(read)], segment_ids[row, : len(read)] = read, predicted, 1
            wanted[row, len(read) - len(pair.continuation) : len(read)] = True
        losses, greedy = mesh_lib.map_rows(
            lambda rows: self._compute(params, rows),
            lambda rows: (make_batch(tokens[rows], segment_ids[rows]), targets[rows], wanted[rows]),
            *(len(pairs), rows, self.mesh),
        )
        totals, all_greedy = -losses.sum(axis=1, dtype=np.float64), (greedy | ~wanted).all(axis=1)  # [B, L] -> [B]
        return list(map(Likelihood, totals.tolist(), all_greedy.tolist(), dropped))


def widths(max_length: int) -> list[int]:
    """Widths of rows, ascending: each at most half as wide again as the one before, all of them multiples of
    KERNEL_ROWS; the last is `max_length`."""
    found = []
    for power in range(max_length.bit_length()):
        found += [KERNEL_ROWS << power, (KERNEL_ROWS << power) * 3 // 2]
    return [*sorted(width for width in found if width % KERNEL_ROWS == 0 and width < max_length), max_length]
