"""The programs of a run, as its gin file describes them: a train step for each phase, and the scoring step.

They are the programs that the stages `train` and `score` compile, made from the same settings by the same functions,
with shapes in place of arrays.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slm_jax import mesh as mesh_lib
from slm_jax.compile.costs import Work
from slm_jax.configurable import fit_settings
from slm_jax.data.batches import Batch
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.score.score_corpus import score_batch
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.phases import Phase, history_lag, keep_ratio, learning_rate
from slm_jax.train.state import state_shapes
from slm_jax.train.step import compile_step, make_step

LOWERED = {"gpu": "cuda"}  # platforms whose name differs between devices and lowering


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A jitted function with the shapes of its arguments."""

    work: Work
    function: Any
    weights: Any
    moments: Any  # None when scoring
    batch: Batch
    arguments: tuple[Any, ...]

    def compile(self) -> Any:
        """Compiles for the devices of the mesh, which need not be attached."""
        platform = self.work.mesh.devices.flat[0].platform
        with jax.set_mesh(self.work.mesh):
            traced = self.function.trace(*self.arguments)
            return traced.lower(lowering_platforms=(LOWERED.get(platform, platform),)).compile()


@dataclasses.dataclass(frozen=True)
class Run:
    """What the bindings of `train` and `score` say about programs, with the stages' defaults."""

    model: ModelConfig
    phases: Sequence[Phase]
    mesh: Mesh
    sequence_length: int
    train: dict[str, Any]
    score: dict[str, Any]


def bound_run(devices: Sequence[Any], sequence_length: int | None) -> Run:
    """The run that gin's settings describe, on the given devices.

    Raises:
      UserError: its corpora do not exist, and the settings name no sequence length or vocabulary size.
    """
    train, score = fit_settings("train", gin.get_bindings("train")), fit_settings("score", gin.get_bindings("score"))
    model = train.get("model") or model_config()
    phases = train.get("phases") or [Phase()]  # pyright: ignore[reportCallIssue]
    if sequence_length is None or model.vocab_size is None:
        path, setting = (
            phases[0].mixture[0].corpus,
            "compile.sequence_length" if sequence_length is None else "model.vocab_size",
        )
        try:
            corpus = Corpus.open(path)
        except UserError as error:
            raise UserError(
                "compile-no-corpus", f"cannot read {setting} off corpus {path} ({error}): set it"
            ) from error
        sequence_length = sequence_length or corpus.sequence_length
        model = dataclasses.replace(model, vocab_size=model.vocab_size or corpus.vocab_size)
    if sequence_length > model.max_length:
        raise UserError(
            "model-max-length",
            f"rows of {sequence_length} tokens are longer than model.max_length = {model.max_length}: raise it",
        )
    phases = [phase.resolved(sequence_length) for phase in phases]
    return Run(model, phases, mesh_lib.make_mesh(train.get("mesh"), devices), sequence_length, train, score)


def train_steps(run: Run) -> Iterator[StepProgram]:
    """The program of each phase; phases with the same program share one."""
    gradient_accumulation_steps = run.train.get("gradient_accumulation_steps", 1)
    config = run.train.get("optimizer") or OptimizerConfig()
    optimizer, ema = make_optimizer(config), config.ema
    rate = learning_rate(run.phases, run.train.get("schedule"))
    seen, lag = [], history_lag(run.phases)
    for number, phase in enumerate(run.phases):
        program = (phase.selection, phase.batch_size, phase.l2_to_init > 0, phase.keep_ratio, phase.weights)
        if program in seen:
            continue
        seen.append(program)
        name = f"train, phase {number}"
        mesh_lib.check_batch(run.mesh, phase.batch_size, name, gradient_accumulation_steps)
        # The step of training, with the phase's settings.
        step = make_step(
            run.model,
            phase.selection,
            optimizer,
            rate,
            run.train.get("seed", 0),
            gradient_accumulation_steps,
            keep_ratio=keep_ratio(run.phases, number),
            l2_to_init=phase.l2_to_init,
            ema=ema,
            weighting=phase.weights,
            lag=lag,
        )
        work = Work(
            name, run.model, run.mesh, phase.batch_size, run.sequence_length, gradient_accumulation_steps, training=True
        )
        # Its arguments as shapes: the state, which the program updates in place, and the batch.
        batch = _batch(work, phase.score_columns)
        shapes = state_shapes(run.model, optimizer, run.mesh, ema > 0, lag > 0)
        shapes = shapes._replace(start=shapes.params if phase.l2_to_init else None)
        moments = (shapes.opt_state, shapes.average, shapes.start, shapes.history)
        yield StepProgram(work, compile_step(step, run.mesh, shapes), shapes.params, moments, batch, (shapes, batch))


def score_step(run: Run) -> StepProgram:
    """The scoring step of a reference with the run's architecture.

    The batch has score.batch_size rows if that is set, else the rows of a training micro-batch.
    """
    gradient_accumulation_steps = run.train.get("gradient_accumulation_steps", 1)
    rows = run.score.get("batch_size", run.phases[0].batch_size // gradient_accumulation_steps)
    statistics = run.score.get("statistics", ("loss",))
    mesh = mesh_lib.make_mesh(run.score.get("mesh"), run.mesh.devices.flatten().tolist())
    mesh_lib.check_batch(mesh, rows, "score")
    work = Work("score", run.model, mesh, rows, run.sequence_length, 1, training=False)
    batch = _batch(work, ())
    params = state_shapes(run.model, make_optimizer(OptimizerConfig()), mesh).params
    function = jax.jit(lambda params, batch: score_batch(params, run.model, batch, statistics))
    return StepProgram(work, function, params, None, batch, (params, batch))


def _batch(work: Work, score_columns: Sequence[str]) -> Batch:
    sharding = mesh_lib.batch_sharding(work.mesh)

    def shape(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((work.rows, work.length), dtype, sharding=sharding)

    whole = [shape(jnp.int32) for _ in range(3)]
    scores = {name: shape(jnp.float32) for name in score_columns}
    return Batch(*whole, loss_mask=shape(jnp.bool_), source_ids=shape(jnp.int32), scores=scores)
