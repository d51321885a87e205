"""Optimizers without their learning rate: AdamW, or others from optax by name.

The learning rate is a function of the global step and is applied by the train step, so that resetting the optimizer
state at a phase boundary does not restart the schedule.
"""

import dataclasses
from typing import Annotated

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from slm_jax import mesh
from slm_jax.configurable import AtLeast, Below, NotNegative, OneOf, Positive, configurable
from slm_jax.models.forward import Params

OPTIMIZERS = ("adamw", "muon", "lion", "adafactor")
# Input and output axes of each kernel, counted from the end, because the kernels of all layers are stacked.
MUON_AXES = {
    **dict.fromkeys(("query", "key", "value"), MuonDimensionNumbers((-3,), (-2, -1))),  # [layer, D, H, K]
    "out": MuonDimensionNumbers((-3, -2), (-1,)),  # [layer, H, K, D]
    **dict.fromkeys(("gate", "up", "down"), MuonDimensionNumbers((-2,), (-1,))),  # [layer, D, F] or [layer, F, D]
}
MUON_RMS = (
    0.2  # RMS of an update, as with AdamW, so learning rates and weight decay carry over (arXiv 2502.16982, Eq 4)
)


@configurable
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW by default, with the settings of TinyLlama's recipe; Rho-1 leaves them open, and arXiv 2403.08763 uses the
    same.

    Attributes:
      name: `adamw`; `muon` for the kernels of layers, with AdamW for embedding, head and norms (updates are scaled to
        the size of AdamW's, arXiv 2502.16982, so its learning rate carries over); `lion` (arXiv 2302.06675: a learning
        rate 3 to 10 times smaller, b2 0.99); `adafactor` (arXiv 1804.04235: a factored second moment and no first, so
        moments take almost no memory; b1 and b2 are not used).
      b1: decay of the first moment, and of muon's momentum.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      moment_dtype: `float32` or `bfloat16` for the first moment; bfloat16 saves 2 bytes a parameter.
      weight_decay: decoupled weight decay of matrices.
      clip_norm: the gradient's global norm is clipped to this; None does not clip.
      ema: decay of an exponential moving average of the parameters, which the stage `average` turns into a model; 0
        keeps none.
    """

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    b1: Annotated[float, AtLeast(0), Below(1)] = 0.9
    b2: Annotated[float, AtLeast(0), Below(1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip_norm: Positive | None = 1.0
    moment_dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    ema: Annotated[float, AtLeast(0), Below(1)] = 0.0


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """clip by global norm -> the optimizer's own scaling -> decoupled weight decay. The caller scales updates by
    -learning rate."""
    dtype = config.moment_dtype
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=dtype)
    if config.name == "adamw":
        scaling = adam
    elif config.name == "lion":
        scaling = optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype)
    elif config.name == "adafactor":
        # Without scaling by the size of the parameters, which would give each its own learning rate.
        scaling = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0))
    else:
        # optax's muon applies the learning rate and the sign: pass 1.0 and undo the sign. Its own partition is not
        # used, because it would update the other parameters by Adam with Nesterov momentum.
        axes = {"muon_weight_dimension_numbers": _muon_axes, "consistent_rms": MUON_RMS}
        orthogonal = optax.chain(muon(1.0, beta=config.b1, mu_dtype=dtype, **axes), optax.scale(-1.0))
        scaling = optax.partition({True: orthogonal, False: adam}, _has_muon_axes)
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        scaling,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def _muon_axes(params: Params) -> Params:
    """MuonDimensionNumbers of each kernel in a layer; None for what AdamW updates."""

    def axes(path: tuple, _: jax.Array) -> MuonDimensionNumbers | None:
        module, kind = mesh.path_name(path).split("/")[-2:]
        return MUON_AXES.get(module) if kind == "kernel" else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _has_muon_axes(params: Params) -> Params:
    axes = _muon_axes(params)
    return jax.tree.map(
        lambda a: a is not None, axes, is_leaf=lambda a: a is None or isinstance(a, MuonDimensionNumbers)
    )


def decay_mask(params: Params) -> Params:
    """True for matrices and embeddings, False for norm scales (and biases)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: mesh.path_name(path).rsplit("/", 1)[-1] in ("kernel", "embedding"), params
    )
