"""Runs the stages of a recipe as commands, several at a time, in the order their inputs allow."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from slm_jax.errors import UserError
from slm_jax.files import read_json
from slm_jax.metrics import progress
from slm_jax.run_directory import RunDirectory

COMMAND = (sys.executable, "-m", "slm_jax")

# On CPU each stage has a core of its own: one thread for XLA, and an allocator that keeps freed memory, without which
# XLA's temporaries cost tens of thousands of page faults a step.
ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Job:
    """One command. `after`: names of the jobs whose results it reads. `run_dir`: of a train job."""

    name: str
    command: tuple[str, ...]
    log: Path
    after: tuple[str, ...] = ()
    run_dir: Path | None = None


def lanes_here() -> tuple[int, dict[str, str]]:
    """How many stages run at a time, and their environment: one per core on CPU, one on an accelerator. XLA_FLAGS that
    are set stay.

    Asked in a process of its own: whoever initialises an accelerator keeps it.
    """
    code = "import jax; print(jax.default_backend())"
    backend = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    if backend != "cpu":
        return 1, {}
    # Ours end with one that is not XLA's but its thread pool's: what stands behind it is not read.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_CORE['XLA_FLAGS']}".strip()
    return min(2, os.cpu_count() or 1), ONE_CORE | {"XLA_FLAGS": flags}


def run_jobs(jobs: Sequence[Job], lanes: int, environment: dict[str, str]) -> None:
    """Runs all jobs, `lanes` at a time, each as soon as those it comes after are done; shows one bar over all steps.

    Raises:
      UserError: a job failed; names it, its last line and its log. The jobs under way are stopped.
    """
    # A terminated demo must not leave its stages behind: SIGTERM unwinds like an error.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    waiting = {job.name: job for job in jobs}
    running: dict[Future[None], Job] = {}
    processes: dict[str, subprocess.Popen] = {}
    done: set[str] = set()
    finished = threading.Event()
    watcher = threading.Thread(target=_show_progress, args=(jobs, finished), daemon=True)
    watcher.start()
    with ThreadPoolExecutor(lanes) as pool:
        try:
            while waiting or running:
                for job in [job for job in waiting.values() if set(job.after) <= done]:
                    if len(running) < lanes:
                        running[pool.submit(_run, job, environment, processes)] = waiting.pop(job.name)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    done.add(job.name)
        finally:  # inside the pool's block, whose end waits for the stages under way
            for process in processes.values():
                if process.poll() is None:
                    process.terminate()
            finished.set()
            watcher.join()
            signal.signal(signal.SIGTERM, before)


def _run(job: Job, environment: dict[str, str], processes: dict[str, subprocess.Popen]) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        process = subprocess.Popen(
            [*COMMAND, *job.command], stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        processes[job.name] = process
        code = process.wait()
    unfinished = job.run_dir and not (job.run_dir / "summary.json").exists()  # a train that was terminated exits 0
    if code or unfinished:
        last = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise UserError(
            "job-failed", f"the stage {job.name} failed: {(last or ['no output'])[0].strip()} (all of it: {job.log})"
        )


def _show_progress(jobs: Sequence[Job], finished: threading.Event) -> None:
    """One bar over the train steps of all jobs, as their run directories tell them; those that have not begun are
    taken to be as long as the mean of the others."""
    training = [job.run_dir for job in jobs if job.run_dir]
    with progress(0, 0, "demo") as bar:
        while True:
            last_look = finished.is_set()
            totals = {run: _total_steps(run) for run in training}
            known = [total for total in totals.values() if total]
            done = {run: max((row["step"] for row in RunDirectory(run).metrics()), default=0) for run in training}
            bar.total = round(sum(known) * len(training) / len(known)) if known else None
            bar.set_postfix_str(", ".join(run.name for run in training if 0 < done[run] < (totals[run] or 1)))
            bar.update(sum(done.values()) - bar.n)
            if last_look:
                return
            finished.wait(1.0)


def _total_steps(run_dir: Path) -> int | None:
    path = run_dir / "run.json"
    if not path.exists():
        return None
    return sum(phase["steps"] for phase in read_json(path)["settings"]["phases"])
