"""Whether a plan goes on with what a run has done: the same rows at every step already made."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax import processes
from slm_jax.checkpoint import read_about
from slm_jax.errors import UserError
from slm_jax.files import read_json, to_json
from slm_jax.models.model_config import FUNCTION_FIELDS, ModelConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.train.plan import Plan


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run without a checkpoint of its own begins.

    seed: of random parameters. init_from: another run, or None. step: which of its checkpoints.
    whole_state: inherit its moments, step and counters too, so that this run goes on with that one.
    """

    seed: int
    init_from: str | None = None
    step: int | None = None
    whole_state: bool = False


def first_choice(run_dir: str, init_from: str | None, step: int | None) -> int | None:
    """The checkpoint of `init_from` to start from: the one named, else the one that a first start in run_dir took, else
    the last. The first process looks: another may see one more."""

    def choose() -> int | None:
        if init_from is None or step is not None:
            return step
        path = Path(run_dir) / "run.json"
        known = read_json(path)["identity"] if path.exists() else {}
        if known.get("init_from") == init_from and known.get("init_step") is not None:
            return known["init_step"]
        return int(read_about(init_from)["step"])

    return processes.on_first(choose)


def identity(model: ModelConfig, plan: Plan, seed: int) -> dict[str, Any]:
    """What makes two runs the same experiment."""
    return {
        "model": {name: getattr(model, name) for name in FUNCTION_FIELDS},
        "seed": seed,
        "vocabulary_hash": plan.corpus.vocabulary_hash,
        "corpora": {name: corpus.fingerprint for name, corpus in plan.corpora.items()},
        "references": plan.references(),
    }


def refuse_another(was: dict[str, Any], now: dict[str, Any], run_dir: str, remedy: str) -> None:
    """Compares the identity of the run in `run_dir` with that of the one that is to go on with it.

    Raises:
      UserError: another model, seed, vocabulary, or a corpus or reference that changed; names the first difference.
    """
    model = to_json(ModelConfig.from_json(was["model"]))  # with today's fields, where it is an older run
    for name, value in now["model"].items():
        if model[name] != value:
            raise UserError(
                f"{run_dir} holds a run whose model has {name} = {model[name]}, this one has {value}: {remedy}"
            )
    for name in ("seed", "init_from", "init_step", "whole_state", "vocabulary_hash"):
        if name in now and was.get(name, now[name]) != now[name]:
            raise UserError(f"{run_dir} holds a run with {name} {was[name]}, this one has {now[name]}: {remedy}")
    for kind, of in (("corpora", "corpus"), ("references", "the reference behind")):
        for name, fingerprint in now[kind].items():
            before = was[kind].get(name, fingerprint)
            if before != fingerprint:
                raise UserError(
                    f"{of} {name} changed since {run_dir} was started ({str(before)[:12]} then, "
                    f"{str(fingerprint)[:12]} now): bring the old one back or {remedy}"
                )


def refuse_other_rows(
    was: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], done: int, run_dir: str, remedy: str
) -> None:
    """Compares phases, as JSON, up to `done` steps; whatever comes after them may change.

    Raises:
      UserError: a phase with other corpora, batch or length, so that rows would be repeated or skipped.
    """
    first = 0
    for number, before in enumerate(was):
        if first >= done:
            return
        after = now[number] if number < len(now) else None
        if after is None:
            raise UserError(f"{run_dir} has {number + 1} phases in its {done} steps, this one {number}: {remedy}")
        scheduled = any(isinstance(draw["weight"], dict) for draw in before["mixture"])
        for field in ("mixture", "batch_size", "steps"):
            last = first + before["steps"] >= done
            longer = first + after["steps"] >= done or number + 1 == len(now)  # a plan that ends early is told so later
            if field == "steps" and last and longer and not scheduled:
                continue
            if not _same(before[field], after[field]):
                raise UserError(
                    f"{run_dir} was started with {field} {before[field]} in phase {number}, now {after[field]}: rows "
                    f"would be repeated or skipped after its {done} steps; change it in a phase of its own, or {remedy}"
                )
        first += before["steps"]


def _same(before: Any, after: Any) -> bool:
    """Equal where `before`, maybe written by an earlier version, says something."""
    if isinstance(before, dict) and isinstance(after, dict):
        # MixtureComponent.epochs is a limit and decides no row.
        return all(_same(value, after.get(name)) for name, value in before.items() if name != "epochs")
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same, before, after))
    return before == after


def branched_from(run_dir: str, step: int, model: ModelConfig, plan: Plan, seed: int) -> dict[str, Any]:
    """The settings of another run that the plan goes on with from `step`: it must have all of that run up to there.

    Raises:
      UserError: as the functions above; or the directory has no run.json.
    """
    path = Path(run_dir) / "run.json"
    if not path.exists():
        raise UserError(f"{run_dir} has no run.json, so it is not known what it read: take train.init_mode = 'params'")
    old = read_json(path)
    if "phases" not in old["settings"]:
        raise UserError(f"{run_dir} was imported and has parameters only: take train.init_mode = 'params'")
    remedy = "give this one the same up to there, or take train.init_mode = 'params'"
    refuse_another(old["identity"], to_json(identity(model, plan, seed)), run_dir, remedy)
    refuse_other_rows(old["settings"]["phases"], to_json(plan.phases), step, run_dir, remedy)
    if difference := other_rate(run_dir, step, plan):
        raise UserError(
            f"{difference}, which the branch would go on from: repeat train.schedule, with lengths in steps where they "
            "are shares, or give the branch a schedule with a start of its own"
        )
    return old["settings"]


def other_rate(run_dir: str, step: int, plan: Plan) -> str:
    """How the learning rate that a run had at a step differs from the plan's there, where the plan goes on from it; ''
    if it does not."""
    if not plan.goes_on_from_rate(step):
        return ""
    rows = [row for row in RunDirectory(run_dir).metrics() if row["step"] == step]
    had = [row["learning_rate"] for row in rows if "learning_rate" in row]
    now = float(np.asarray(plan.learning_rate(step)))
    if not had or abs(had[-1] - now) <= 1e-4 * max(had[-1], now):
        return ""
    return f"the learning rate of {run_dir} at step {step} was {had[-1]:.4g}, this plan says {now:.4g}"
