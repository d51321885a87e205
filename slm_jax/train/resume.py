"""Whether a plan may resume the run in a directory, and the state that a run starts from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.checkpoint import Checkpoints, params_fingerprint, read_about, restore_items, restore_params
from slm_jax.errors import UserError
from slm_jax.files import to_json, write_json, write_text
from slm_jax.models.forward import Params
from slm_jax.models.model_config import FUNCTION_FIELDS, ModelConfig
from slm_jax.models.trained_model import load_model
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import recorded_lag
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.plan import Plan
from slm_jax.train.state import TrainState, init_state, state_shapes

DECAYED = 0.5  # below this fraction of its peak, a learning rate is low for new data
RESULT_SETTINGS = ("phases", "schedule", "optimizer")  # a finished run cannot change these


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a run that has no checkpoints.

    seed: of random parameters.
    init_from: another run, or None.
    init_step: step of the other run's checkpoint.
    whole_state: load moments, step and counters too, so that this run is a branch of the other one.
    """

    seed: int
    init_from: str | None = None
    init_step: int | None = None
    whole_state: bool = False

    @classmethod
    def of(cls, run_dir: str, seed: int, init_from: str | None, init_step: int | None, init_mode: str) -> "Start":
        """The start that train's settings describe. Without an `init_step`, the step is the one with which the run in
        run_dir was first started, else the last checkpoint of the other run."""
        if init_from is None and (init_mode == "state" or init_step is not None):
            raise UserError(
                "train-no-init-from",
                "train.init_mode and train.init_step describe another run: name it with train.init_from",
            )

        def choose() -> int | None:
            if init_from is None or init_step is not None:
                return init_step
            identity = RunDirectory(run_dir).identity()
            if identity.get("init_from") == init_from and identity.get("init_step") is not None:
                return identity["init_step"]
            return int(read_about(init_from)["step"])

        # Only the first process looks, because another one could already see a newer checkpoint.
        return cls(seed, init_from, processes.on_first(choose), init_mode == "state")


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """What determines the shapes of a state and their shardings."""

    model: ModelConfig
    config: OptimizerConfig
    mesh: Mesh
    lagged: bool = False

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config)

    @property
    def ema(self) -> bool:
        return self.config.ema > 0

    def shapes(self) -> TrainState:
        return state_shapes(self.model, self.optimizer, self.mesh, self.ema, self.lagged)


# --- The run directory


def claim(
    run: RunDirectory, model: ModelConfig, plan: Plan, start: Start, settings: dict[str, Any], dry_run: bool = False
) -> dict[str, Any] | None:
    """Writes run.json, config.gin and vocabulary/, after comparing the plan with the run in the directory, if any.

    A changed setting is printed and used, unless the steps already trained depend on it. run.json keeps one entry per
    start. With `dry_run`, nothing is written.

    Returns:
      The summary if the run is finished, else None.

    Raises:
      UserError: the run in the directory has another model, seed, corpus, reference, start or data order, or it is
        finished and was made with other settings; or the corpus' vocabulary is damaged.
    """
    own = {"init_from": start.init_from, "init_step": start.init_step, "whole_state": start.whole_state}
    identity = {**run_identity(model, plan, start.seed), **own}
    new = to_json({"identity": identity, "settings": {**settings, "model": model}, "starts": []})
    # A start that was refused before its first checkpoint does not count as a run.
    if (steps := run.checkpoint_steps()) and (old := run.record()):
        done, remedy = steps[-1], "choose another train.run_dir"
        if "identity" not in old or "phases" not in old.get("settings", {}):
            raise UserError("resume-other-run", f"{run} holds a model that is not a train run: {remedy}")
        named = with_names_of(old, new)
        check_same_identity(old["identity"], named["identity"], run, remedy)
        check_same_rows(old["settings"]["phases"], named["settings"]["phases"], done, run, remedy)
        # Fields that an older version did not have are at their defaults.
        old["settings"]["optimizer"] = to_json(OptimizerConfig(**old["settings"]["optimizer"]))
        was, now = (record["settings"]["optimizer"] for record in (old, new))
        check_same_moments(was, now, run, remedy)
        if (was["ema"] > 0) != (now["ema"] > 0):
            raise UserError(
                "resume-other-average",
                f"{run} holds a run with OptimizerConfig.ema = {was['ema']:g}, now {now['ema']:g}: an average must "
                f"start at the first step; {remedy}",
            )
        was, now = (recorded_lag(record["settings"]["phases"]) for record in (old, new))
        if was != now:
            raise UserError(
                "resume-other-history",
                f"{run} holds a run with Selection.lag = {was} for a lagged history, now {now} (0 for none): a history "
                f"must start at the first step; {remedy}",
            )
        changed = [name for name, value in named["settings"].items() if old["settings"].get(name) != value]
        summary = run.summary()
        if summary and summary["steps"] >= plan.total_steps:
            conflicts = [name for name in changed if name in RESULT_SETTINGS]
            if old["settings"]["model"].get("dropout", 0.0) != model.dropout:
                conflicts.append("model.dropout")
            if conflicts or summary["steps"] > plan.total_steps:
                raise UserError(
                    "resume-finished-run",
                    f"{run} holds a finished run of {summary['steps']} steps made with other settings "
                    f"({', '.join(conflicts)}): {remedy}, or ask for more steps to extend it",
                )
            print(f"train: {run} already has its {plan.total_steps} steps; see {run.summary_json}")
            return summary
        if done > plan.total_steps:
            raise UserError(
                "resume-past-end",
                f"{run} is at step {done}, the run now has {plan.total_steps}: ask for at least as many, or {remedy}",
            )
        if difference := learning_rate_change(run, done, plan):
            print(f"train: {difference}")
        if summary and (offer := ways_to_extend(run, done, plan)):
            print(f"train: {offer}")
        for name in changed:
            print(f"train: {name} was {old['settings'].get(name)}, is {new['settings'][name]} from here on")
        new["starts"] = old["starts"]
    vocabulary = plan.corpus.vocabulary()  # before anything is written: it may be damaged
    if dry_run:
        return None
    machine = {
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": processes.count(),
    }
    new["starts"].append({**config_lib.environment(), **machine})
    write_json(run.run_json, new)
    write_text(run.config_gin, gin.operative_config_str())
    vocabulary.save(run.vocabulary)
    return None


def check_same_in_all_processes(model: ModelConfig, plan: Plan, start: Start, settings: dict[str, Any]) -> None:
    """Compares what the processes of a job are about to train, before the first step.

    Raises:
      UserError: `processes-differ`, with the first difference.
    """

    def facts() -> dict[str, Any]:
        environment = config_lib.environment()
        code = {name: environment[name] for name in ("commit", "python", "versions")}
        return to_json({"code": code, **run_identity(model, plan, start.seed), "start": start, **settings})

    processes.same(facts)


# --- Whether a plan can resume a run


def run_identity(model: ModelConfig, plan: Plan, seed: int) -> dict[str, Any]:
    """What makes two runs the same experiment."""
    return {
        "model": {name: getattr(model, name) for name in FUNCTION_FIELDS},
        "seed": seed,
        "vocabulary_hash": plan.corpus.vocabulary_hash,
        "corpora": {name: corpus.fingerprint for name, corpus in plan.corpora.items()},
        "references": plan.references(),
    }


def with_names_of(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The record `new` with the paths that `old` has for corpora of the same content: a corpus may have moved, or be
    named absolutely instead of relatively."""
    paths = {fingerprint: path for path, fingerprint in old["identity"]["corpora"].items()}
    names = {
        path: paths.get(fingerprint, path)
        for path, fingerprint in new["identity"]["corpora"].items()
        if path not in old["identity"]["corpora"]
    }
    identity, phases = dict(new["identity"]), []
    identity["corpora"] = {names.get(path, path): content for path, content in identity["corpora"].items()}
    identity["references"] = {
        next((names[path] + key[len(path) :] for path in names if key.startswith(path + "/")), key): content
        for key, content in identity["references"].items()
    }
    for phase in new["settings"]["phases"]:
        mixture = [part | {"corpus": names.get(part["corpus"], part["corpus"])} for part in phase["mixture"]]
        phases.append(phase | {"mixture": mixture})
    return new | {"identity": identity, "settings": new["settings"] | {"phases": phases}}


def check_same_identity(was: dict[str, Any], now: dict[str, Any], run: RunDirectory | str, remedy: str) -> None:
    """Compares the identity of an existing run with that of a run that would continue it.

    Raises:
      UserError: `resume-other-run` for another model, seed, vocabulary or start, `resume-input-changed` for another
        content of a corpus or reference; names the first difference.
    """
    model = to_json(ModelConfig.from_json(was["model"]))  # adds fields that an older version did not have
    for name, value in now["model"].items():
        if model[name] != value:
            raise UserError(
                "resume-other-run", f"{run} holds a run with model.{name} {model[name]}, this one has {value}: {remedy}"
            )
    for name in ("seed", "init_from", "init_step", "whole_state", "vocabulary_hash"):
        if name in now and was.get(name, now[name]) != now[name]:
            raise UserError(
                "resume-other-run", f"{run} holds a run with {name} {was[name]}, this one has {now[name]}: {remedy}"
            )
    for kind, what in (("corpora", "corpus"), ("references", "the reference of")):
        for name, fingerprint in now[kind].items():
            before = was[kind].get(name, fingerprint)
            if before != fingerprint:
                raise UserError(
                    "resume-input-changed",
                    f"{what} {name} changed since {run} was started ({str(before)[:12]} then, {str(fingerprint)[:12]} "
                    f"now): restore the old one, or {remedy}",
                )


def check_same_moments(was: dict[str, Any], now: dict[str, Any], run: RunDirectory | str, remedy: str) -> None:
    """Compares the settings of two optimizers, as JSON, that determine their moments.

    Raises:
      UserError: `resume-other-optimizer`: the moments are different.
    """
    for name in ("name", "moment_dtype"):
        if was[name] != now[name]:
            raise UserError(
                "resume-other-optimizer",
                f"{run} holds moments of OptimizerConfig.{name} = {was[name]!r}, this run would use {now[name]!r}: "
                f"{remedy}",
            )


def check_same_rows(
    was: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], done: int, run: RunDirectory | str, remedy: str
) -> None:
    """Compares phases, as JSON, over the first `done` steps; what follows may change.

    Raises:
      UserError: `resume-other-rows`: a phase with other corpora, batch size or length, so that rows would be repeated
        or skipped. `resume-other-weighting`: another weighting.
    """
    first = 0
    for number, before in enumerate(was):
        if first >= done:
            return
        if number >= len(now):
            raise UserError(
                "resume-other-rows", f"{run} has {number + 1} phases in its {done} steps, this run {number}: {remedy}"
            )
        after = now[number]
        for field in ("mixture", "batch_size", "steps"):
            # The current phase may change its length, unless scheduled weights are spread over it. If it would end
            # before `done`, the plan is refused later, because it is too short.
            under_way = first + before["steps"] >= done
            reaches = first + after["steps"] >= done or number + 1 == len(now)
            scheduled = any(isinstance(component["weight"], dict) for component in before["mixture"])
            if field == "steps" and under_way and reaches and not scheduled:
                continue
            if not _same(before[field], after[field]):
                raise UserError(
                    "resume-other-rows",
                    f"{run} was started with {field} {before[field]} in phase {number}, now {after[field]}: rows would "
                    f"be repeated or skipped after its {done} steps; change it in a new phase, or {remedy}",
                )
        for field in ("weighting", "normalise", "unselected_weight"):
            if before.get(field) != after.get(field):
                raise UserError(
                    "resume-other-weighting",
                    f"{run} was started with {field} {before.get(field)} in phase {number}, now {after.get(field)}: "
                    f"change it in a new phase, or {remedy}",
                )
        first += before["steps"]


def _same(before: Any, after: Any) -> bool:
    """Whether the values are equal; keys that only `after` has, from a later version, are ignored."""
    if isinstance(before, dict) and isinstance(after, dict):
        # MixtureComponent.epochs is a limit: it does not decide which rows are read.
        return all(_same(value, after.get(name)) for name, value in before.items() if name != "epochs")
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same, before, after))
    return before == after


def learning_rate_change(run: RunDirectory, step: int, plan: Plan) -> str:
    """How the plan's learning rate at a step differs from the run's, where later rates depend on it; else ''."""
    if not plan.depends_on_rate_at(step):
        return ""
    rates = [row["learning_rate"] for row in run.metrics() if row["step"] == step and "learning_rate" in row]
    now = float(np.asarray(plan.learning_rate(step)))
    was = rates[-1] if rates else now
    if abs(was - now) <= 1e-4 * max(was, now):
        return ""
    return f"the learning rate of {run} at step {step} was {was:.4g}, in this plan it is {now:.4g}"


def ways_to_extend(run: RunDirectory, step: int, plan: Plan) -> str:
    """Ways to extend a finished run whose learning rate has decayed, if the plan stays low or jumps; else ''."""
    rates = {row["step"]: row["learning_rate"] for row in run.metrics() if "learning_rate" in row}
    peak = max(rates.values(), default=0.0)
    begins = step in plan.first_steps and plan.phases[plan.phase_index(step)].schedule
    if begins or step not in rates or rates[step] > DECAYED * peak:
        return ""
    return (
        f"{run} ended at {rates[step] / peak:.0%} of its peak learning rate, {peak:.3g}. Three ways to extend it: "
        f"re-warm, with a new phase from step {step} and Phase.schedule = @cosine_schedule(); anneal further, with "
        "@anneal_schedule(); or start a new run with @infinite_schedule(), whose constant part can be extended any "
        "number of times and annealed at each end (docs/tutorials/continual.md)"
    )


# --- The state


def start_state(
    checkpoints: Checkpoints, start: Start, spec: StateSpec, plan: Plan, allow_equal_reference: bool
) -> tuple[TrainState, dict[str, float]]:
    """State and counters to start with: of the run's newest readable checkpoint, else of another run, else random.

    Raises:
      UserError: no checkpoint can be read; the initial model has another shape or vocabulary, or is itself the
        reference; the plan does not continue the run whose state it loads.
    """
    if restored := checkpoints.restore(spec.shapes().items()):
        return TrainState.of(restored[0]), restored[1]["counters"]
    if start.init_from and start.whole_state:
        return _branched_state(start.init_from, start, spec, plan)
    state = _state_at_0(start, spec, plan)
    if not allow_equal_reference:
        refuse_equal_reference(state.params, plan)
    return state, {}


def _state_at_0(start: Start, spec: StateSpec, plan: Plan) -> TrainState:
    params = None
    if run := start.init_from:
        loaded = load_model(run, spec.mesh, start.init_step)
        _check_initial(run, loaded.config, loaded.vocabulary_hash, spec.model, plan)
        params = loaded.params
    return init_state(spec.model, spec.optimizer, spec.mesh, start.seed, params, spec.ema, spec.lagged)


def _check_initial(run: str, theirs: ModelConfig, vocabulary_hash: str, ours: ModelConfig, plan: Plan) -> None:
    if vocabulary_hash != plan.corpus.vocabulary_hash:
        raise UserError(
            "init-other-vocabulary",
            f"initial model {run} and corpus {plan.corpus.path} have different vocabularies: prepare the corpus "
            "with the model's",
        )
    for name in FUNCTION_FIELDS:
        if getattr(theirs, name) != getattr(ours, name):
            raise UserError(
                "init-other-model",
                f"initial model {run} has {name} = {getattr(theirs, name)}, the run's model has {getattr(ours, name)}: "
                f"set model.{name} to the initial model's",
            )


def check_start(start: Start, model: ModelConfig, plan: Plan) -> None:
    """Compares a run without checkpoints of its own with the run that it starts from, without loading its parameters.

    Raises:
      UserError: the checkpoint is not there, or the model or vocabulary is another, or, of a branch, the plan does not
        begin with everything that the other run trained before the checkpoint.
    """
    if start.init_from and start.whole_state:
        _check_branch(start.init_from, start, model, plan)
    elif start.init_from:
        about = read_about(start.init_from, start.init_step)
        _check_initial(start.init_from, ModelConfig.from_json(about["model"]), about["vocabulary_hash"], model, plan)


def _check_branch(run_dir: str, start: Start, model: ModelConfig, plan: Plan) -> dict[str, Any]:
    """The description of the checkpoint that the branch starts from."""
    run, about = RunDirectory(run_dir), read_about(run_dir, start.init_step)
    step, record = int(about["step"]), run.record()
    remedy = "repeat its phases up to there, or set train.init_mode = 'params'"
    if step >= plan.total_steps:
        raise UserError(
            "branch-past-end",
            f"the run continues from step {step} of {run}, but its phases end at {plan.total_steps}: repeat "
            "that run's phases up to this step, and add more",
        )
    if "phases" not in record.get("settings", {}):
        raise UserError(
            "branch-not-trained",
            f"{run} is not a train run or has no run.json, so its training data is unknown: set train.init_mode = "
            "'params'",
        )
    new = {
        "identity": run_identity(model, plan, start.seed),
        "settings": {"phases": [phase.record() for phase in plan.phases]},
    }
    named = with_names_of(record, to_json(new))
    check_same_identity(record["identity"], named["identity"], run, remedy)
    check_same_rows(record["settings"]["phases"], named["settings"]["phases"], step, run, remedy)
    if difference := learning_rate_change(run, step, plan):
        raise UserError(
            "branch-other-learning-rate",
            f"{difference}, and the branch would continue from it: repeat train.schedule, with lengths in steps "
            "instead of shares, or give the branch a schedule with its own start",
        )
    return about


def _branched_state(run_dir: str, start: Start, spec: StateSpec, plan: Plan) -> tuple[TrainState, dict[str, float]]:
    """State and counters of another run."""
    run, about = RunDirectory(run_dir), _check_branch(run_dir, start, spec.model, plan)
    its_optimizer = OptimizerConfig(**run.settings()["optimizer"])
    check_same_moments(to_json(its_optimizer), to_json(spec.config), run, "set train.init_mode = 'params'")
    had_history = recorded_lag(run.settings()["phases"]) > 0
    shapes = dataclasses.replace(spec, config=its_optimizer, lagged=had_history).shapes()
    state = TrainState.of(restore_items(run, shapes.items(), int(about["step"])))
    if spec.lagged != had_history:
        copies = {name: jax.tree.map(jnp.copy, state.params) for name in ("older", "newer")}
        state = state._replace(history=copies if spec.lagged else None)
    if not spec.ema:
        state = state._replace(average=None)
    elif state.average is None:
        state = state._replace(average=jax.tree.map(jnp.copy, state.params))
    return state, about["counters"]


def phase_start_params(run: RunDirectory, start: Start, spec: StateSpec, plan: Plan, step: int) -> Params:
    """The parameters after `step` steps, with which the current phase began: from the run's checkpoint, or from that of
    the run that it is a branch of, or the initial ones."""
    for directory in (run, start.init_from if start.whole_state else None):
        if directory:
            try:
                return restore_params(directory, spec.shapes().params, step)
            except UserError:
                continue
    if step or start.whole_state:
        raise UserError(
            "resume-phase-start-lost",
            f"{run} has no checkpoint of step {step}, where the phase with Phase.l2_to_init began: restore it, or "
            "train the phase again from an earlier checkpoint",
        )
    return _state_at_0(start, spec, plan).params


def refuse_equal_reference(params: Params, plan: Plan) -> None:
    """Refuses a model as its own reference: every excess loss would be 0 and the selection arbitrary.

    Raises:
      UserError: `reference-is-initial-model`: all references of a selection by excess loss are the model with these
        parameters.
    """
    fingerprint = params_fingerprint(params)
    for phase in plan.phases:
        for part in phase.selection.parts if phase.selection else ():
            if part.score != "excess" or part.history:
                continue
            for component in phase.mixture:
                columns = [plan.corpora[component.corpus].score(name) for name in part.references]
                if all(column.reference.get("fingerprint") == fingerprint for column in columns):
                    raise UserError(
                        "reference-is-initial-model",
                        f"column {', '.join(part.references)} of {component.corpus} was scored by the very model that "
                        "this run starts from, so every excess loss is 0: train a reference, or set "
                        "train.allow_equal_reference = True",
                    )
