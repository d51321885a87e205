"""Train runs as their directories tell of them, finished or not, and which of them differ only in their seed."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.checkpoint import read_about
from slm_jax.errors import UserError
from slm_jax.evaluate.flops import Flops, run_flops
from slm_jax.files import read_json
from slm_jax.run_directory import RunDirectory

LAST_SHARE = 10  # training losses are means over the last tenth of the logged steps


class Run(NamedTuple):
    """What run.json, metrics.jsonl, summary.json and evaluate/ of a run directory hold."""

    path: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    starts: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    planned: int  # steps
    done: int
    finished: bool
    counters: dict[str, float]  # tokens_seen, tokens_trained; seconds, for an unfinished run up to `seconds_to`
    seconds_to: int
    flops: Flops
    evaluated: dict[str, float]  # by the stage `evaluate`: name and step -> number

    @property
    def seed(self) -> int:
        return self.identity["seed"]

    def state(self) -> str:
        """Whether it came to its end, and in how many starts."""
        words = ["finished" if self.finished else f"unfinished: step {self.done:,} of {self.planned:,}"]
        if len(self.starts) > 1:
            words.append(f"resumed, {len(self.starts)} starts")
        return "; ".join(words)

    def curve(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of one number of metrics.jsonl."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def evaluations(self) -> dict[str, float]:
        """The last value of every number of the run's evaluators, and what the stage `evaluate` found."""
        found = {}
        for row in self.rows:
            if "loss" not in row:
                found |= {name: value for name, value in row.items() if "/" in name and value is not None}
        return found | self.evaluated

    def training_losses(self) -> dict[str, float]:
        """Name ('' for all tokens, then by source) -> mean training loss over the last tenth of the logged steps."""
        rows = [row for row in self.rows if "loss" in row]
        rows = rows[-max(1, len(rows) // LAST_SHARE) :]
        names = sorted({name for row in rows for name in row if name == "loss" or name.startswith("loss/")})
        values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
        return {name.removeprefix("loss").lstrip("/"): float(np.mean(mine)) for name, mine in values.items() if mine}


def read_run(path: str) -> Run:
    """Reads a run directory.

    Raises:
      UserError: it is no train run, or its run.json is damaged.
    """
    file = Path(path) / "run.json"
    if not file.is_file():
        raise UserError(f"{path} is no train run (no run.json): name directories that `train` has written")
    try:
        about = read_json(file)
        settings, identity, starts = about["settings"], about["identity"], about["starts"]
        if "imported" in about:
            raise UserError(f"{path} is an imported model, no train run: name directories that `train` has written")
        planned = sum(phase["steps"] for phase in settings["phases"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): leave this run out") from error
    rows = RunDirectory(path).metrics()
    summary = _json(Path(path) / "summary.json") or {}
    finished = summary.get("steps", -1) >= planned
    done = planned if finished else max((row["step"] for row in rows), default=0)
    counters, seconds_to = _counters(path, rows, summary if finished else None)
    evaluated = dict(_evaluated(path))
    flops = run_flops(settings, done)
    return Run(path, identity, settings, starts, rows, planned, done, finished, counters, seconds_to, flops, evaluated)


def _counters(path: str, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> tuple[dict, int]:
    """Tokens to the last logged step; seconds to the end, or to the last checkpoint of an unfinished run."""
    names = ("tokens_seen", "tokens_trained", "seconds")
    if summary:
        return {name: summary[name] for name in names}, int(summary["steps"])
    last = next((row for row in reversed(rows) if "tokens_seen" in row), {})
    counters = {name: last[name] for name in names if name in last}
    try:
        about = read_about(path)
    except UserError:  # no checkpoint yet
        return counters, 0
    return counters | {"seconds": about.get("counters", {}).get("seconds")}, int(about["step"])


def _evaluated(path: str) -> Iterator[tuple[str, float]]:
    """Name -> number of the last results that the stage `evaluate` wrote for this run."""
    found: dict[str, tuple[int, float]] = {}
    for file in sorted((Path(path) / "evaluate").glob("*.json")):
        record = _json(file) or {}
        for name, value in (record.get("results") or {}).items():
            if isinstance(value, int | float) and found.get(name, (-1, 0.0))[0] < record.get("step", 0):
                found[name] = (record.get("step", 0), value)
    for name, (step, value) in found.items():
        yield f"{name} (evaluate, step {step})", value


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or one that is damaged."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Group(NamedTuple):
    """Runs that differ only in their seed, at the same step."""

    name: str
    runs: list[Run]

    @property
    def label(self) -> str:
        """Its name, and what to know before its numbers are compared."""
        about = [f"{len(self.runs)} seeds"] if len(self.runs) > 1 else []
        about += [] if self.runs[0].finished else ["unfinished"]
        return f"{self.name} ({', '.join(about)})" if about else self.name

    def numbers(self, of: Any) -> list[float]:
        """What a function finds in each of the runs, where it finds something."""
        return [value for run in self.runs if (value := of(run)) is not None]


def group_seeds(runs: Sequence[Run]) -> list[Group]:
    """Runs in the order of their first ones: together where the settings differ only in the seed, or where the same
    name stands under seed folders (`a/x`, `a/seed1/x`, `a/seed2/x`) and the plan is the same."""
    groups: list[list[Run]] = []
    for run in runs:
        keys = _keys(run)
        group = next((g for g in groups if any(keys & _keys(other) for other in g) and _new_seed(run, g)), None)
        if group is None:
            groups.append(group := [])
        group.append(run)
    names = short_names([_place(group[0]) if len(group) > 1 else group[0].path for group in groups])
    return [Group(name, group) for name, group in zip(names, groups, strict=True)]


def _new_seed(run: Run, group: Sequence[Run]) -> bool:
    """The same seed twice is a copy, no second seed; and a mean of runs at different steps would be of nothing."""
    return run.done == group[0].done and run.seed not in {other.seed for other in group}


def _keys(run: Run) -> set[str]:
    settings = {name: value for name, value in run.settings.items() if name not in ("evaluators", "evaluate_every")}
    identity = {name: value for name, value in run.identity.items() if name != "seed"}
    alike = json.dumps([settings, identity], sort_keys=True)
    # Under seed folders references and starts are of their own seeds: the rest must be alike.
    phases = [phase | {"selection": _without_reference(phase["selection"])} for phase in settings["phases"]]
    plan = json.dumps([settings | {"phases": phases}, run.identity["corpora"]], sort_keys=True)
    return {alike, f"{_place(run)} {plan}"}


def _place(run: Run) -> str:
    """Its path without seed folders."""
    return re.sub(r"(?:^|(?<=/))seed\d+/", "", os.path.normpath(run.path))


def _without_reference(selection: Mapping[str, Any] | None) -> dict[str, Any]:
    parts = [_without_reference(part) for part in (selection or {}).get("parts", ())]
    return {name: value for name, value in (selection or {}).items() if name != "reference"} | {"parts": parts}


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them lie in."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [os.sep.join(part[shared:]) for part in parts]
