"""Training runs as their directories describe them, finished or not, and which of them differ only in their seed."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.analyze.page import one_line
from slm_jax.checkpoint import read_about
from slm_jax.errors import UserError
from slm_jax.evaluate.flops import Flops, run_flops
from slm_jax.files import parse_json_lines
from slm_jax.run_directory import RunDirectory

Json = dict[str, Any]
LAST_SHARE = 10  # training losses are means over the last tenth of the logged steps


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory says. rows: of metrics.jsonl. damaged: its lines that could not be read. evaluated: what the
    stage `evaluate` wrote."""

    path: str
    identity: Json
    settings: Json
    starts: list[Json]
    rows: list[Json]
    damaged: int
    summary: Json
    evaluated: list[Json]

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def seed(self) -> int:
        return self.identity["seed"]

    @property
    def planned(self) -> int:
        return sum(phase["steps"] for phase in self.settings["phases"])

    @property
    def finished(self) -> bool:
        return self.summary.get("steps", -1) >= self.planned

    @property
    def done(self) -> int:
        return self.planned if self.finished else max((row["step"] for row in self.rows), default=0)

    def state(self) -> str:
        """Whether it came to its end, and in how many starts."""
        words = ["finished" if self.finished else f"unfinished: step {self.done:,} of {self.planned:,}"]
        if len(self.starts) > 1:
            words.append(f"resumed, {len(self.starts)} starts")
        return "; ".join(words)

    def curve(self, name: str, with_evaluated: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric as it was logged during training; with those of the stage `evaluate`, which
        replace what was logged at their steps."""
        found = {row["step"]: row[name] for row in self.rows if row.get(name) is not None}
        if with_evaluated:
            for record in self.evaluated:
                value = record.get("results", {}).get(name)
                if isinstance(value, int | float) and "step" in record:
                    found[record["step"]] = value
        steps = sorted(found)
        return np.array(steps, float), np.array([found[step] for step in steps], float)

    def evaluations(self) -> dict[str, float]:
        """The last value of each number of the run's evaluators, and of each result of the stage `evaluate`."""
        found = {}
        for row in self.rows:
            if "loss" not in row:
                found |= {name: value for name, value in row.items() if "/" in name and value is not None}
        latest: dict[str, tuple[int, float]] = {}
        for record in self.evaluated:
            for name, value in (record.get("results") or {}).items():
                if isinstance(value, int | float) and latest.get(name, (-1, 0.0))[0] < record.get("step", 0):
                    latest[name] = (record.get("step", 0), value)
        return found | {f"{name} (evaluate, step {step})": value for name, (step, value) in latest.items()}

    def training_losses(self) -> dict[str, float]:
        """Name ('' for all tokens, then by source) -> mean training loss over the last tenth of the logged steps."""
        rows = [row for row in self.rows if "loss" in row]
        rows = rows[-max(1, len(rows) // LAST_SHARE) :]
        names = sorted({name for row in rows for name in row if name == "loss" or name.startswith("loss/")})
        values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
        return {name.removeprefix("loss").lstrip("/"): float(np.mean(mine)) for name, mine in values.items() if mine}

    def counters(self) -> dict[str, float]:
        """tokens_seen and tokens_trained up to the last logged step; seconds to the end, or of an unfinished run to its
        last checkpoint."""
        names = ("tokens_seen", "tokens_trained", "seconds")
        if self.finished:
            return {name: self.summary[name] for name in names}
        last = next((row for row in reversed(self.rows) if "tokens_seen" in row), {})
        counters = {name: last[name] for name in names if name in last}
        try:
            return counters | {"seconds": read_about(self.path).get("counters", {}).get("seconds")}
        except UserError:  # no checkpoint yet
            return counters

    def flops(self) -> Flops:
        start = (self.identity.get("init_from"), self.identity.get("init_step"))
        return run_flops(self.settings, self.done, start)

    def selective_phase(self) -> Json | None:
        """The last phase that selects; None for a run that trained on every token."""
        return next((phase for phase in reversed(self.settings["phases"]) if phase.get("selection")), None)

    def unplanned_rise(self) -> tuple[int, float, float] | None:
        """(step, rate there, rate it rises to) where the learning rate rises again after it had fallen, although no new
        phase and no schedule asks for that: a finished run was extended, or its settings changed between starts."""
        phases = self.settings["phases"]
        for schedule in (self.settings.get("schedule"), *(phase.get("schedule") for phase in phases)):
            if schedule and valleys([part["to"] for part in schedule["parts"]]):
                return None
        steps, rates = self.curve("learning_rate")
        boundaries = np.cumsum([phase["steps"] for phase in phases])
        for low, high in valleys(rates):
            # A phase's own schedule may start below the rate before it, so that its first step is the lowest.
            if not ((steps[max(low - 1, 0)] <= boundaries) & (boundaries < steps[low + 1])).any():
                return int(steps[low]), float(rates[low]), float(rates[high])
        return None


def turns(values: Sequence[float] | np.ndarray) -> list[int]:
    """Indices of the first value, of those where a curve starts to rise, to fall or to stay, and of the last."""
    signs = np.sign(np.diff(np.asarray(values, float)))
    inner = (np.flatnonzero(signs[1:] != signs[:-1]) + 1).tolist()
    return sorted({0, *inner, len(values) - 1}) if len(values) else []


def valleys(values: Sequence[float] | np.ndarray) -> list[tuple[int, int]]:
    """(last index before a rise, index where the rise ends) of every rise that follows a fall."""
    at = turns(values)
    fallen, found = False, []
    for start, end in itertools.pairwise(at):
        if fallen and values[end] > values[start]:
            found.append((start, end))
        fallen = fallen or values[end] < values[start]
    return found


def read_run(path: str) -> Run:
    """Reads the directory of a training run.

    Raises:
      UserError: `run-not-trained`: it is no run of the stage `train`; `run-damaged`: run.json lacks something.
    """
    directory = RunDirectory(path)
    record = directory.record()
    if not record or "imported" in record:
        what = "holds an imported model" if record else "has no run.json"
        raise UserError("run-not-trained", f"{path} {what}: name run directories that `train` has written")
    content = directory.metrics_jsonl.read_bytes() if directory.metrics_jsonl.is_file() else b""
    try:
        run = Run(
            path=path,
            identity=record["identity"],
            settings=record["settings"],
            starts=record["starts"],
            rows=directory.metrics(),
            damaged=sum(row is None for _, row in parse_json_lines(content)),
            summary=directory.summary() or {},
            evaluated=directory.evaluations(),
        )
        run.planned  # noqa: B018 (settings must hold phases)
    except (KeyError, TypeError) as error:
        raise UserError("run-damaged", f"{directory.run_json} is damaged ({error!r}): leave this run out") from error
    return run


# ---- Seeds


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

    def numbers(self, of: Callable[[Run], float | None]) -> list[float]:
        """What a function finds in each of the runs, where it finds something."""
        return [value for run in self.runs if (value := of(run)) is not None]


def group_seeds(runs: Sequence[Run]) -> list[Group]:
    """Groups runs whose settings differ only in the seed, and runs of one name and plan under seed folders (`a/x`,
    `a/seed1/x`, `a/seed2/x`); in the order of their first ones."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            # The same seed twice is a copy; and the mean of runs at different steps would mean nothing.
            new_seed = run.done == group[0].done and run.seed not in {other.seed for other in group}
            if new_seed and any(_keys(run) & _keys(other) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    names = short_names([_without_seed(group[0].path) if len(group) > 1 else group[0].path for group in groups])
    return [Group(name, group) for name, group in zip(names, groups, strict=True)]


def _keys(run: Run) -> set[str]:
    """Two runs that share one of these are seeds of one experiment."""
    settings = {name: value for name, value in run.settings.items() if name not in ("evaluators", "evaluate_every")}
    identity = {name: value for name, value in run.identity.items() if name != "seed"}
    alike = json.dumps([settings, identity], sort_keys=True)
    # Under seed folders each seed has its own reference and start: only the rest must be equal.
    phases = [phase | {"selection": _without_reference(phase["selection"])} for phase in settings["phases"]]
    plan = json.dumps([settings | {"phases": phases}, run.identity["corpora"]], sort_keys=True)
    return {alike, f"{_without_seed(run.path)} {plan}"}


def _without_seed(path: str) -> str:
    return re.sub(r"(?:^|(?<=/))seed\d+/", "", os.path.normpath(path))


def _without_reference(selection: Mapping[str, Any] | None) -> Json:
    parts = [_without_reference(part) for part in (selection or {}).get("parts", ())]
    return {name: value for name, value in (selection or {}).items() if name != "reference"} | {"parts": parts}


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share, as names that may be shown."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [one_line(os.sep.join(part[shared:])) for part in parts]
