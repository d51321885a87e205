"""The state a run starts from: its last checkpoint, another run's state or parameters, or random parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from slm_jax.checkpoint import Checkpoints, params_fingerprint, read_about, restore_items, restore_params
from slm_jax.errors import UserError
from slm_jax.models.forward import Params
from slm_jax.models.model_config import FUNCTION_FIELDS, ModelConfig
from slm_jax.models.trained_model import load_model
from slm_jax.train.plan import Plan
from slm_jax.train.resume import Start, branched_from
from slm_jax.train.state import TrainState, init_state, state_shapes


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a state looks like on its mesh."""

    model: ModelConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh
    ema: bool

    def of_state(self) -> TrainState:
        return state_shapes(self.model, self.optimizer, self.mesh, self.ema)


def last_state(checkpoints: Checkpoints, shape: Shape) -> tuple[TrainState, dict[str, float]] | None:
    """State and counters of the run's newest readable checkpoint; None before the first.

    Raises:
      UserError: no checkpoint can be read.
    """
    restored = checkpoints.restore(shape.of_state().items())
    if restored is None:
        return None
    items, about = restored
    return TrainState.of(items), about["counters"]


def first_state(start: Start, shape: Shape, plan: Plan, allow_equal_reference: bool) -> tuple[TrainState, dict]:
    """The state and counters of a run that has no checkpoint yet.

    Raises:
      UserError: the initial model has another shape or vocabulary, or is the very reference to be compared with; the
        plan is not that of the run whose state it inherits.
    """
    if start.init_from and start.whole_state:
        return _inherited(start.init_from, start.step, start.seed, shape, plan)
    state = _state_at_0(start, shape, plan)
    if not allow_equal_reference:
        refuse_equal_reference(state.params, plan)
    return state, {}


def phase_start(run_dir: str, start: Start, shape: Shape, plan: Plan, first: int) -> Params:
    """The parameters after the first `first` steps, with which a phase began that is under way: those of the run's
    checkpoint there, or of the run that it goes on with, or the initial ones."""
    for run in (run_dir, start.init_from if start.whole_state else None):
        if run:
            try:
                return restore_params(run, shape.of_state().params, first)
            except UserError:
                continue
    if first or start.whole_state:
        raise UserError(
            f"{run_dir} has no checkpoint of step {first}, where the phase with Phase.l2_to_init began: it cannot "
            "know what to stay near"
        )
    return _state_at_0(start, shape, plan).params


def _state_at_0(start: Start, shape: Shape, plan: Plan) -> TrainState:
    params = _initial_params(start.init_from, start.step, shape, plan) if start.init_from else None
    return init_state(shape.model, shape.optimizer, shape.mesh, start.seed, params, shape.ema)


def _initial_params(run: str, step: int | None, shape: Shape, plan: Plan) -> Params:
    model = load_model(run, shape.mesh, step)
    if model.vocabulary_hash != plan.corpus.vocabulary_hash:
        raise UserError(f"initial model {run} and corpus {plan.corpus.path} have different vocabularies")
    differing = [name for name in FUNCTION_FIELDS if getattr(model.config, name) != getattr(shape.model, name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"initial model {run} has {name} = {getattr(model.config, name)}, the run's model "
            f"{getattr(shape.model, name)}: set model.* to the initial model's"
        )
    return model.params


def _inherited(run: str, at: int | None, seed: int, shape: Shape, plan: Plan) -> tuple[TrainState, dict]:
    about = read_about(run, at)
    step = int(about["step"])
    if step >= plan.total_steps:
        raise UserError(
            f"the run goes on from step {step} of {run}, its phases end at {plan.total_steps}: they begin with those "
            "of that run up to there, give it more"
        )
    settings = branched_from(run, step, shape.model, plan, seed)
    shapes = dataclasses.replace(shape, ema=settings["optimizer"].get("ema", 0.0) > 0).of_state()
    state = TrainState.of(restore_items(run, shapes.items(), step))
    if not shape.ema:
        state = state._replace(average=None)
    elif state.average is None:
        state = state._replace(average=jax.tree.map(jnp.copy, state.params))
    return state, about["counters"]


def refuse_equal_reference(params: Params, plan: Plan) -> None:
    """Excess loss against oneself is 0 everywhere: the ranking would be an accident.

    Raises:
      UserError: the references of a selection by excess loss all are the model with these parameters.
    """
    fingerprint = params_fingerprint(params)
    for phase in plan.phases:
        for part in phase.selection.parts if phase.selection else ():
            if part.score != "excess":
                continue
            for draw in phase.mixture:
                columns = [plan.corpora[draw.corpus].score(name) for name in part.references]
                if all(column.reference.get("fingerprint") == fingerprint for column in columns):
                    raise UserError(
                        f"column {', '.join(part.references)} of {draw.corpus} was scored by the very model this run "
                        "starts from, so every excess loss is 0: train a reference, or set "
                        "train.allow_equal_reference = True"
                    )
