"""The state a run starts from: its last checkpoint, another run's parameters, or random ones."""

import optax
from jax.sharding import Mesh

from slm_jax.checkpoint import Checkpoints, params_fingerprint
from slm_jax.errors import UserError
from slm_jax.models.config import FUNCTION_FIELDS, ModelConfig
from slm_jax.models.forward import Params
from slm_jax.score.reference import load_model
from slm_jax.train.phases import Plan
from slm_jax.train.state import TrainState, init_state, state_shapes


def last_state(
    checkpoints: Checkpoints, model: ModelConfig, plan: Plan, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, dict[str, float]] | None:
    """State and counters of the run's newest readable checkpoint; None before the first.

    Raises:
      UserError: the run is further than its plan goes, or no checkpoint can be read.
    """
    shapes = state_shapes(model, optimizer, mesh)
    restored = checkpoints.restore(shapes.params, {"opt_state": shapes.opt_state, "step": shapes.step})
    if restored is None:
        return None
    params, rest, about = restored
    if int(rest["step"]) > plan.total_steps:
        raise UserError(
            f"{checkpoints.directory} is at step {int(rest['step'])}, the run now has {plan.total_steps}: ask for at "
            "least as many, or choose another train.run_dir"
        )
    return TrainState(rest["step"], params, rest["opt_state"]), about["counters"]


def first_state(
    model: ModelConfig,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    initial: tuple[str, int | None] | None,
    allow_equal_reference: bool,
) -> TrainState:
    """A state at step 0, from the parameters of `initial` (run directory, step or None for its last) or random.

    Raises:
      UserError: the initial model has another shape or vocabulary, or is the very reference to be compared with.
    """
    params = _initial_params(*initial, model, plan, mesh) if initial else None
    state = init_state(model, optimizer, mesh, seed, params)
    if not allow_equal_reference:
        _refuse_equal_reference(state.params, plan)
    return state


def _initial_params(run: str, step: int | None, model: ModelConfig, plan: Plan, mesh: Mesh) -> Params:
    start = load_model(run, mesh, step)
    if start.vocabulary_hash != plan.corpus.vocabulary_hash:
        raise UserError(f"initial model {run} and corpus {plan.corpus.path} have different vocabularies")
    differing = [name for name in FUNCTION_FIELDS if getattr(start.config, name) != getattr(model, name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"initial model {run} has {name} = {getattr(start.config, name)}, the run's model {getattr(model, name)}: "
            "set model.* to the initial model's"
        )
    return start.params


def _refuse_equal_reference(params: Params, plan: Plan) -> None:
    """Excess loss against oneself is 0 everywhere: the ranking would be an accident."""
    fingerprint = params_fingerprint(params)
    for phase in plan.phases:
        if phase.selection is None or phase.selection.score != "excess":
            continue
        for draw in phase.mixture:
            reference = plan.corpora[draw.corpus].score(phase.selection.reference).reference
            if reference.get("fingerprint") == fingerprint:
                raise UserError(
                    f"column {phase.selection.reference} of {draw.corpus} was scored by the very model this run starts "
                    "from, so every excess loss is 0: train a reference, or set train.allow_equal_reference = True"
                )
