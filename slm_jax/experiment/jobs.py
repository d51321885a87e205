"""Runs stages as commands, several at a time, each as soon as its inputs are finished."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_jax.metrics import progress
from slm_jax.run_directory import RunDirectory
from slm_jax.startup import on_cpu

COMMAND = (sys.executable, "-m", "slm_jax")

# On CPU each stage has its own core: one thread for XLA, and an allocator that keeps freed memory, without which
# XLA's temporaries cost tens of thousands of page faults a step.
ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
OUT_OF_TIME = "out of time"
POLL_SECONDS, LOOK_SECONDS = 0.1, 2.0  # between checks of the processes, and of the metrics of runs


@dataclass(frozen=True)
class Job:
    """One command. after: names of the jobs whose results it reads. run_dir: of a train job, with its steps."""

    name: str
    command: tuple[str, ...]
    log: Path
    after: tuple[str, ...] = ()
    run_dir: Path | None = None
    steps: int = 0


@dataclass
class Running:
    job: Job
    process: subprocess.Popen
    begun: float


def lanes_here() -> tuple[int, dict[str, str]]:
    """How many stages run at a time, and their environment: one per core on CPU, one on an accelerator.

    Where there may be an accelerator, JAX is asked in a separate process, because one that initialises it keeps it.
    """
    if not on_cpu():
        code = "import jax; print(jax.default_backend())"
        backend = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        if backend != "cpu":
            return 1, {}
    # XLA_FLAGS that are set come first: ours end with a flag of XLA's thread pool, and XLA reads nothing after it.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_CORE['XLA_FLAGS']}".strip()
    return min(2, os.cpu_count() or 1), ONE_CORE | {"XLA_FLAGS": flags}


def run_jobs(
    jobs: Sequence[Job],
    lanes: int,
    environment: Mapping[str, str],
    finished: Callable[[Job, float], None] = lambda job, seconds: None,
    deadline: float | None = None,
) -> dict[str, str]:
    """Runs jobs in their order, `lanes` at a time; shows one bar over all train steps.

    A job that fails is reported at once; those that read its results are left out and the others go on.

    Args:
      jobs: jobs to run; names in `after` that are not among them count as done.
      lanes: commands at a time.
      environment: variables for them.
      finished: called with each job that succeeded and the seconds it took.
      deadline: `time.monotonic()` from which on nothing is started, and running commands are terminated (they save what
        they have).

    Returns:
      Name -> why it has no result: the last line of its output, what it needed, or 'out of time'.
    """
    waiting = {job.name: job for job in jobs}
    running: dict[str, Running] = {}
    failed: dict[str, str] = {}
    out_of_time = False
    steps = dict.fromkeys(waiting, 0)  # done, of train jobs
    looked = 0.0
    with _terminable(), progress(sum(job.steps for job in jobs), 0, "experiment") as bar:
        try:
            while waiting or running:
                if deadline is not None and time.monotonic() > deadline:
                    failed |= dict.fromkeys(waiting, OUT_OF_TIME)
                    waiting.clear()
                    for each in running.values():
                        each.process.terminate()
                    deadline, out_of_time = None, True
                # Start jobs that are ready; give up jobs whose inputs failed.
                for job in list(waiting.values()):
                    if broken := next((name for name in job.after if name in failed), None):
                        failed[waiting.pop(job.name).name] = f"it reads {broken}"
                    elif len(running) < lanes and not any(name in waiting or name in running for name in job.after):
                        running[job.name] = _start(waiting.pop(job.name), environment)
                # Collect finished jobs.
                for each in [each for each in running.values() if each.process.poll() is not None]:
                    job = running.pop(each.job.name).job
                    if (reason := _problem(each)) and out_of_time:
                        failed[job.name] = OUT_OF_TIME
                    elif reason:
                        failed[job.name] = reason
                        bar.write(f"experiment: {job.name} has no result: {reason} (all of it: {job.log})")
                    else:
                        finished(job, time.monotonic() - each.begun)
                        steps[job.name] = job.steps
                if time.monotonic() - looked > LOOK_SECONDS or not running:
                    looked = time.monotonic()
                    for each in running.values():
                        rows = RunDirectory(each.job.run_dir).metrics() if each.job.run_dir else []
                        steps[each.job.name] = max((row["step"] for row in rows), default=0)
                    bar.set_postfix_str(", ".join(running), refresh=False)
                    bar.update(sum(steps.values()) - bar.n)
                time.sleep(POLL_SECONDS)
        finally:
            for each in running.values():
                each.process.terminate()
            for each in running.values():
                each.process.wait()
    return failed


def _start(job: Job, environment: Mapping[str, str]) -> Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        command = [*COMMAND, *job.command]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(environment))
    return Running(job, process, time.monotonic())


def _problem(each: Running) -> str | None:
    """Why a command that ended has no result; None if it has. `train` exits with 0 when it was terminated."""
    job, code = each.job, each.process.returncode
    unfinished = job.run_dir is not None and not (job.run_dir / "summary.json").exists()
    if not code and not unfinished:
        return None
    lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}, no output"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A terminated experiment must not leave its stages running: SIGTERM unwinds like an error."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
