"""Log-likelihoods of continuations: many short texts, each behind its context, in batches of a few widths.

What every multiple-choice question and every rolling perplexity is made of. The last token of a text is measured and
not read, so a context and its continuation may have one token more than the model reads.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch, make_batch
from slm_jax.data.vocabularies import Vocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.prefix import KERNEL_ROWS
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.token_loss import target_loss_and_greedy


class Pair(NamedTuple):
    """Ids of a continuation and of what stands before it; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


def head_ids(vocabulary: Vocabulary, prefix: str = "") -> list[int]:
    """What stands before every text: BOS, and the prefix, tokenized apart as before a document of training."""
    return [vocabulary.bos_id, *vocabulary.encode(prefix)]


def encode_pair(vocabulary: Vocabulary, head: Sequence[int], context: str, continuation: str) -> Pair:
    """Ids of a continuation and of its context behind `head`, as lm-evaluation-harness cuts them.

    Blanks at the end of the context go to the continuation; both are tokenized together, and what follows as many ids
    as the context has alone is the continuation.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return Pair(head, vocabulary.encode(continuation))
    ids = vocabulary.encode(stripped)
    return Pair([*head, *ids], vocabulary.encode(stripped + continuation)[len(ids) :])


class Likelihood(NamedTuple):
    """log p(continuation | context) in nats; whether each of its tokens was the most likely one; and how many tokens of
    the context, from its beginning, were left out because the model reads no more."""

    total: float
    greedy: bool
    dropped: int


class Likelihoods:
    """Called on parameters and pairs, yields results batch by batch.

    Pairs are sorted by length, the longest first, and padded to a few widths, each of which is compiled once. A batch
    holds about `batch_tokens` tokens, at least a row for each shard of the mesh.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, batch_tokens: int):
        self.model, self.mesh, self.batch_tokens = model, mesh, batch_tokens

        def compute(params: Params, rows: tuple[Batch, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            batch, targets, wanted = rows
            hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)
            return target_loss_and_greedy(hidden, forward.head_matrix(params, model), targets, wanted, model.vocab_size)

        self._compute = jax.jit(compute)

    def __call__(self, params: Params, pairs: Sequence[Pair]) -> Iterator[dict[int, Likelihood]]:
        """Place among the pairs -> result, of one batch after the other.

        Raises:
          UserError: a continuation alone is longer than what the model reads.
        """
        longest = max((len(pair.continuation) for pair in pairs), default=0)
        if longest > self.model.max_length:
            raise UserError(
                f"a continuation has {longest} tokens, the model reads {self.model.max_length}: leave it out, or "
                "evaluate a model with a larger max_length"
            )
        for width, places in _by_width(pairs, self.model.max_length):
            rows = self._rows(width, len(places))
            for first in range(0, len(places), rows):
                now = places[first : first + rows]
                yield dict(zip(now, self._batch(params, [pairs[place] for place in now], rows, width), strict=True))

    def _rows(self, width: int, pairs: int) -> int:
        """Rows of a batch: no more than a power of two that holds all pairs."""
        shards = mesh_lib.batch_shards(self.mesh)
        most, enough = self.batch_tokens // (width * shards), 1 << (-(-pairs // shards) - 1).bit_length()
        return shards * max(1, min(most, enough))

    def _batch(self, params: Params, pairs: Sequence[Pair], rows: int, width: int) -> list[Likelihood]:
        shape = (len(pairs), width)
        tokens, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
        wanted = np.zeros(shape, bool)
        dropped = []
        for row, pair in enumerate(pairs):
            whole = [*pair.context, *pair.continuation]
            ids = whole[-(self.model.max_length + 1) :]
            dropped.append(len(whole) - len(ids))
            read = len(ids) - 1
            tokens[row, :read], targets[row, :read], segment_ids[row, :read] = ids[:-1], ids[1:], 1
            wanted[row, read - len(pair.continuation) : read] = True
        losses, greedy = mesh_lib.map_rows(
            lambda rows: self._compute(params, rows),
            lambda rows: (make_batch(tokens[rows], segment_ids[rows]), targets[rows], wanted[rows]),
            *(len(pairs), rows, self.mesh),
        )
        totals, all_greedy = -losses.sum(axis=1, dtype=np.float64), (greedy | ~wanted).all(axis=1)
        return [Likelihood(float(totals[i]), bool(all_greedy[i]), dropped[i]) for i in range(len(pairs))]


def widths(max_length: int) -> list[int]:
    """Widths of rows, ascending: each at most half as wide again as the one before, all of them taken by every
    attention backend; the last is what the model reads."""
    found = []
    for power in range(max_length.bit_length()):
        found += [KERNEL_ROWS << power, (KERNEL_ROWS << power) * 3 // 2]
    return [*sorted(width for width in found if width % KERNEL_ROWS == 0 and width < max_length), max_length]


def _by_width(pairs: Sequence[Pair], max_length: int) -> Iterator[tuple[int, list[int]]]:
    """(width, places of the pairs that it is the smallest for), the widest first, and in it the longest first."""
    lengths = np.array([min(len(pair.context) + len(pair.continuation) - 1, max_length) for pair in pairs], np.int64)
    known = np.array(widths(max_length))
    chosen = np.searchsorted(known, lengths)
    for number in sorted(set(chosen.tolist()), reverse=True):
        places = np.flatnonzero(chosen == number)
        order = np.argsort(-lengths[places], kind="stable")
        yield int(known[number]), places[order].tolist()
