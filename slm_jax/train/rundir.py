"""The run directory: who owns it, what is written beside the checkpoints."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax import config as config_lib
from slm_jax.errors import UserError
from slm_jax.metrics import MetricsWriter, read_metrics
from slm_jax.models.config import ModelConfig
from slm_jax.train.phases import Plan
from slm_jax.train.record import Record


def claim(run_dir: str, model: ModelConfig, plan: Plan, seed: int, settings: dict[str, Any]) -> None:
    """Writes run.json and config.gin, or compares with what a run of that name was.

    The command line wins: a changed setting is printed and used. What would make it another run is refused.

    Raises:
      UserError: run_dir holds a run of another model, seed or corpus.
    """
    path = Path(run_dir) / "run.json"
    identity = {
        "model": model,
        "seed": seed,
        "vocabulary_hash": plan.corpus.vocabulary_hash,
        "corpora": {name: corpus.fingerprint for name, corpus in plan.corpora.items()},
    }
    new = config_lib.to_json({"identity": identity, "settings": settings})
    # A start that was refused before its first checkpoint is no run yet.
    if path.exists() and any((path.parent / "checkpoints").glob("[0-9]*")):
        _compare(run_dir, json.loads(path.read_text()), new)
    if jax.process_index() == 0:
        device = jax.devices()[0]
        machine = {"device_kind": device.device_kind, "num_devices": jax.device_count()}
        config_lib.write_json(path, new | config_lib.environment() | machine)
        (Path(run_dir) / "config.gin").write_text(gin.operative_config_str())


def _compare(run_dir: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    was, now = old["identity"], new["identity"]
    for name in now["model"]:
        if name not in ("remat", "compute_dtype") and was["model"].get(name) != now["model"][name]:
            raise UserError(
                f"{run_dir} holds a run whose model has {name} = {was['model'].get(name)}, this one has "
                f"{now['model'][name]}: choose another train.run_dir"
            )
    if was["seed"] != now["seed"]:
        raise UserError(
            f"{run_dir} holds a run of seed {was['seed']}, this one has {now['seed']}: choose another run_dir"
        )
    if was["vocabulary_hash"] != now["vocabulary_hash"]:
        raise UserError(
            f"{run_dir} holds a run with vocabulary {was['vocabulary_hash'][:12]}, this one's corpora have "
            f"{now['vocabulary_hash'][:12]}: choose another train.run_dir"
        )
    for name, fingerprint in now["corpora"].items():
        if was["corpora"].get(name, fingerprint) != fingerprint:
            raise UserError(
                f"corpus {name} changed since {run_dir} was started ({was['corpora'][name][:12]} then, "
                f"{fingerprint[:12]} now): bring the old corpus back or choose another train.run_dir"
            )
    for name, value in new["settings"].items():
        if old["settings"].get(name) != value:
            print(f"train: {name} differs from that of the earlier start of {run_dir}; the new setting is used")


def describe(run_dir: str, model: ModelConfig, plan: Plan, devices: Mesh, step: int) -> str:
    """What the run will do, as a table of its phases."""
    lines = [
        f"train: {model.parameter_count():,} parameters, {plan.total_steps} steps from step {step}, on "
        + " x ".join(f"{name} {size}" for name, size in devices.shape.items())
        + f" {devices.devices.flat[0].device_kind} -> {run_dir}"
    ]
    for number, phase in enumerate(plan.phases):
        mixture = " + ".join(f"{draw.share:g} {draw.corpus}" for draw in phase.mixture)
        what = "causal"
        if phase.selection:
            chosen = phase.selection
            amount = f"{chosen.ratio:.0%}" if chosen.threshold is None else f"above {chosen.threshold}"
            what = f"selective: {amount} by {chosen.score}, per {chosen.scope}"
        tokens = phase.steps * phase.batch_rows * plan.corpus.row_length
        lines.append(
            f"  phase {number}: {phase.steps} steps of {phase.batch_rows} x {plan.corpus.row_length} tokens "
            f"({tokens:,}), {what}, from {mixture}"
        )
    return "\n".join(lines)


def write_evaluation(
    run_dir: str, writer: MetricsWriter, step: int, results: Iterable[Iterable[tuple[str, Any]]]
) -> None:
    """One metric row of all evaluators' numbers; their arrays as `token_losses/<name>/<step>.npy`."""
    row = {}
    for result in results:
        for name, value in result:
            if isinstance(value, np.ndarray):
                path = Path(run_dir) / "token_losses" / name.split("/")[0] / f"{step}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, value)
            else:
                row[name] = value
    if row:
        writer.write(step, row)


def finished(run_dir: str, plan: Plan) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    path = Path(run_dir) / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else None
    if summary is None or summary["steps"] != plan.total_steps:
        return None
    print(f"train: {run_dir} has its {plan.total_steps} steps already; see {path}")
    return summary


def finish(run_dir: str, model: ModelConfig, plan: Plan, record: Record) -> dict[str, Any]:
    """Writes and returns summary.json: what the run was and where it ended."""
    last = {name: value for row in read_metrics(run_dir) for name, value in row.items() if value is not None}
    summary = {
        "steps": plan.total_steps,
        "parameters": model.parameter_count(),
        **record.counters(),
        "last": last,
    }
    if jax.process_index() == 0:
        config_lib.write_json(Path(run_dir) / "summary.json", summary)
    print(
        f"train: done, {plan.total_steps} steps, loss {last.get('loss', float('nan')):.4f}; see {run_dir}/summary.json"
    )
    return summary
