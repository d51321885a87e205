"""What a model makes of rows, token by token: the loss of each, and what it would rather have seen there."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import Batch, make_batch
from slm_jax.metrics import progress
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import TrainedModel
from slm_jax.score.token_loss import CHUNK_LOGITS, token_loss


class Predictions(NamedTuple):
    """All stand at the token they are about, and mean nothing where a token has no predecessor in its segment.

    tokens: the ids of highest probability at its place given the earlier tokens of the segment, the likeliest first.
    """

    loss: Float[np.ndarray, "N L"]  # nats; 0 where a token has no predecessor
    tokens: Int[np.ndarray, "N L K"]
    probabilities: Float[np.ndarray, "N L K"]


def predict_rows(
    model: TrainedModel,
    tokens: Integer[np.ndarray, "N L"],
    segment_ids: Integer[np.ndarray, "N L"],
    mesh: Mesh,
    batch_size: int,
    top: int,
) -> Predictions:
    """Losses and the `top` most likely tokens at every position, `batch_size` rows at a time on the mesh."""
    with progress(len(tokens), 0, f"step {model.step}", "row") as bar:
        found = mesh_lib.map_rows(
            lambda batch: _predict(model.params, model.config, batch, top),
            lambda rows: make_batch(tokens[rows], segment_ids[rows]),
            *(len(tokens), batch_size, mesh),
            done=bar.update,
        )
    return Predictions(*found)


@functools.partial(jax.jit, static_argnames=("model", "top"))  # checkpoints of a model share the compiled program
def _predict(params: Params, model: ModelConfig, batch: Batch, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden = forward.hidden_states(params, model, batch.tokens, batch.positions, batch.segment_ids)
    head = forward.head_matrix(params, model)
    loss = token_loss(hidden, head, batch.tokens, batch.segment_ids, model.vocab_size)
    ids, probabilities = _likeliest(params, model, hidden, top)
    # What a hidden state predicts stands at the token after it.
    return loss, jnp.roll(ids, 1, axis=1), jnp.roll(probabilities, 1, axis=1)


def _likeliest(
    params: Params, model: ModelConfig, hidden: Float[Array, "B L D"], top: int
) -> tuple[Int[Array, "B L K"], Float[Array, "B L K"]]:
    """A few positions of all rows at a time, so that no more than CHUNK_LOGITS logits live on a device."""
    batch_size, length, width = hidden.shape
    if not top:
        return jnp.zeros((batch_size, length, 0), jnp.int32), jnp.zeros((batch_size, length, 0))
    rows = max(1, batch_size // mesh_lib.num_shards())
    chunk = min(length, max(1, CHUNK_LOGITS // (rows * model.padded_vocab_size)))
    padded = jnp.pad(hidden, ((0, 0), (0, -length % chunk), (0, 0)))

    def likeliest(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = forward.logits(params, model, part)
        values, ids = jax.lax.top_k(logits, top)
        return ids, jnp.exp(values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    parts = padded.reshape(batch_size, -1, chunk, width).swapaxes(0, 1)
    found = jax.lax.map(likeliest, parts)
    ids, probabilities = (x.swapaxes(0, 1).reshape(batch_size, -1, top)[:, :length] for x in found)
    return ids, probabilities
