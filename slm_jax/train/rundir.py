"""The run directory: which run it holds, what is written beside the checkpoints."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
from jax.sharding import Mesh

from slm_jax import config as config_lib
from slm_jax import processes
from slm_jax.errors import UserError
from slm_jax.files import read_json, to_json, write_json, write_json_lines
from slm_jax.metrics import MetricsWriter
from slm_jax.models.model_config import ModelConfig
from slm_jax.run_directory import RunDirectory
from slm_jax.score.kept_losses import KeptLosses, write_kept_losses
from slm_jax.train import plan_summary, resume
from slm_jax.train.plan import Plan
from slm_jax.train.record import Record

RESULT_SETTINGS = ("phases", "schedule", "optimizer")  # a finished run cannot take another of these


def claim(
    run_dir: str, model: ModelConfig, plan: Plan, start: resume.Start, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Writes run.json, config.gin and vocabulary/, or compares with what the run of that directory is.

    The command line wins: a changed setting is printed and used. What would make it another run is refused. run.json
    keeps one entry per start.

    Returns:
      The summary of a run that has nothing left to do, else None.

    Raises:
      UserError: run_dir holds a run of another model, seed, corpus, reference, start or data order, or a finished one
        that was made with other settings.
    """
    return processes.on_first(lambda: _claim(run_dir, model, plan, start, settings))


def _claim(
    run_dir: str, model: ModelConfig, plan: Plan, start: resume.Start, settings: dict[str, Any]
) -> dict[str, Any] | None:
    path = Path(run_dir) / "run.json"
    identity = resume.identity(model, plan, start.seed)
    identity |= {"init_from": start.init_from, "init_step": start.step, "whole_state": start.whole_state}
    new = to_json({"identity": identity, "settings": settings | {"model": model}, "starts": []})
    # A start that was refused before its first checkpoint is no run yet.
    if path.exists() and (done := _last_checkpoint(path.parent)) is not None:
        old = read_json(path)
        remedy = "choose another train.run_dir"
        resume.refuse_another(old["identity"], new["identity"], run_dir, remedy)
        resume.refuse_other_rows(old["settings"]["phases"], new["settings"]["phases"], done, run_dir, remedy)
        _refuse_other_average(run_dir, old, new)
        changed = [name for name, value in new["settings"].items() if old["settings"].get(name) != value]
        result = [name for name in changed if name in RESULT_SETTINGS]
        if old["settings"]["model"].get("dropout", 0.0) != model.dropout:
            result.append("model.dropout")
        if summary := _finished(run_dir, plan, result):
            return summary
        if done > plan.total_steps:
            raise UserError(
                f"{run_dir} is at step {done}, the run now has {plan.total_steps}: ask for at least as many, or "
                "choose another train.run_dir"
            )
        if difference := resume.other_rate(run_dir, done, plan):
            print(f"train: {difference}")
        for name in changed:
            print(f"train: {name} was {old['settings'].get(name)}, is {new['settings'][name]} from here on")
        new["starts"] = old["starts"]
    device = jax.devices()[0]
    machine = {
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": processes.count(),
    }
    new["starts"].append(config_lib.environment() | machine)
    write_json(path, new)
    (path.parent / "config.gin").write_text(gin.operative_config_str())
    plan.corpus.vocabulary().save(path.parent / "vocabulary")
    return None


def _last_checkpoint(run_dir: Path) -> int | None:
    steps = [int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, default=None)


def _refuse_other_average(run_dir: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    was, now = (run["settings"]["optimizer"].get("ema", 0.0) for run in (old, new))
    if (was > 0) != (now > 0):
        raise UserError(
            f"{run_dir} holds a run with OptimizerConfig.ema = {was:g}, now {now:g}: an average is kept from the "
            "beginning or not at all; choose another train.run_dir"
        )


def _finished(run_dir: str, plan: Plan, changed: Sequence[str]) -> dict[str, Any] | None:
    path = Path(run_dir) / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else None
    if summary is None or summary["steps"] < plan.total_steps:
        return None
    if changed or summary["steps"] > plan.total_steps:
        raise UserError(
            f"{run_dir} holds a finished run of {summary['steps']} steps made with other settings "
            f"({', '.join(changed)}): choose another train.run_dir, or ask for more steps to extend it"
        )
    print(f"train: {run_dir} has its {plan.total_steps} steps already; see {path}")
    return summary


def describe(run_dir: str, model: ModelConfig, plan: Plan, devices: Mesh, step: int) -> str:
    """What the run will do."""
    return (
        f"train: {model.parameter_count():,} parameters, {plan.total_steps} steps from step {step}, on "
        + " x ".join(f"{name} {size}" for name, size in devices.shape.items())
        + f" {devices.devices.flat[0].device_kind}"
        + (f" of {processes.count()} processes" if processes.count() > 1 else "")
        + f" -> {run_dir}\n{plan_summary.table(plan)}"
    )


def write_evaluation(
    run_dir: str, writer: MetricsWriter, step: int, results: Iterable[Iterable[tuple[str, Any]]]
) -> None:
    """One metric row of all evaluators' numbers; their token losses as score columns, their lists as the lines of
    `samples/<name>/<step>.jsonl`.

    All processes evaluate, the first writes.
    """
    row = {}
    for result in results:
        for name, value in result:
            if not processes.first():
                continue
            if isinstance(value, KeptLosses):
                write_kept_losses(run_dir, name.split("/")[0], step, value)
            elif isinstance(value, list):
                write_json_lines(Path(run_dir) / "samples" / name.split("/")[0] / f"{step}.jsonl", value)
            else:
                row[name] = value
    if row:
        writer.write(step, row)


def finish(run_dir: str, model: ModelConfig, plan: Plan, record: Record) -> dict[str, Any]:
    """Writes and returns summary.json: what the run was and where it ended."""
    return processes.on_first(lambda: _finish(run_dir, model, plan, record))


def _finish(run_dir: str, model: ModelConfig, plan: Plan, record: Record) -> dict[str, Any]:
    last = {name: value for row in RunDirectory(run_dir).metrics() for name, value in row.items() if value is not None}
    summary = {
        "steps": plan.total_steps,
        "parameters": model.parameter_count(),
        **record.counters(),
        "last": last,
    }
    write_json(Path(run_dir) / "summary.json", summary)
    print(
        f"train: done, {plan.total_steps} steps, loss {last.get('loss', float('nan')):.4f}; see {run_dir}/summary.json"
    )
    return summary
