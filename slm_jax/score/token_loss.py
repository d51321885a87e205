"""Hidden states to one float32 loss per token, never a [B, L, V] array.

This is the one place that shifts: everything per token stands at the token it is *about*,
`loss[b, t] = -log p(tokens[b, t] | earlier tokens of its segment)`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slm_jax.data.batches import Batch
from slm_jax.models import forward
from slm_jax.models.config import ModelConfig
from slm_jax.models.forward import Params

CHUNK_TOKENS = 1024  # logits that live at one time: CHUNK_TOKENS x V x 4 bytes on each device


def batch_loss(params: Params, model: ModelConfig, batch: Batch) -> Float[Array, "B L"]:
    """The model's loss on each token of a batch."""
    hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)
    return token_loss(hidden, forward.head_matrix(params, model), batch.tokens, batch.segment_ids, model.vocab_size)


def predicted(segment_ids: Int[Array | np.ndarray, "B L"]) -> Bool[Array, "B L"]:
    """True where a token has a predecessor in its segment, so where it has a loss. Padding has none."""
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    return jnp.pad(same, ((0, 0), (1, 0))) & (segment_ids > 0)


def token_loss(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    vocab_size: int | None = None,
) -> Float[Array, "B L"]:
    """Negative log-likelihood of each token in nats, float32; 0 where `predicted` is False.

    Differentiable in `hidden` and `head` under any cotangent per token. Columns of the head from `vocab_size` on are
    padding and take no probability.
    """
    shifted = jnp.roll(hidden, 1, axis=1)  # column 0 takes the last state, but column 0 is never predicted
    loss: jax.Array = _loss(shifted, head, tokens, head.shape[1] if vocab_size is None else vocab_size)
    return jnp.where(predicted(segment_ids), loss, 0.0)


def token_loss_and_entropy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    vocab_size: int | None = None,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """`token_loss`, and the entropy in nats of the distribution it was read from (Rho-1 Eq 8). Not differentiable."""
    size = head.shape[1] if vocab_size is None else vocab_size

    def chunk(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = _logits(piece[0], head, size)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        mean_logit = jnp.sum(jnp.exp(logits - log_z[..., None]) * jnp.where(jnp.isinf(logits), 0.0, logits), axis=-1)
        return log_z - _picked(logits, piece[1]), log_z - mean_logit

    width = _width(*tokens.shape)
    pieces = jax.lax.map(chunk, (_split(jnp.roll(hidden, 1, axis=1), width), _split(tokens, width)))
    loss, entropy = (_join(x, tokens.shape[1]) for x in pieces)
    has_loss = predicted(segment_ids)
    return jnp.where(has_loss, loss, 0.0), jnp.where(has_loss, entropy, 0.0)


def _logits(h: jax.Array, head: jax.Array, vocab_size: int) -> jax.Array:
    logits = jnp.dot(h, head.astype(h.dtype), preferred_element_type=jnp.float32)
    if vocab_size < head.shape[1]:
        logits = jnp.where(jnp.arange(head.shape[1]) < vocab_size, logits, -jnp.inf)
    return logits


def _picked(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]


def _width(rows: int, length: int) -> int:
    """Row positions per chunk, such that a chunk holds about CHUNK_TOKENS tokens on each device."""
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    shards = mesh_shape.get("data", 1) * mesh_shape.get("fsdp", 1)
    pieces = max(1, -(-rows * length // (CHUNK_TOKENS * shards)))
    return -(-length // min(pieces, length))


def _split(x: jax.Array, width: int) -> jax.Array:
    """[B, L, ...] to [pieces, B, width, ...]: the batch axis stays whole, so that its sharding does."""
    rows, length = x.shape[:2]
    pieces = -(-length // width)
    x = jnp.pad(x, ((0, 0), (0, pieces * width - length), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(rows, pieces, width, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss(h: jax.Array, head: jax.Array, y: jax.Array, vocab_size: int) -> jax.Array:
    return _loss_forward(h, head, y, vocab_size)[0]


def _loss_forward(h, head, y, vocab_size):
    def chunk(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = _logits(piece[0], head, vocab_size)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return log_z - _picked(logits, piece[1]), log_z

    width = _width(*y.shape)
    loss, log_z = jax.lax.map(chunk, (_split(h, width), _split(y, width)))
    return _join(loss, y.shape[1]), (h, head, y, _join(log_z, y.shape[1]))


def _loss_backward(vocab_size, residuals, cotangent):
    """Logits are made again chunk by chunk; d loss / d logits = (softmax - one-hot) times the token's cotangent."""
    h, head, y, log_z = residuals
    matrix = head.astype(h.dtype)

    def chunk(d_head, piece):
        h, y, log_z, cotangent = piece
        softmax = jnp.exp(_logits(h, head, vocab_size) - log_z[..., None])
        one_hot = jnp.arange(head.shape[1]) == y[..., None]
        d_logits = ((softmax - one_hot) * cotangent[..., None]).astype(h.dtype)
        d_h = jnp.dot(d_logits, matrix.T, preferred_element_type=jnp.float32).astype(h.dtype)
        return d_head + jnp.einsum("bld,blv->dv", h, d_logits, preferred_element_type=jnp.float32), d_h

    width = _width(*y.shape)
    pieces = tuple(_split(x, width) for x in (h, y, log_z, cotangent))
    d_head, d_h = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), pieces)
    return _join(d_h, y.shape[1]), d_head.astype(head.dtype), None


_loss.defvjp(_loss_forward, _loss_backward)
