"""Stage `train`, read from top to bottom: settings, mesh, plan, state, data, loop."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.checkpoint import Checkpoints
from slm_jax.chips import chip_of
from slm_jax.configurable import Count, Natural, OneOf, Seed, Share, configurable
from slm_jax.data.batches import Batch, read_ahead
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.files import to_json, write_json
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import MetricsWriter, progress
from slm_jax.models.forward import Params
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.models.trained_model import check_rows
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import histories
from slm_jax.train import plan_summary
from slm_jax.train.missing import missing_inputs
from slm_jax.train.optimizer import OptimizerConfig
from slm_jax.train.phases import Phase, keep_ratio
from slm_jax.train.plan import Plan
from slm_jax.train.resume import (
    Start,
    StateSpec,
    check_same_in_all_processes,
    check_start,
    claim,
    phase_start_params,
    start_state,
)
from slm_jax.train.schedules import Schedule, cosine_schedule, peak_by_size
from slm_jax.train.state import TrainState
from slm_jax.train.step import compile_step, make_step
from slm_jax.train.step_metrics import StepMetrics, write_evaluation


@runtime_checkable
class Evaluator(Protocol):
    """What the loop needs of an evaluator, such as HeldOut; `evaluate` itself may not be imported here.

    `bind` returns a function from parameters to pairs (name, value), see `write_evaluation`.
    """

    @property
    def name(self) -> str: ...

    def bind(self, model: ModelConfig, vocabulary_hash: str, mesh: Mesh) -> Callable[[Params], Iterable[Any]]: ...


def _peak(model: ModelConfig, phases: Sequence[Phase]) -> float:
    """The peak learning rate of a run that sets none, from the number of its parameters."""
    vocab_size = model.vocab_size or Corpus.open(phases[0].mixture[0].corpus).vocab_size
    count = dataclasses.replace(model, vocab_size=vocab_size).parameter_count()
    peak = peak_by_size(count)
    print(
        f"train: peak learning rate {peak:g}, for {count:,} parameters: cosine_schedule.peak sets another", flush=True
    )
    return peak


@configurable
def train(
    run_dir: str,
    model: ModelConfig | None = None,
    phases: Sequence[Phase] = (),
    schedule: Schedule | None = None,
    optimizer: OptimizerConfig | None = None,
    mesh: MeshConfig | None = None,
    seed: Seed = 0,
    init_from: str | None = None,
    init_step: Natural | None = None,
    init_mode: Annotated[str, OneOf(("params", "state"))] = "params",
    gradient_accumulation_steps: Count = 1,
    checkpoint_every: Natural = 500,
    keep_checkpoints: Count = 2,
    pin_checkpoints: Sequence[Natural] = (),
    log_every: Count = 1,
    evaluate_every: Natural = 500,
    evaluators: Sequence[Evaluator] = (),
    max_nonfinite_scores: Share = 0.01,
    allow_equal_reference: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains a model through the phases of a run. The same command continues a run that was stopped.

    Args:
      run_dir: directory to write to: config.gin, run.json, vocabulary/, metrics.jsonl, tensorboard/, checkpoints/, and
        summary.json at the end.
      model: architecture; a `vocab_size` of None takes the corpus' vocabulary.
      phases: what to train on, on which tokens, for how long; one Phase by default. A finished run that is given more
        phases, or a longer last one, continues.
      schedule: learning rate until the first phase that sets its own; by default cosine_schedule(), whose
        peak follows the size of the model unless cosine_schedule.peak is set.
      optimizer: AdamW or another optimizer, and its settings.
      mesh: devices along data, fsdp and model.
      seed: of the initial parameters, the data order and random selection.
      init_from: run directory to start from; None starts from random parameters.
      init_step: step of its checkpoint; None takes the last.
      init_mode: what to load: `params`, or the full training `state` with moments, step and counters. With `state`
        this run is a branch of that one: its phases must begin with that run's up to the step, and only the steps after
        it are trained.
      gradient_accumulation_steps: number of micro-batches that a batch is split into: same result, less memory.
      checkpoint_every: steps between checkpoints; 0 writes them at phase boundaries only.
      keep_checkpoints: number of latest checkpoints to keep; those at phase boundaries are always kept.
      pin_checkpoints: further steps at which a checkpoint is written and always kept, to start branches from.
      log_every: steps between rows of metrics.jsonl.
      evaluate_every: steps between evaluations, which are also made at step 0 and at the end of each phase.
      evaluators: HeldOut, MultipleChoice or Samples.
      max_nonfinite_scores: maximum fraction of non-finite scores in a batch before the run stops.
      dry_run: print the plan, draw it as <run_dir>/plan.png, and stop; if inputs are missing, list them instead. The
        mesh may be larger than this machine.
      allow_equal_reference: train on excess loss even though reference and initial model are the same. The excess is
        then 0 at first; in bfloat16 up to some hundredths, because two programs round differently.
    """
    # --- Settings. Defaults are made here, after gin has read its files; in the signature they would be made on import.
    model, optimizer = model or model_config(), optimizer or OptimizerConfig()
    phases = phases or [Phase()]  # pyright: ignore[reportCallIssue] (gin's)
    if dry_run and (missing := missing_inputs(phases, evaluators, init_from)):
        print("\n".join([f"train: inputs of {run_dir} are missing:", *(f"  {line}" for line in missing)]), flush=True)
        raise UserError(
            "train-missing-inputs", f"{len(missing)} of its inputs are missing, listed above: make them first"
        )
    if schedule is None and not phases[0].schedule:
        named = "peak" in gin.get_bindings("cosine_schedule", resolve_references=False)
        schedule = cosine_schedule() if named else cosine_schedule(_peak(model, phases))

    # --- Mesh (`devices`; `mesh` is its settings), and the plan: rows, selection and learning rate of each step.
    devices, run = mesh_lib.make_mesh(mesh) if not dry_run else mesh_lib.planned_mesh(mesh), RunDirectory(run_dir)
    plan = Plan(phases, seed, schedule)
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=plan.corpus.vocab_size)
    check_rows(model, plan.corpus, "the model")
    for number, phase in enumerate(plan.phases):
        mesh_lib.check_batch(devices, phase.batch_size, f"phase {number}", gradient_accumulation_steps)
        if model.dropout and phase.selection and phase.selection.gradient == "filtered":
            raise UserError(
                "train-filtered-dropout",
                f"phase {number} has a filtered gradient, which cannot use dropout, and model.dropout is "
                f"{model.dropout:g}: set it to 0, or Selection.gradient to 'exact'",
            )

        if "average" in histories(phase.selection) and not optimizer.ema:
            raise UserError(
                "selection-no-average",
                f"phase {number} has Selection.history = 'average', and the run keeps no moving average: set "
                "OptimizerConfig.ema, for example to 0.99",
            )

    # --- Evaluators, bound to the model.
    names = [evaluator.name for evaluator in evaluators]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError("evaluators-same-name", f"two of train.evaluators are called {repeated[0]!r}: rename one")
    measures = []
    if isinstance(devices, Mesh):  # a plan may be for more devices than are here, on which nothing can be bound
        measures = [evaluator.bind(model, plan.corpus.vocabulary_hash, devices) for evaluator in evaluators]

    config_lib.print_unused()
    start = Start.of(run_dir, seed, init_from, init_step, init_mode)
    settings = {
        "phases": [phase.record() for phase in plan.phases],
        "schedule": schedule,
        "optimizer": optimizer,
        "mesh": mesh,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "evaluate_every": evaluate_every,
        "evaluators": list(evaluators),
        "max_nonfinite_scores": max_nonfinite_scores,
    }
    check_same_in_all_processes(model, plan, start, settings)
    if not run.checkpoint_steps():
        check_start(start, model, plan)
    if dry_run or not isinstance(devices, Mesh):
        processes.on_first(lambda: claim(run, model, plan, start, settings, dry_run=True))
        print(plan_summary.describe(run, model, plan, devices, 0))
        processes.on_first(lambda: plan_summary.draw(plan, run.plan_png))
        print(f"train: nothing was trained; the plan is drawn in {run.plan_png}")
        return {}

    with contextlib.ExitStack() as stack:
        # --- Run directory: locked against other processes; a new run, or one that these settings continue.
        busy = f"another process is training in {run}: wait for it to finish, or stop it"
        stack.enter_context(processes.lock(run.lock, busy))
        if summary := processes.on_first(lambda: claim(run, model, plan, start, settings)):
            return summary

        # --- State: from the last checkpoint, from another run, or random.
        stack.enter_context(jax.set_mesh(devices))
        terminated = stack.enter_context(processes.termination())
        # Checkpoints at phase boundaries are kept: branches start there, and l2_to_init needs the parameters with which
        # its phase began, those of step 0 too.
        milestones = plan.first_steps[0 if plan.phases[0].l2_to_init else 1 :].tolist()
        checkpoints = stack.enter_context(Checkpoints(run, keep_checkpoints, [*milestones, *pin_checkpoints]))
        spec = StateSpec(model, optimizer, devices, lagged=plan.lag > 0)
        state, counters = start_state(checkpoints, start, spec, plan, allow_equal_reference)
        first = int(state.step)
        print(plan_summary.describe(run, model, plan, devices, first), flush=True)

        # --- One jitted step per phase; each is compiled when it is first called.
        steps, shapes = [], spec.shapes()
        for number, phase in enumerate(plan.phases):
            step_of_phase = make_step(
                model,
                phase.selection,
                spec.optimizer,
                plan.learning_rate,
                seed,
                gradient_accumulation_steps,
                keep_ratio=keep_ratio(plan.phases, number),
                l2_to_init=phase.l2_to_init,
                ema=optimizer.ema,
                weighting=phase.weights,
                lag=plan.lag,
            )
            shapes_of_phase = shapes._replace(start=shapes.params if phase.l2_to_init else None)
            steps.append(compile_step(step_of_phase, devices, shapes_of_phase))

        # --- Metrics, evaluation and checkpoints, between steps.
        writer = stack.enter_context(contextlib.closing(MetricsWriter(run, first)))
        chip = chip_of(devices.devices.flat[0].device_kind)
        peak_flops = chip.peak_flops * devices.size if chip else None  # unknown for chips without a data sheet
        flops_per_token = model.flops_per_token(plan.corpus.sequence_length)
        metrics = StepMetrics(
            writer, plan.source_names, max_nonfinite_scores, log_every, flops_per_token, peak_flops, counters
        )

        def evaluate(state: TrainState) -> None:
            # Lazy: token losses and samples are written before the next evaluator runs.
            results = (result for measure in measures for result in measure(state.params))
            write_evaluation(run, writer, int(state.step), results)

        def save(state: TrainState) -> None:
            about = {"model": model, "vocabulary_hash": plan.corpus.vocabulary_hash, "run": run_dir}
            checkpoints.save(int(state.step), state.items(), to_json({**about, "counters": metrics.counters()}))

        def due(done: int, every: int) -> bool:
            # The end of the run is the end of its last phase.
            return done in plan.first_steps[1:] or (every > 0 and done % every == 0)

        # --- Data: this host's rows of each batch [B, L], read ahead in a background thread.
        def load(step: int) -> Batch:
            # Any host can compute any row of any step, so the hosts divide the rows without communication.
            batch_size = plan.phases[plan.phase_index(step)].batch_size
            return mesh_lib.to_devices(devices, batch_size, lambda rows: plan.batch(step, rows))

        batches = stack.enter_context(contextlib.closing(read_ahead(load, first, plan.total_steps)))

        # --- Loop. The metric sums of a step are fetched after the next one is dispatched, so that devices never wait.
        if first == 0:
            if due(0, evaluate_every):
                evaluate(state)
            if due(0, checkpoint_every) or 0 in pin_checkpoints:
                save(state)
        bar = stack.enter_context(progress(plan.total_steps, first, "train"))
        pending = None  # arguments of `metrics.add` for the step that may still be running
        metrics.start_clock()
        for step, batch in enumerate(batches, first):  # step: number of finished steps, from 0
            number = plan.phase_index(step)
            phase, begin = plan.phases[number], int(plan.first_steps[number])
            # The state changes where a phase begins, or where this process starts within one.
            if step in (first, begin):
                if step == begin and phase.reset_optimizer:
                    state = state._replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))
                phase_start = None  # the parameters with which the phase began, if l2_to_init needs them
                if phase.l2_to_init and step == begin:
                    phase_start = jax.tree.map(jnp.copy, state.params)  # a copy: the step reuses the memory of params
                elif phase.l2_to_init:
                    phase_start = phase_start_params(run, start, spec, plan, begin)
                state = state._replace(start=phase_start)
            state, metric_sums = steps[number](state, batch)
            if pending:
                metrics.add(*pending)
                bar.set_postfix(loss=metrics.last_row["loss"], refresh=False)
            pending = (step + 1, number, phase.selection, metric_sums)  # step + 1: steps that are finished by then
            bar.update()
            stop = terminated(step + 1)
            # Sums are added first: a step that is not finite stops the run before it can be saved.
            saves = stop or due(step + 1, checkpoint_every) or step + 1 in pin_checkpoints
            if saves or due(step + 1, evaluate_every):
                metrics.add(*pending)
                pending = None
                if due(step + 1, evaluate_every):
                    evaluate(state)
                if saves:
                    save(state)
                metrics.start_clock()
            if stop:
                break

    # --- End. A run that was terminated has no summary, so that the same command continues it.
    if int(state.step) < plan.total_steps:
        print(f"train: terminated at step {int(state.step)}, saved; the same command continues")
        return {}

    def finish() -> dict[str, Any]:
        # The latest value of each metric: evaluations are rows of their own, and rarer than steps.
        last = {name: value for row in run.metrics() for name, value in row.items() if value is not None}
        sizes = {"steps": plan.total_steps, "parameters": model.parameter_count()}
        write_json(run.summary_json, summary := {**sizes, **metrics.counters(), "last": last})
        loss = last.get("loss", float("nan"))
        print(f"train: done, {plan.total_steps} steps, loss {loss:.4f}; see {run.summary_json}")
        return summary

    return processes.on_first(finish)
