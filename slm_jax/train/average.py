"""Stage `average`: makes a model from the mean of several checkpoints, or from the moving average of a run."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import Checkpoints, read_about, restore_items, restore_params, saved_steps
from slm_jax.configurable import Natural, configurable
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.errors import UserError
from slm_jax.files import to_json
from slm_jax.mesh import MeshConfig
from slm_jax.models.forward import Params, param_shapes
from slm_jax.models.model_config import ModelConfig
from slm_jax.run_directory import RunDirectory


@configurable
def average(
    run: str, output: str, steps: Sequence[Natural] = (), moving: bool = False, mesh: MeshConfig | None = None
) -> None:
    """Averages the parameters of several checkpoints of a run into a model, to evaluate, score with or train from.

    Args:
      run: run directory of the checkpoints.
      output: directory of the result, with one checkpoint.
      steps: which checkpoints to average, with equal weights; by default all that are kept.
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
        raise UserError(
            "average-one-step", f"average.moving takes the average at one step, average.steps names {len(steps)}"
        )
    if moving and not directory.settings().get("optimizer", {}).get("ema"):
        raise UserError(
            "average-not-kept",
            f"{run} kept no moving average: train with OptimizerConfig.ema, or average its checkpoints",
        )
    config_lib.print_unused()
    about = read_about(run, steps[-1])
    shapes = param_shapes(ModelConfig.from_json(about["model"]), devices)
    if moving:
        params, what = restore_items(run, {"average": shapes}, steps[0])["average"], "moving average"
    else:
        params, what = _mean(run, shapes, steps), f"mean of steps {', '.join(map(str, steps))}"
    with Checkpoints(output) as checkpoints:
        if checkpoints.steps():
            raise UserError(
                "average-output-exists", f"{output} holds checkpoints already: choose another average.output"
            )
        checkpoints.save(steps[-1], {"params": params}, to_json({**about, "average": what, "run": run}))
    if directory.vocabulary.is_dir():  # runs of earlier versions have none
        load_vocabulary(directory.vocabulary).save(RunDirectory(output).vocabulary)
    print(f"average: {what} of {run} -> {output}")


def _mean(run: str, shapes: Params, steps: Sequence[int]) -> Params:
    """The mean over checkpoints; memory holds the sum and one of them."""
    total = restore_params(run, shapes, steps[0])
    add = jax.jit(lambda total, params: jax.tree.map(jnp.add, total, params), donate_argnums=0)
    for step in steps[1:]:
        total = add(total, restore_params(run, shapes, step))
    return jax.jit(lambda total: jax.tree.map(lambda x: x / len(steps), total), donate_argnums=0)(total)
