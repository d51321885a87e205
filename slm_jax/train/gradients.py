"""Gradients of the summed loss of the tokens that train, in three ways.

Each takes parameters, a batch and `choose`: losses [B, L] -> which tokens train [B, L], sums for the metrics. Each
returns the gradient of sum(loss of those tokens) in every parameter, and the sums. Where the choice was made before,
`choose` ignores its argument, and what only served to rank the tokens is never computed. A `dropout_key` turns on the
model's dropout; `filtered`, which computes each layer twice, has none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from slm_jax import mesh
from slm_jax.data.batches import Batch
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import Rows, take
from slm_jax.score.token_loss import batch_loss, predictors, row_loss, token_loss, weighted_loss
from slm_jax.train.objective import Sums, valid_tokens

Choose = Callable[[Float[Array, "B L"]], tuple[Bool[Array, "B L"], Sums]]


def causal(
    params: Params, model: ModelConfig, batch: Batch, choose: Choose, dropout_key: PRNGKeyArray | None = None
) -> tuple[Params, Sums]:
    """For a choice of all valid tokens: known before the losses, so the head makes loss and gradient in one go."""

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        where = (batch.positions, batch.segment_ids)
        hidden = forward.hidden_states(params, model, batch.tokens, *where, dropout_key)
        weights = valid_tokens(batch).astype(jnp.float32)
        return weighted_loss(hidden, forward.head_matrix(params, model), batch.tokens, weights, model.vocab_size)

    gradient, losses = jax.grad(total, has_aux=True)(params)
    return gradient, choose(losses)[1]


def exact(
    params: Params, model: ModelConfig, batch: Batch, choose: Choose, dropout_key: PRNGKeyArray | None = None
) -> tuple[Params, Sums]:
    """The gradient by definition. The head's backward pass visits the chosen tokens only; below it all positions do,
    because later tokens attend to them."""

    def total(params: Params) -> tuple[jax.Array, Sums]:
        losses = batch_loss(params, model, batch, dropout_key)
        trained, sums = choose(losses)
        return jnp.sum(jnp.where(trained, losses, 0.0)), sums

    return jax.grad(total, has_aux=True)(params)


def filtered(params: Params, model: ModelConfig, batch: Batch, choose: Choose, capacity: int) -> tuple[Params, Sums]:
    """The whole backward pass at the positions that predict a chosen token, up to `capacity` of them on each device.

    One forward pass without gradient keeps the input of each layer; then, from the last layer to the first, each is
    differentiated at those rows of its input, with keys and values of all other positions held constant. With every
    token chosen it is the exact gradient. (The idea of Collider, arXiv 2502.00340.)
    """
    where = (batch.positions, batch.segment_ids)
    top, inputs = forward.layer_inputs(params, model, forward.embed(params, model, batch.tokens), *where)
    hidden = forward.final_norm(params, model, top)
    head = forward.head_matrix(params, model)
    trained, sums = choose(token_loss(hidden, head, batch.tokens, batch.segment_ids, model.vocab_size))
    rows = Rows.of(predictors(trained), capacity)
    targets, weights = take(mesh.by_shard(predictors(batch.tokens)), rows.index), rows.filled.astype(jnp.float32)

    evenly = forward.spread_evenly(model, rows, *batch.tokens.shape)

    def from_top(ends: Params, z: jax.Array) -> jax.Array:
        head = forward.head_matrix(ends, model)
        return row_loss(forward.final_norm(ends, model, z), head, targets, weights, model.vocab_size)[0]

    def back(d_z: jax.Array, layer_and_input: tuple[Params, jax.Array]) -> tuple[jax.Array, Params]:
        layer, x = layer_and_input

        def pull(evenly: bool) -> tuple[Params, jax.Array]:
            at = lambda p, z: forward.layer_at(p, model, z, rows, x, *where, evenly)  # noqa: E731
            return jax.vjp(at, layer, rows.take(x))[1](d_z)

        # Chosen here, around the whole pull: a choice that is differentiated keeps what either side would need.
        d_layer, d_z = pull(False) if evenly is None else jax.lax.cond(evenly, lambda: pull(True), lambda: pull(False))
        return mesh.constrain(d_z, mesh.BATCH), d_layer

    ends = {name: value for name, value in params.items() if name != "layers"}
    d_ends, d_z = jax.grad(from_top, argnums=(0, 1))(ends, rows.take(top))
    d_z, d_layers = jax.lax.scan(back, d_z, (params["layers"], inputs), reverse=True)
    tokens = take(mesh.by_shard(batch.tokens), rows.index)
    _, pull = jax.vjp(lambda ends: forward.embed(ends, model, tokens), ends)
    d_ends = jax.tree.map(jnp.add, d_ends, pull(d_z)[0])
    return {name: d_layers if name == "layers" else d_ends[name] for name in params}, sums
