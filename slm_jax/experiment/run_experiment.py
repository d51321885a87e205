"""Stage `experiment`: plans a recipe, runs what is missing, and reports what was found."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from slm_jax import config as config_lib
from slm_jax.config import print_unused
from slm_jax.configurable import Natural, NotNegative, configurable
from slm_jax.errors import UserError
from slm_jax.evaluate.samples import ExactAnswers  # noqa: F401 (for gin, in the train runs of a recipe)
from slm_jax.experiment import results as results_lib
from slm_jax.experiment.experiment_report import write_report
from slm_jax.experiment.jobs import OUT_OF_TIME, Job, lanes_here, run_jobs
from slm_jax.experiment.planning import Cost, Task, expand, gin_file, needed, train_costs, write_gin_files
from slm_jax.experiment.recipe import Arm, Recipe
from slm_jax.files import lock, write_json

RECIPES = Path(__file__).parents[2] / "configs" / "experiments"
ASSUMED_FLOPS = 4e10  # a second, of a lane on CPU, until a result says how fast this machine is


@configurable
def experiment(
    recipe: str,
    data: str | None = None,
    results: str = "experiments/results",
    work: str = "runs/experiments",
    lanes: Natural = 0,
    budget_s: NotNegative | None = None,
    overrides: Sequence[str] = (),
    report: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs the arms of a recipe over its seeds and variants, and compares them.

    The same command continues, on this machine or on another one that has the results folder. Every job
    is a `slm-jax` command with its own gin file in <work>/<recipe>/gin/ and a log in <work>/<recipe>/logs/.

    Args:
      recipe: name of a file in configs/experiments/, or a gin file.
      data: folder with the recipe's files: Source.directory of every corpus that does not set its own.
      results: folder; <results>/<recipe>/ gets one small file for each arm and seed, report.html, results.md and
        summary.json.
      work: folder; <work>/<recipe>/ gets corpora and run directories, and may be deleted afterwards.
      lanes: jobs at a time; 0 uses one per core on CPU, one on an accelerator.
      budget_s: seconds after which running jobs are stopped and no more are started; the next call continues.
      overrides: gin bindings for every job, such as 'Phase.steps = 20'.
      report: run nothing, report on the results so far.
      dry_run: print the plan and stop.
    """
    begun = time.monotonic()
    wanted = load_recipe(recipe)
    print_unused()
    folder, here = Path(work) / wanted.name, Path(results) / wanted.name
    if data is not None and not Path(data).is_dir():
        raise UserError(
            "experiment-no-data", f"experiment.data {data} is not a folder: name the one that holds the data sets"
        )
    tasks = expand(wanted, folder, overrides, data)
    arms = {name: task for name, task in tasks.items() if isinstance(task.item, Arm)}
    found = {name: result for name, task in arms.items() if (result := results_lib.read_result(here, task))}
    missing = [name for name in arms if name not in found]
    if missing and not report:
        todo = [task for task in needed(tasks, missing) if not _is_done(folder, task)]
        write_gin_files(needed(tasks, missing), folder)
        costs = train_costs(needed(tasks, missing), folder)
        use = lanes_here() if not lanes else (lanes, lanes_here()[1])
        print(plan_text(wanted, arms, found, todo, costs, use[0]), flush=True)
        if dry_run:
            return
        with contextlib.ExitStack() as stack:
            busy = f"another experiment is running in {folder}: wait for it to finish, or stop it"
            stack.enter_context(lock(folder / "lock", busy))
            deadline = begun + budget_s if budget_s is not None else None
            failed = _run(wanted, tasks, todo, costs, folder, here, use, deadline)
        found = {name: result for name, task in arms.items() if (result := results_lib.read_result(here, task))}
    else:
        failed = {}
    if found:
        write_report(here, wanted, found, total=len(arms))
        print(f"experiment: {len(found)} of {len(arms)} runs; open {here}/report.html", flush=True)
    if broken := {name: reason for name, reason in failed.items() if reason != OUT_OF_TIME}:
        name = next(iter(broken))
        log = folder / "logs" / f"{name}.log"
        raise UserError(
            "experiment-job-failed",
            f"{len(broken)} jobs have no result; the first is {name}: {broken[name]} (all of it: {log})",
        )
    if failed:
        print("experiment: out of time; the same command continues", flush=True)


def load_recipe(recipe: str) -> Recipe:
    """The recipe of a name or a gin file; settings of the command line override the file's.

    Raises:
      UserError: no such recipe, or one that is not complete.
    """
    file = Path(recipe) if recipe.endswith(".gin") else RECIPES / f"{recipe}.gin"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.gin"))) or "none"
        raise UserError("experiment-unknown-recipe", f"no recipe {recipe!r}: known are {known}, and gin files")
    config_lib.load_more(file)
    return gin.get_configurable(Recipe)()


def _is_done(folder: Path, task: Task) -> bool:
    """Whether a shared stage ended with these settings. Arms are done when their result is written."""
    mark = folder / "done" / f"{task.name}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(mark.read_text())["text"] == task.text
    return False


def _run(
    recipe: Recipe,
    tasks: Mapping[str, Task],
    todo: Sequence[Task],
    costs: Mapping[str, Cost],
    folder: Path,
    results: Path,
    use: tuple[int, dict[str, str]],
    deadline: float | None,
) -> dict[str, str]:
    """Runs the tasks; a mark for each shared stage that ended, a result for each arm."""

    def finished(job: Job, seconds: float) -> None:
        task = tasks[job.name]
        if isinstance(task.item, Arm):
            results_lib.write_result(results, task, seconds)
            if not recipe.keep_runs:
                results_lib.remove_run(task)
        else:
            write_json(folder / "done" / f"{task.name}.json", {"text": task.text})

    jobs = [
        Job(
            name=task.name,
            command=(*task.stage.split(), f"--gin_file={gin_file(folder, task)}"),
            log=folder / "logs" / f"{task.name}.log",
            after=task.after,
            run_dir=Path(task.product) if task.stage == "train" else None,
            steps=costs[task.name].steps if task.stage == "train" else 0,
        )
        for task in todo
    ]
    lanes, environment = use
    # Compilation is most of a short run, and arms share the programs of their evaluators.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    cache = {name: value for name, value in cache.items() if name not in os.environ}
    return run_jobs(jobs, lanes, cache | environment, finished, deadline)


def plan_text(
    recipe: Recipe,
    arms: Mapping[str, Task],
    found: Mapping[str, dict[str, Any]],
    todo: Sequence[Task],
    costs: Mapping[str, Cost],
    lanes: int,
) -> str:
    """What is there, what will run and for how long."""
    flops = sum(costs[task.name].flops for task in todo if task.stage == "train")
    speeds = [r["flops"]["training"] / r["command_seconds"] for r in found.values() if r["command_seconds"]]
    speed = sorted(speeds)[len(speeds) // 2] if speeds else ASSUMED_FLOPS
    said = "as the results here were made" if speeds else "assumed until a result is there"
    lines = [
        f"experiment: {recipe.name}: {recipe.question}",
        f"  {len(arms)} runs of {len(recipe.arms)} arms in {len(recipe.variants)} variants; {len(found)} have a result",
    ]
    by_kind: dict[str, list[Task]] = {}
    for task in todo:
        by_kind.setdefault(f"{task.stage} {task.item.name}", []).append(task)
    for kind, tasks in by_kind.items():
        cost = [costs[task.name] for task in tasks if task.name in costs]
        steps, tokens = ({getattr(each, name) for each in cost} for name in ("steps", "tokens"))
        each = f", {_range(steps)} steps, {_range(tokens)} tokens each" if cost else ""
        lines.append(f"  {len(tasks):4} x {kind}{each}")
    hours = flops / speed / lanes / 3600
    lines.append(
        f"  {flops / 1e12:,.1f} TFLOP of training to do: about {hours:.2f} hours in {lanes} lane{'s' * (lanes > 1)} at "
        f"{speed / 1e9:.0f} GFLOP/s each ({said})"
    )
    return "\n".join(lines)


def _range(values: set[int]) -> str:
    return f"{min(values):,}" if len(values) == 1 else f"{min(values):,} to {max(values):,}"
