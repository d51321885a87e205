"""AdamW without its learning rate.

The learning rate is a function of the global step and is applied by the train step, so that resetting the optimizer
state at a phase boundary does not restart the schedule.
"""

import dataclasses
from typing import Annotated

import jax
import optax

from slm_jax import mesh
from slm_jax.configurable import AtLeast, Below, NotNegative, Positive, configurable
from slm_jax.models.forward import Params


@configurable
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The defaults are TinyLlama's recipe; Rho-1 leaves them open, and arXiv 2403.08763 uses the same.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: decoupled weight decay of matrices.
      clip_norm: the gradient's global norm is clipped to this; None does not clip.
      ema: decay of an exponential moving average of the parameters, which the stage `average` turns into a model; 0
        keeps none.
    """

    b1: Annotated[float, AtLeast(0), Below(1)] = 0.9
    b2: Annotated[float, AtLeast(0), Below(1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip_norm: Positive | None = 1.0
    ema: Annotated[float, AtLeast(0), Below(1)] = 0.0


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """clip by global norm -> Adam -> decoupled weight decay. The caller scales updates by -learning rate."""
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(params: Params) -> Params:
    """True for matrices and embeddings, False for norm scales (and biases)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: mesh.path_name(path).rsplit("/", 1)[-1] in ("kernel", "embedding"), params
    )
