"""The filtered gradient: the whole backward pass runs only at the positions that predict a trained token.

One forward pass without gradient keeps the input of every layer. Then, from the last layer to the first, each layer is
differentiated at those positions of its input, with the keys and values of all other positions held constant. If
every token trains, this is the exact gradient; otherwise the part that flows through the keys and values of the other
positions is missing. The idea is Collider's (arXiv 2502.00340).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slm_jax import mesh
from slm_jax.data.batches import Batch
from slm_jax.models import forward
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.position_subset import PositionSubset, take
from slm_jax.score.token_loss import predictors, row_loss, token_loss_and_entropies


def filtered_vjp(
    params: Params, model: ModelConfig, batch: Batch, capacity: int, top_ks: Sequence[int] = ()
) -> tuple[Float[Array, "B L"], Callable[[Float[Array, "B L"]], tuple[Params]], dict[int, Float[Array, "B L"]]]:
    """Like `jax.vjp` of the batch's token losses in the parameters: losses, a pullback of weights, and entropies.

    Args:
      params: parameters.
      model: the architecture; without dropout, because each layer is computed twice.
      batch: [B, L] tokens; S devices hold N = B * L / S of them each.
      capacity: how many positions per device, C, the pullback has room for. No more than that may have a weight.
      top_ks: which entropies to compute beside the losses, see `token_loss_and_entropies`.
    """
    where = (batch.positions, batch.segment_ids)
    # top: output of the last layer, [B, L, D]. inputs: input of every layer, [layer, B, L, D].
    top, inputs = forward.layer_inputs(params, model, forward.embed(params, model, batch.tokens), *where)
    hidden, head = forward.final_norm(params, model, top), forward.head_matrix(params, model)
    losses, entropies = token_loss_and_entropies(
        hidden, head, batch.tokens, batch.segment_ids, model.vocab_size, top_ks
    )

    def pullback(weights: Float[Array, "B L"]) -> tuple[Params]:
        # A token's loss is computed one position before it: [B, L] at tokens -> [S, C] at their predictors.
        subset = PositionSubset.from_mask(predictors(weights) != 0, capacity)
        targets = take(mesh.by_shard(predictors(batch.tokens)), subset.position)
        subset_weights = take(mesh.by_shard(predictors(weights)), subset.position)

        # ---- Head and final norm: gradients of their parameters, and d_z [S, C, D] at the last layer's output.
        def head_loss(ends: Params, z: jax.Array) -> jax.Array:
            normed, head = forward.final_norm(ends, model, z), forward.head_matrix(ends, model)
            return row_loss(normed, head, targets, subset_weights, model.vocab_size)[0]

        ends = {name: value for name, value in params.items() if name != "layers"}
        d_ends, d_z = jax.grad(head_loss, argnums=(0, 1))(ends, subset.gather(top))

        # ---- Layers, from the last to the first.
        fits_quarters = forward.fits_quarters(model, subset, *batch.tokens.shape)

        def layer_backward(d_z: jax.Array, layer_and_input: tuple[Params, jax.Array]) -> tuple[jax.Array, Params]:
            layer, x = layer_and_input

            def pull(by_quarter: bool) -> tuple[Params, jax.Array]:
                at_subset = lambda p, z: forward.layer_at_subset(p, model, z, subset, x, *where, by_quarter)  # noqa: E731
                return jax.vjp(at_subset, layer, subset.gather(x))[1](d_z)

            # The condition is around the pull: one that is differentiated would keep what either branch needs.
            if fits_quarters is None:
                d_layer, d_z = pull(False)
            else:
                d_layer, d_z = jax.lax.cond(fits_quarters, lambda: pull(True), lambda: pull(False))
            return mesh.constrain(d_z, mesh.BATCH), d_layer

        d_z, d_layers = jax.lax.scan(layer_backward, d_z, (params["layers"], inputs), reverse=True)

        # ---- Embedding, of the tokens at the subset.
        subset_tokens = take(mesh.by_shard(batch.tokens), subset.position)
        _, embed_pullback = jax.vjp(lambda ends: forward.embed(ends, model, subset_tokens), ends)
        d_ends = jax.tree.map(jnp.add, d_ends, embed_pullback(d_z)[0])
        return ({name: d_layers if name == "layers" else d_ends[name] for name in params},)

    return losses, pullback, entropies
