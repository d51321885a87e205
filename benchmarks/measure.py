"""What the benchmarks share: interleaved repeats, medians, ratios, rows.

A machine's speed drifts, so a claim is a ratio within one run: all cases run once in each round, every second round
backwards, and the ratio is the median over the rounds of a case's value to its baseline's in the same round.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from slm_jax.experiment.jobs import ONE_CORE

# Part of what experiments set: an allocator that keeps freed memory. Without it XLA's temporaries cost tens of
# thousands of page faults a step, and what is measured is the kernel.
KEEP_MEMORY = {name: value for name, value in ONE_CORE.items() if name.startswith("MALLOC_")}
PACKAGES = ("jax", "numpy", "torch", "transformers", "sentencepiece")

Values = dict[str, list[float]]
Row = dict[str, Any]


def _processor_seconds() -> float:
    """Seconds that cores worked for this process and for those it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": _processor_seconds}


class Rounds(NamedTuple):
    """How often every case counts, and by which of CLOCKS."""

    repeats: int
    clock: str = "wall"


@dataclass(frozen=True)
class Case:
    """One thing to time. `run` does it once, and returns when it is done or returns arrays to wait for.

    amount: of what one call gets done, such as tokens; where given, the case is measured in it per second, else in
      seconds.
    """

    name: str
    run: Callable[[], Any]
    amount: float | None = None


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The arguments of every benchmark: --output, --repeats, --quick. `description` opens with the claim."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output", type=Path, help="write the rows here, as a JSON list")
    result.add_argument("--repeats", type=int, default=repeats, help="rounds that count (default: %(default)s)")
    result.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of all cores' work, where others share the machine",
    )
    result.add_argument("--quick", action="store_true", help="small shapes, to see that it works: proves no claim")
    return result


def restarted_with(environment: Mapping[str, str]) -> None:
    """Starts this script anew in an environment that holds these variables; what reads them does so at its start."""
    if dict(environment).items() <= dict(os.environ).items():
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})


def interleaved(cases: Sequence[Case], rounds: Rounds, warmups: int = 1) -> Values:
    """A value of each case per round, seconds or amount per second, after `warmups` rounds that do not count."""
    clock = CLOCKS[rounds.clock]
    values: Values = {case.name: [] for case in cases}
    assert len(values) == len(cases), "two cases have one name"
    for number in range(-warmups, rounds.repeats):
        for case in cases if number % 2 == 0 else reversed(cases):
            start = clock()
            jax.block_until_ready(case.run())
            seconds = clock() - start
            if number >= 0:
                values[case.name].append(case.amount / seconds if case.amount else seconds)
    return values


def fastest(values: Values) -> str:
    """The case with the smallest median of seconds."""
    return min(values, key=lambda name: statistics.median(values[name]))


def row(name: str, values: Sequence[float], baseline: str, base: Sequence[float], unit: str, **settings: Any) -> Row:
    """One result: the median value, and the median of the ratios to the baseline's values of the same rounds."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    return {
        "name": name,
        "baseline": baseline,
        "ratio": statistics.median(ratios),
        "median": statistics.median(values),
        "repeats": len(ratios),
        "settings": {"unit": unit, "ratio_range": [min(ratios), max(ratios)], **settings},
    }


def compared(values: Values, baseline: str, unit: str, **settings: Any) -> list[Row]:
    """A row for each case, the baseline's own first."""
    names = [baseline, *(name for name in values if name != baseline)]
    return [row(name, values[name], baseline, values[baseline], unit, **settings) for name in names]


def report(rows: Sequence[Row], output: Path | None, load: float, clock: str = "wall") -> None:
    """Prints the rows as a Markdown table and writes them. `load` is that of `load_average` before the first case."""
    about = machine() | {"clock": clock, "load_before": load, "load_after": load_average()}
    print(_listed(about), table(rows), sep="\n\n")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        complete = [{**row, "settings": {**row["settings"], "machine": about}} for row in rows]
        output.write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with one line per row. Settings that all rows share are above it."""
    first = rows[0]["settings"]
    shared = {name for name in first if all(row["settings"].get(name) == first[name] for row in rows)}
    shared -= {"unit", "ratio_range"}
    lines = [
        _listed({name: first[name] for name in first if name in shared}) + "\n",
        "| name | baseline | ratio | lowest to highest | median | repeats | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = {name: value for name, value in row["settings"].items() if name not in shared}
        unit, (low, high) = own.pop("unit"), own.pop("ratio_range")
        lines.append(
            f"| {row['name']} | {row['baseline']} | **{row['ratio']:.3f}** | {low:.3f} to {high:.3f} "
            f"| {row['median']:,.4g} {unit} | {row['repeats']} | {_listed(own)} |"
        )
    return "\n".join(lines)


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def load_average() -> float:
    """Threads that wanted to run over the last minute: more than there are cores, and the machine was shared."""
    return round(os.getloadavg()[0], 2)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code. Starts the device: call it after processes that need it."""
    facts = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": cores(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
