"""Stage `average`: makes a model from a mean of several checkpoints, or from the moving average of a run.

An average of checkpoints trained at a constant learning rate can imitate a decay that was never run: a gradient taken
between checkpoints i - 1 and i contributes with the summed weights of checkpoints i, i + 1, ..., and the weights can be
chosen so that this sum falls like a decaying learning rate (WSM, arXiv 2507.17634).
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import numpy as np

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import Checkpoints, read_about, restore_items, restore_params, saved_steps
from slm_jax.configurable import Natural, OneOf, configurable
from slm_jax.errors import UserError
from slm_jax.files import to_json
from slm_jax.mesh import MeshConfig
from slm_jax.models.forward import Params, param_shapes
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import run_vocabulary
from slm_jax.run_directory import RunDirectory

# The learning rate, as a fraction of the constant one, after a fraction t of the decay.
DECAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + np.cos(np.pi * t)) / 2,
    "sqrt": lambda t: 1 - np.sqrt(t),
}


@configurable
def average(
    run: str,
    output: str,
    steps: Sequence[Natural] = (),
    decay: Annotated[str, OneOf(DECAYS)] | None = None,
    moving: bool = False,
    mesh: MeshConfig | None = None,
) -> None:
    """Averages the parameters of several checkpoints of a run into a model, to evaluate, score with or train from.

    Args:
      run: run directory of the checkpoints.
      output: directory of the result, with one checkpoint.
      steps: steps of the checkpoints to average; by default all that are kept.
      decay: weights that imitate a `linear`, `cosine` or `sqrt` (1 - sqrt) decay of the learning rate from the first
        checkpoint to the last; by default all weights are equal, which for evenly spaced checkpoints is `linear`.
      moving: take the moving average that the run kept (OptimizerConfig.ema) instead, at the one step given or the
        last.
      mesh: how devices hold the parameters.
    """
    devices = mesh_lib.make_mesh(mesh)
    directory, there = RunDirectory(run), saved_steps(run)
    steps = steps or (there[-1:] if moving else there)
    if missing := [step for step in steps if step not in there]:
        raise UserError(
            "checkpoint-not-found",
            f"{run} has no checkpoint of step {missing[0]}: it has {', '.join(map(str, there))}",
        )
    if moving and len(steps) != 1:
        raise UserError("average-one-step", f"average.moving needs one step, average.steps has {len(steps)}: name one")
    if moving and not directory.settings().get("optimizer", {}).get("ema"):
        raise UserError(
            "average-not-kept",
            f"{run} has no moving average: train with OptimizerConfig.ema, or average its checkpoints",
        )
    if moving and decay:
        raise UserError(
            "average-moving-decay", "average.decay weights checkpoints, average.moving uses one: set only one"
        )
    config_lib.print_unused()
    about = read_about(run, steps[-1])
    # Runs of earlier versions have no vocabulary.
    vocabulary = run_vocabulary(run, about["vocabulary_hash"]) if directory.vocabulary.is_dir() else None
    shapes = param_shapes(ModelConfig.from_json(about["model"]), devices)
    if moving:
        params, what = restore_items(run, {"average": shapes}, steps[0])["average"], "moving average"
    else:
        steps = sorted(steps)
        weights = decay_weights(steps, decay) if decay else np.full(len(steps), 1 / len(steps))
        kind = f"mean, weighted as a {decay} decay," if decay else "mean"
        params, what = _mean(run, shapes, steps, weights), f"{kind} of steps {', '.join(map(str, steps))}"
    with Checkpoints(output) as checkpoints:
        if checkpoints.steps():
            raise UserError(
                "average-output-exists", f"{output} holds checkpoints already: choose another average.output"
            )
        checkpoints.save(steps[-1], {"params": params}, to_json({**about, "average": what, "run": run}))
    if vocabulary:
        vocabulary.save(RunDirectory(output).vocabulary)
    print(f"average: {what} of {run} -> {output}")


def decay_weights(steps: Sequence[int], decay: str) -> np.ndarray:
    """Weights [K] of the checkpoints at ascending `steps`; they add up to 1.

    The decay begins at the first checkpoint and would reach rate 0 one interval of mean length after the last. With the
    rate d_i in the interval that ends at checkpoint i, the weights are 1 - d_1, then d_i - d_(i+1), and d_(K-1).
    """
    at = np.asarray(steps, float) - steps[0]
    if len(at) == 1:
        return np.ones(1)
    rates = DECAYS[decay](at / (at[-1] * len(at) / (len(at) - 1)))  # [K]; 1 at the first checkpoint
    return rates - np.append(rates[1:], 0.0)


def _mean(run: str, shapes: Params, steps: Sequence[int], weights: np.ndarray) -> Params:
    """The weighted mean over checkpoints; memory holds the sum and one of them."""
    scale = jax.jit(lambda params, w: jax.tree.map(lambda p: w * p, params), donate_argnums=0)
    add = jax.jit(lambda total, params, w: jax.tree.map(lambda t, p: t + w * p, total, params), donate_argnums=0)
    total = scale(restore_params(run, shapes, steps[0]), weights[0])
    for step, weight in zip(steps[1:], weights[1:], strict=True):
        total = add(total, restore_params(run, shapes, step), weight)
    return total
