"""Hidden states to one float32 loss per token, without ever holding a [B, L, V] array.

Everything per token is stored at the token that it describes:
`loss[b, t] = -log p(tokens[b, t] | earlier tokens of its segment)`.
The hidden state that predicts it is at t - 1. This module is the one place that shifts between the two.

Tokens go through the head in chunks, and only those that are needed: the forward pass visits tokens that have a loss,
the backward pass tokens whose loss has a gradient. Each shard of the batch works on its own tokens (`mesh.by_shard`),
and all run as many chunks as the shard with the most tokens: a head split over the vocabulary needs all devices in each
chunk.

Shapes: S shards of the batch (over the axes data and fsdp) with N = B * L / S tokens each; C tokens in a chunk;
M = N + C places for results.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slm_jax import mesh
from slm_jax.data.batches import Batch
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import take

CHUNK_LOGITS = 2**26  # logits per chunk and device, four bytes each
CHUNK_TOKENS = 1024  # tokens per chunk at most; larger chunks are no faster
QUARTERED = 512  # chunks of at least this many tokens visit the remainder in quarters, so that fewer places are empty


def batch_loss(
    params: Params, model: ModelConfig, batch: Batch, dropout_key: PRNGKeyArray | None = None
) -> Float[Array, "B L"]:
    """The model's loss on each token of a batch; 0 where a token has no predecessor. With a key, dropout is on."""
    return batch_loss_and_entropies(params, model, batch, (), dropout_key)[0]


def batch_loss_and_entropies(
    params: Params,
    model: ModelConfig,
    batch: Batch,
    top_ks: Sequence[int],
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B L"], dict[int, Float[Array, "B L"]]]:
    """`batch_loss`, and the entropy of each prediction for each k of `top_ks`, see `token_loss_and_entropies`."""
    # [B, L] -> [B, L, D]
    hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids, dropout_key)
    head = forward.head_matrix(params, model)
    return token_loss_and_entropies(hidden, head, batch.tokens, batch.segment_ids, model.vocab_size, top_ks)


def valid_tokens(batch: Batch) -> Bool[Array, "B L"]:
    """True for the tokens that may train: `loss_mask` includes them, and they have a predecessor to predict them."""
    return batch.loss_mask & predicted(batch.segment_ids)


def predicted(segment_ids: Int[Array | np.ndarray, "B L"]) -> Bool[Array, "B L"]:
    """True where a token has a predecessor in its segment, and therefore a loss. Padding (segment 0) has none."""
    same = segment_ids[:, 1:] == segment_ids[:, :-1]  # [B, L - 1]; the first token of a row is never predicted
    return jnp.pad(same, ((0, 0), (1, 0))) & (segment_ids > 0)


def inputs_and_targets(ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The ids of one text that a model reads, and at each of these positions the next id, which it predicts there."""
    return ids[:-1], ids[1:]


def predictors(x: Array) -> Array:
    """Moves values at tokens, [B, L], to the positions whose hidden states predict them: one to the left."""
    return jnp.roll(x, -1, axis=1)  # the last column receives the first token's value, which nothing predicts


def from_predictors(x: Array) -> Array:
    """The inverse shift: moves values at predicting positions, [B, L, ...], to the tokens predicted."""
    return jnp.roll(x, 1, axis=1)


def at_tokens(x: Float[Array, "S N"], length: int) -> Float[Array, "B L"]:
    """Moves values at predicting positions, one row per shard, to the predicted tokens of rows of `length`."""
    # [S, N] -> [B, L]
    return from_predictors(mesh.to_rows(x, length))


def token_loss(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    vocab_size: int | None = None,
) -> Float[Array, "B L"]:
    """Negative log-likelihood of each token in nats, float32; 0 where `predicted` is False.

    Differentiable in `hidden` and `head` under any cotangent per token; the backward pass costs nothing for a token
    whose cotangent is 0. Columns of the head from `vocab_size` on are padding and take no probability.
    """
    return token_loss_and_entropies(hidden, head, tokens, segment_ids, vocab_size, ())[0]


def token_loss_and_entropies(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    vocab_size: int | None,
    top_ks: Sequence[int],
) -> tuple[Float[Array, "B L"], dict[int, Float[Array, "B L"]]]:
    """`token_loss`, and from the same pass over the head the entropy in nats of the distribution that predicts each
    token, for each k of `top_ks`: over the k likeliest tokens with their probabilities scaled to sum to 1, or over the
    whole vocabulary where k is 0. The entropies are not differentiable.
    """
    # [B, L] -> [S, N]: the tokens of each shard as one row, each target at the position that predicts it
    targets, wanted = (mesh.by_shard(predictors(x)) for x in (tokens, predicted(segment_ids)))
    size = vocab_size or head.shape[1]
    found: list[jax.Array] = _losses(mesh.by_shard(hidden), head, targets, wanted, size, tuple(top_ks))
    losses, *entropies = (at_tokens(x, tokens.shape[1]) for x in found)
    return losses, dict(zip(top_ks, entropies, strict=True))


def weighted_loss(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    vocab_size: int | None = None,
    wanted: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """sum(weights * token_loss), and the losses where `wanted`, by default where the weight is not 0. Weights must be 0
    where not `predicted`, and may be 0 where wanted.

    For weights that are known before the losses: one pass over the head computes the sum and its gradient, with one
    matrix product fewer than `token_loss` and its backward pass. The losses are not differentiable.
    """
    wanted = weights != 0 if wanted is None else wanted
    # [B, L] -> [S, N]
    targets, at_predictors, measured = (mesh.by_shard(predictors(x)) for x in (tokens, weights, wanted))
    size = vocab_size or head.shape[1]
    both: tuple[jax.Array, jax.Array] = _weighted(mesh.by_shard(hidden), head, targets, at_predictors, measured, size)
    return both[0], at_tokens(both[1], tokens.shape[1])


def row_loss(
    hidden: Float[Array, "S N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "S N"],
    weights: Float[Array, "S N"],
    vocab_size: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "S N"]]:
    """`weighted_loss` of N hidden states in each of S shards; targets and weights are at the predicting positions."""
    size = vocab_size or head.shape[1]
    both: tuple[jax.Array, jax.Array] = _weighted(hidden, head, targets, weights, weights != 0, size)
    return both


def token_loss_and_entropy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    vocab_size: int | None = None,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """`token_loss`, and the entropy in nats of the distribution that predicts it (Rho-1 Eq 8)."""
    loss, entropies = token_loss_and_entropies(hidden, head, tokens, segment_ids, vocab_size, (0,))
    return loss, entropies[0]


def target_loss_and_greedy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    wanted: Bool[Array, "B L"],
    vocab_size: int | None = None,
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Loss of each target in nats, and whether it is the most likely token; 0 and False where not wanted.

    Unlike elsewhere in this module, `targets[b, t]` is what the hidden state at t predicts, so that the token after the
    last one that the model reads can be measured too. Of equal logits the first counts as the most likely. Not
    differentiable.
    """

    def statistics(logits: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        greedy = jnp.argmax(logits, axis=-1) == y
        largest, _, z = _softmax(logits)
        return _loss(logits, y, largest, z), greedy.astype(jnp.float32)

    h, y, asked = (mesh.by_shard(x) for x in (hidden, targets, wanted))  # [B, L, ...] -> [S, N, ...]
    both = _statistics(h, head, y, asked, vocab_size or head.shape[1], statistics, 2)
    # [S, N] -> [B, L], without a shift: both sides are at the predicting positions
    loss, greedy = (mesh.to_rows(x, targets.shape[1]) for x in both)
    return loss, greedy > 0


# ---- Losses whose weights depend on the losses: forward and backward are two passes over the head.
# In what follows h is hidden states [S, N, D] and y their targets [S, N].


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _losses(
    h: jax.Array, head: jax.Array, y: jax.Array, wanted: jax.Array, vocab_size: int, top_ks: tuple[int, ...]
) -> list[jax.Array]:
    """Losses, then one array of entropies for each of `top_ks`; all [S, N]."""

    def statistics(logits: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        largest, unnormed, z = _softmax(logits)
        entropies = []
        for k in top_ks:
            at_k, exp_k, z_k = logits, unnormed, z  # [S, C, V], or [S, C, k] of the largest
            if k:
                at_k = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0]
                exp_k = jnp.exp(at_k - largest)
                z_k = jnp.sum(exp_k, axis=-1, keepdims=True)
            # log z - sum(p * (logit - largest)). Padding columns have p = 0 and a logit of -inf; 0 * inf is NaN.
            below = jnp.where(jnp.isinf(at_k), 0.0, at_k - largest)
            entropies.append((jnp.log(z_k) - jnp.sum(exp_k * below, axis=-1, keepdims=True) / z_k)[..., 0])
        return _loss(logits, y, largest, z), *entropies

    return _statistics(h, head, y, wanted, vocab_size, statistics, 1 + len(top_ks))


def _losses_forward(h, head, y, wanted, vocab_size, top_ks):
    return _losses(h, head, y, wanted, vocab_size, top_ks), (h, head, y, wanted)


def _losses_backward(vocab_size, top_ks, residuals, cotangents):
    h, head, y, wanted = residuals
    # Logits are computed again, for tokens with a cotangent only: keeping them would take [B, L, V]. Entropies (the
    # other cotangents) only decide which tokens train and how much: no gradient flows through them.
    weights = jnp.where(wanted, cotangents[0], 0.0)
    _, d_h, d_head = _gradients(h, head, y, weights, weights != 0, vocab_size)
    return d_h, d_head, None, None


_losses.defvjp(_losses_forward, _losses_backward)


# ---- Losses whose weights are known before: the forward pass computes the gradients, the backward pass scales them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted(
    h: jax.Array, head: jax.Array, y: jax.Array, weights: jax.Array, wanted: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    found: list[jax.Array] = _losses(h, head, y, wanted, vocab_size, ())
    losses = found[0]
    return jnp.sum(weights * losses), losses


def _weighted_forward(h, head, y, weights, wanted, vocab_size):
    losses, d_h, d_head = _gradients(h, head, y, weights, wanted, vocab_size)
    return (jnp.sum(weights * losses), losses), (d_h, d_head)


def _weighted_backward(_, residuals, cotangents):
    return *((cotangents[0] * x).astype(x.dtype) for x in residuals), None, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


# ---- Passes over the head, chunk by chunk.


def _statistics(
    h: jax.Array,
    head: jax.Array,
    y: jax.Array,
    wanted: jax.Array,
    vocab_size: int,
    statistics: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    number: int,
) -> list[jax.Array]:
    """`number` statistics of each token's logits, float32 [S, N] each; 0 where not wanted."""
    chunks, matrix = _TokenChunks.of(wanted, head), _gathered(head, h.dtype)

    def chunk(results: tuple[jax.Array, ...], start: jax.Array, size: int) -> tuple[jax.Array, ...]:
        index = chunks.index(start, size)  # [S, C]
        values = statistics(_logits(take(h, index), matrix, vocab_size), take(y, index))  # from logits [S, C, V]
        return tuple(_put(x, value, start) for x, value in zip(results, values, strict=True))

    results = chunks.run(chunk, tuple(chunks.buffer() for _ in range(number)))
    return [chunks.to_positions(x) for x in results]


def _gradients(
    h: jax.Array, head: jax.Array, y: jax.Array, weights: jax.Array, wanted: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [S, N] where wanted, and the gradients of sum(weights * losses) in h [S, N, D] and head [D, V].

    d loss / d logits = softmax - one-hot. Each shard sums its own part of d_head; the parts are added once, at the end.
    """
    chunks, matrix = _TokenChunks.of(wanted, head), _gathered(head, h.dtype)
    columns = jnp.arange(head.shape[1])

    def chunk(results: tuple[jax.Array, ...], start: jax.Array, size: int) -> tuple[jax.Array, ...]:
        losses, d_h, d_head = results
        index = chunks.index(start, size)  # [S, C]
        rows, target, weight = take(h, index), take(y, index), take(weights, index)[..., None]
        logits = _logits(rows, matrix, vocab_size)  # [S, C, D] -> [S, C, V]
        largest, unnormed, z = _softmax(logits)
        loss = _loss(logits, target, largest, z)
        weighted = unnormed * (weight / z)  # weight * softmax, with one product of [S, C, V] instead of two
        d_logits = jnp.where(columns == target[..., None], weighted - weight, weighted).astype(h.dtype)
        d_rows = jnp.einsum("scv,dv->scd", d_logits, matrix, preferred_element_type=jnp.float32).astype(h.dtype)
        d_head += jnp.einsum("scd,scv->sdv", rows, d_logits, preferred_element_type=jnp.float32)
        return _put(losses, loss, start), _put(d_h, d_rows, start), d_head

    # [S, D, V]: one sum per shard, in float32: thousands of tokens are added, and bfloat16 would drop the small ones.
    parts = jnp.zeros((h.shape[0], *head.shape), jnp.float32)
    parts = mesh.constrain(parts, mesh.P(("data", "fsdp"), None, "model"))
    losses, d_h, parts = chunks.run(chunk, (chunks.buffer(), chunks.buffer(h.shape[2], dtype=h.dtype), parts))
    d_head = mesh.sum_over_shards(parts, mesh.P("fsdp", "model"))  # [S, D, V] -> [D, V]
    return chunks.to_positions(losses), chunks.to_positions(d_h), d_head.astype(head.dtype)


class _TokenChunks(NamedTuple):
    """The wanted tokens of each shard, moved to the front and visited `width` at a time."""

    wanted: Bool[Array, "S N"]
    order: Int[Array, "S M"]  # positions of the wanted tokens, ascending, then N for every empty place
    width: int

    @classmethod
    def of(cls, wanted: jax.Array, head: jax.Array) -> "_TokenChunks":
        columns = head.shape[1] // mesh.axis_size("model")  # of the logits that one device computes
        width = min(CHUNK_TOKENS, max(128, CHUNK_LOGITS // columns), wanted.shape[1])
        empty = wanted.shape[1]
        order = jnp.argsort(~wanted, axis=1, stable=True)  # [S, N], the wanted ones first
        order = jnp.where(jnp.arange(empty) < jnp.sum(wanted, axis=1, keepdims=True), order, empty)
        # [S, N] -> [S, M]: the last chunk may reach past N. `take` reads nothing at position N, and returns 0 there.
        return cls(wanted, jnp.pad(order, ((0, 0), (0, width)), constant_values=empty), width)

    def run(self, chunk: Callable, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Repeats results = chunk(results, start, size) until every shard has visited its wanted tokens."""
        # Of the shard with the most of them; the others visit empty places at the end.
        count = jnp.max(jnp.sum(self.wanted, axis=1, dtype=jnp.int32))
        if self.width < QUARTERED:
            return jax.lax.fori_loop(
                0, -(-count // self.width), lambda i, x: chunk(x, i * self.width, self.width), results
            )
        whole, quarter = count // self.width, self.width // 4
        results = jax.lax.fori_loop(0, whole, lambda i, x: chunk(x, i * self.width, self.width), results)
        left = -(-(count - whole * self.width) // quarter)
        return jax.lax.fori_loop(0, left, lambda i, x: chunk(x, whole * self.width + i * quarter, quarter), results)

    def index(self, start: jax.Array, size: int) -> Int[Array, "S C"]:
        """Positions of the tokens of one chunk, N for empty places."""
        return jax.lax.dynamic_slice_in_dim(self.order, start, size, axis=1)

    def buffer(self, *features: int, dtype=jnp.float32) -> jax.Array:
        """Zeros for one result per visited token, [S, M, ...]."""
        return mesh.constrain(jnp.zeros((*self.order.shape, *features), dtype), mesh.BATCH)

    def to_positions(self, x: jax.Array) -> jax.Array:
        """[S, M, ...] in the order of visits -> [S, N, ...] at the tokens' positions; 0 where not wanted."""
        # A gather by rank, not a scatter by position, which is slow on TPUs.
        rank = jnp.where(self.wanted, jnp.cumsum(self.wanted, axis=1) - 1, self.order.shape[1])
        return take(x, rank)


def _put(x: jax.Array, value: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, value, start, axis=1)


def _gathered(head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The head in the compute dtype, gathered over fsdp once instead of once per chunk."""
    return mesh.constrain(head.astype(dtype), mesh.P(None, "model"))


def _logits(h: jax.Array, matrix: jax.Array, vocab_size: int) -> jax.Array:
    # [S, C, D] -> [S, C, V]
    logits = jnp.dot(h, matrix, preferred_element_type=jnp.float32)
    if vocab_size < matrix.shape[1]:
        logits = jnp.where(jnp.arange(matrix.shape[1]) < vocab_size, logits, -jnp.inf)
    return logits


def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest logit [..., 1], exp(logits - largest) [..., V], and its sum [..., 1]."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    unnormed = jnp.exp(logits - largest)
    return largest, unnormed, jnp.sum(unnormed, axis=-1, keepdims=True)


def _loss(logits: jax.Array, target: jax.Array, largest: jax.Array, z: jax.Array) -> jax.Array:
    """-log softmax of the target [S, C]. The largest logit is subtracted first, so that a near-certain token keeps its
    digits."""
    # logits[..., target] as a masked sum: a gather along a sharded vocabulary would collect all of it.
    at_target = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0.0), axis=-1)
    return jnp.log(z)[..., 0] - (at_target - largest[..., 0])
