"""Stage `train`: config, mesh, state, data, loop."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.checkpoint import Checkpoints
from slm_jax.chips import chip_of
from slm_jax.data.batches import read_ahead
from slm_jax.errors import UserError
from slm_jax.files import to_json
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import MetricsWriter, progress
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.models.trained_model import check_rows
from slm_jax.train import plan_summary, rundir
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.phases import Phase, keep_ratio
from slm_jax.train.plan import Plan
from slm_jax.train.record import Record
from slm_jax.train.resume import Start, first_choice
from slm_jax.train.schedules import Schedule, cosine_schedule
from slm_jax.train.start import Shape, first_state, last_state, phase_start
from slm_jax.train.state import TrainState
from slm_jax.train.step import Step, compile_step, make_step


@gin.configurable
def train(
    run_dir: str,
    model: ModelConfig | None = None,
    phases: Sequence[Phase] = (),
    schedule: Schedule | None = None,
    optimizer: OptimizerConfig | None = None,
    mesh: MeshConfig | None = None,
    seed: int = 0,
    init_from: str | None = None,
    init_step: int | None = None,
    init_mode: str = "params",
    gradient_accumulation_steps: int = 1,
    checkpoint_every: int = 500,
    keep_checkpoints: int = 2,
    log_every: int = 1,
    evaluate_every: int = 500,
    evaluators: Sequence[Any] = (),
    max_nonfinite_scores: float = 0.01,
    allow_equal_reference: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains a model through the phases of a run. Started again with the same command, it continues where it was.

    Args:
      run_dir: directory to write to: config.gin, run.json, vocabulary/, metrics.jsonl, tensorboard/, checkpoints/, and
        summary.json at the end.
      model: architecture; a `vocab_size` of None takes the corpus' vocabulary.
      phases: what to train on, on which tokens, for how long; one Phase by default. A finished run that is given more
        phases, or a longer last one, continues.
      schedule: learning rate until the first phase that sets its own; cosine_schedule() by default.
      optimizer: settings of AdamW.
      mesh: devices along data, fsdp and model.
      seed: of the initial parameters, the data order and random selection.
      init_from: run directory to start from; None starts from random parameters.
      init_step: step of its checkpoint; None takes the last.
      init_mode: what to load: `params`, or the full training `state`: moments, step and counters too. With `state`
        this run is a branch of that one: its phases begin with that run's up to the step, and only what follows is
        trained.
      gradient_accumulation_steps: number of micro-batches that a batch is split into: same result, less memory.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: number of latest checkpoints to keep; those at phase boundaries are always kept.
      log_every: steps between rows of metrics.jsonl.
      evaluate_every: steps between evaluations, which are also made at step 0 and at the end.
      evaluators: HeldOut, MultipleChoice or Samples.
      max_nonfinite_scores: maximum fraction of non-finite scores in a batch before the run stops.
      dry_run: print the plan, draw it as <run_dir>/plan.png, and stop.
      allow_equal_reference: train on excess loss even though reference and initial model are the same. Excess is then
        0 at first, or in bfloat16 some hundredths, because two programs do not round alike.
    """
    # Called here rather than as defaults, so that gin's settings of these dataclasses reach them.
    model, optimizer = model or model_config(), optimizer or OptimizerConfig()
    phases = config_lib.as_list(phases, Phase, "train.phases") or [Phase()]  # pyright: ignore[reportCallIssue] (gin's)
    if schedule is None and not phases[0].schedule:
        schedule = cosine_schedule()
    if init_mode not in ("params", "state"):
        raise UserError(f"train.init_mode {init_mode!r} is unknown: known are params, state")
    if init_from is None and (init_mode == "state" or init_step is not None):
        raise UserError("train.init_mode and train.init_step are about another run: name it with train.init_from")
    devices = mesh_lib.make_mesh(mesh)
    plan = Plan(phases, seed, schedule)
    model = _checked_model(model, plan)
    _check_numbers(plan, devices, gradient_accumulation_steps, log_every, seed)
    _refuse_filtered_dropout(model, plan)
    measures = _bind(evaluators, model, plan, devices)
    settings = {
        "phases": plan.phases,
        "schedule": schedule,
        "optimizer": optimizer,
        "mesh": mesh,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "evaluate_every": evaluate_every,
        "evaluators": list(evaluators),
        "max_nonfinite_scores": max_nonfinite_scores,
    }
    if dry_run:
        return _show(run_dir, model, plan, devices)
    config_lib.print_unused()
    start = Start(seed, init_from, first_choice(run_dir, init_from, init_step), whole_state=init_mode == "state")

    with contextlib.ExitStack() as stack:
        busy = f"another process is training in {run_dir}: wait for it, or end it"
        stack.enter_context(processes.lock(Path(run_dir) / "lock", busy))
        if summary := rundir.claim(run_dir, model, plan, start, settings):
            return summary
        stack.enter_context(jax.set_mesh(devices))
        terminated = stack.enter_context(processes.termination())
        milestones = plan.first_steps[0 if plan.phases[0].l2_to_init else 1 :].tolist()
        checkpoints = stack.enter_context(Checkpoints(run_dir, keep_checkpoints, milestones))
        shape = Shape(model, make_optimizer(optimizer), devices, ema=optimizer.ema > 0)
        state, counters = last_state(checkpoints, shape) or first_state(start, shape, plan, allow_equal_reference)
        print(rundir.describe(run_dir, model, plan, devices, int(state.step)), flush=True)
        speed = (model.flops_per_token(plan.corpus.sequence_length), _peak_flops(devices))
        writer = stack.enter_context(contextlib.closing(MetricsWriter(run_dir, int(state.step))))
        record = Record(writer, plan.source_names, max_nonfinite_scores, log_every, *speed, counters)
        steps = _steps(plan, shape, seed, gradient_accumulation_steps, optimizer.ema)

        def phase_params(first: int) -> Any:
            return phase_start(run_dir, start, shape, plan, first)

        about = {"model": model, "vocabulary_hash": plan.corpus.vocabulary_hash, "run": run_dir}

        def evaluate(state: TrainState) -> None:
            rundir.write_evaluation(run_dir, writer, int(state.step), (run(state.params) for run in measures))

        def save(state: TrainState) -> None:
            full_about = to_json(about | {"counters": record.counters()})
            checkpoints.save(int(state.step), state.items(), full_about)

        pauses = _pauses(plan, {evaluate: evaluate_every, save: checkpoint_every})
        state = _run(state, plan, steps, devices, record, pauses, terminated, phase_params)
        if int(state.step) < plan.total_steps:
            save(state)
    if int(state.step) < plan.total_steps:
        print(f"train: terminated at step {int(state.step)}, saved; the same command continues")
        return {}
    return rundir.finish(run_dir, model, plan, record)


def _checked_model(model: ModelConfig, plan: Plan) -> ModelConfig:
    """The model with the corpus' vocabulary size where it names none; refuses rows that it cannot read."""
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=plan.corpus.vocab_size)
    check_rows(model, plan.corpus, "the model")
    return model


def _check_numbers(plan: Plan, devices: Mesh, gradient_accumulation_steps: int, log_every: int, seed: int) -> None:
    config_lib.at_least(
        1, **{"train.gradient_accumulation_steps": gradient_accumulation_steps, "train.log_every": log_every}
    )
    config_lib.at_least(0, **{"train.seed": seed})
    for number, phase in enumerate(plan.phases):
        mesh_lib.check_batch(devices, phase.batch_size, f"phase {number}", gradient_accumulation_steps)


def _refuse_filtered_dropout(model: ModelConfig, plan: Plan) -> None:
    for number, phase in enumerate(plan.phases):
        if model.dropout and phase.selection and phase.selection.gradient == "filtered":
            raise UserError(
                f"phase {number} has a filtered gradient, which knows no dropout, and model.dropout is "
                f"{model.dropout:g}: set it to 0, or Selection.gradient to 'exact'"
            )


def _bind(evaluators: Sequence[Any], model: ModelConfig, plan: Plan, devices: Mesh) -> list[Any]:
    if not isinstance(evaluators, (list, tuple)):
        raise UserError(f"train.evaluators takes a list: [@HeldOut()]; it was given {evaluators!r}")
    names = [evaluator.name for evaluator in evaluators]
    if len(set(names)) < len(names):
        raise UserError(f"train.evaluators: two are called {max(names, key=names.count)!r}; give each its own name")
    return [evaluator.bind(model, plan.corpus.vocabulary_hash, devices) for evaluator in evaluators]


def _run(
    state: TrainState,
    plan: Plan,
    steps: Sequence[Step],
    devices: Mesh,
    record: Record,
    pauses: Callable[[int], list[Callable[[TrainState], None]]],
    terminated: Callable[[int], bool],
    phase_params: Callable[[int], Any],
) -> TrainState:
    """From the state's step to the plan's end, or until terminated. Sums are fetched one step late, so that the device
    never waits for the host."""
    first = int(state.step)

    def load(step: int) -> Any:
        batch_size = plan.phases[plan.phase_index(step)].batch_size
        return mesh_lib.to_devices(devices, batch_size, lambda rows: plan.batch(step, rows))

    if first == 0:
        for pause in pauses(0):
            pause(state)
    batches = read_ahead(load, first, plan.total_steps)
    pending = None
    record.start_clock()
    with contextlib.closing(batches), progress(plan.total_steps, first, "train") as bar:
        for step, batch in enumerate(batches, first):
            phase = plan.phase_index(step)
            if step in (first, plan.first_steps[phase]):
                state = _enter(state, plan.phases[phase], step, int(plan.first_steps[phase]), phase_params)
            state, sums = steps[phase](state, batch)
            if pending:
                record.add(*pending)
                bar.set_postfix(loss=record.last_row["loss"], refresh=False)
            pending = (step + 1, phase, plan.phases[phase].selection, sums)
            due, stop = pauses(step + 1), terminated(step + 1)
            if due or stop:
                record.add(*pending)
                pending = None
                for pause in due:
                    pause(state)
                record.start_clock()
            bar.update()
            if stop:
                break
    return state


def _enter(state: TrainState, phase: Phase, step: int, begin: int, phase_params: Callable[[int], Any]) -> TrainState:
    """What a phase asks of the state when it begins, or when the run starts in the middle of it."""
    if step == begin and phase.reset_optimizer:
        state = state._replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))
    if not phase.l2_to_init:
        return state._replace(start=None)
    at_begin = jax.tree.map(jnp.copy, state.params) if step == begin else phase_params(begin)
    return state._replace(start=at_begin)


def _steps(plan: Plan, shape: Shape, seed: int, gradient_accumulation_steps: int, ema: float) -> list[Step]:
    """The compiled step of each phase."""
    shapes, steps = shape.of_state(), []
    for number, phase in enumerate(plan.phases):
        step = make_step(
            shape.model,
            phase.selection,
            shape.optimizer,
            plan.learning_rate,
            seed,
            gradient_accumulation_steps,
            keep_ratio=keep_ratio(plan.phases, number),
            l2_to_init=phase.l2_to_init,
            ema=ema,
        )
        steps.append(compile_step(step, shape.mesh, shapes._replace(start=shapes.params if phase.l2_to_init else None)))
    return steps


def _show(run_dir: str, model: ModelConfig, plan: Plan, devices: Mesh) -> dict[str, Any]:
    """The plan in words and as a picture."""
    print(rundir.describe(run_dir, model, plan, devices, 0))
    path = Path(run_dir) / "plan.png"
    processes.on_first(lambda: plan_summary.draw(plan, path))
    print(f"train: nothing was trained; the plan is drawn in {path}")
    return {}


def _pauses(plan: Plan, every: dict[Callable[[TrainState], None], int]) -> Callable[[int], list]:
    """What to do after so many finished steps: each action every so often, at phase boundaries and at the end."""
    boundaries = set(plan.first_steps[1:].tolist())

    def due(done: int) -> list:
        return [action for action, period in every.items() if done in boundaries or (period and done % period == 0)]

    return due


def _peak_flops(devices: Mesh) -> float | None:
    """Of all devices; None, and MFU is not logged, where their data sheet is not known."""
    chip = chip_of(devices.devices.flat[0].device_kind)
    return chip.peak_flops * devices.size if chip else None
