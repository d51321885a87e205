"""Runs the tasks of `prepare`: in this process, in worker processes on this machine, or on a Dask cluster.

A task is a function from files to files that may run anywhere, any number of times. Its last action is to rename a
marker into place, so a task that was killed is simply not done.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import pathlib
import queue
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from typing import Any, NamedTuple

from slm_jax.errors import UserError
from slm_jax.messages import progress_bar

DEATHS = 2  # workers that may die at one task before it is given up


class Task(NamedTuple):
    """One call of a task function, `function(work, key, *arguments)`.

    Attributes:
        key: name of its marker and its files; equal for equal work.
        what: what it reads or writes, for messages.
        arguments: arguments of the function.
        size: its length in the progress bar.
    """

    key: str
    what: str
    arguments: tuple[Any, ...]
    size: int = 1


Function = Callable[..., dict[str, Any]]


class Workers:
    """Runs tasks through an executor of `concurrent.futures`.

    Attributes:
        reused: function -> number of tasks that were already done.
    """

    def __init__(self, executor: Executor, slots: Callable[[], int], name: str = ""):
        """slots: how many tasks may be submitted at a time; name: address of the cluster, for messages."""
        self._executor, self._slots, self._name = executor, slots, name
        self.reused: Counter[str] = Counter()

    def run(
        self, work: pathlib.Path, function: Function, tasks: Iterable[Task], say: str, total: int, unit: str
    ) -> list[dict[str, Any]]:
        """Runs the tasks that are not done.

        Args:
            work: directory for markers and files, shared by all workers.
            function: see `Task`; returns a small JSON object.
            tasks: read one by one as workers become free, so that a generator may wait for results.
            say: description of the progress bar; `total` and `unit` are also for the bar.

        Returns:
            The result of each task, in order.

        Raises:
            UserError: from a task, or workers died repeatedly at a task, which is named. Other exceptions of a task are
                raised unchanged: retrying does not help against a bug.
        """
        results: list[dict[str, Any]] = []
        running: dict[Future, tuple[int, Task]] = {}
        deaths, waiting = Counter[str](), iter(tasks)

        def submit(number: int, task: Task) -> None:
            running[self._executor.submit(run_task, function, work, task.key, *task.arguments)] = number, task

        with progress_bar(desc=say, total=total, unit=unit, unit_scale=True) as bar:
            while True:
                while len(running) < self._slots() and (task := next(waiting, None)) is not None:
                    results.append(read_marker(work, task.key) or {})
                    if results[-1]:
                        self.reused[function.__name__] += 1
                        bar.update(task.size)
                    else:
                        submit(len(results) - 1, task)
                if not running:
                    return results
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, task = running.pop(future)
                    try:
                        results[number] = future.result()
                        bar.update(task.size)
                    except CancelledError as error:
                        raise UserError(
                            "prepare-cluster-lost",
                            f"the cluster at {self._name} no longer answers: start it again, then run the same command "
                            "again; finished tasks are kept",
                        ) from error
                    except Exception as error:
                        if not _worker_died(error):
                            raise
                        deaths[task.key] += (
                            1 if isinstance(error, BrokenExecutor) else DEATHS
                        )  # Dask has already retried it
                        if deaths[task.key] >= DEATHS:
                            raise UserError(
                                "prepare-worker-killed",
                                f"worker processes were killed each time they tried {task.what}, most likely for lack "
                                "of memory: look for a huge document there, or run the same command again with fewer "
                                "processes; finished tasks are kept",
                            ) from error
                        print(f"prepare: a worker process was killed at {task.what}; it is tried once more")
                        submit(number, task)


def _worker_died(error: Exception) -> bool:
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker"


def run_task(function: Function, work: pathlib.Path, key: str, *arguments: Any) -> dict[str, Any]:
    """Runs one task unless it is done, and publishes its marker, which holds the result, CPU time and peak memory."""
    if not (work / "lock").exists():
        raise UserError(
            "prepare-folder-not-shared",
            f"the worker on {socket.gethostname()} cannot see {work}: put the corpus into a folder that all workers "
            "share, or set prepare.work to one",
        )
    if (done := read_marker(work, key)) is not None:
        return done
    begin = time.process_time()
    result = function(work, key, *arguments)
    result |= {"cpu_seconds": round(time.process_time() - begin, 3), "memory_mb": peak_memory_mb()}
    publish(work / "done" / f"{key}.json", json.dumps(result).encode("utf-8"))
    return result


def peak_memory_mb() -> int:
    """Peak resident memory of this process."""
    # ru_maxrss includes the parent's peak if that was larger.
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        return int(found[1]) // 1024 if found else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def read_marker(work: pathlib.Path, key: str) -> dict[str, Any] | None:
    """The result of a task; None while it is not done."""
    try:
        return json.loads((work / "done" / f"{key}.json").read_bytes())
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def publishing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path private to this process, which is renamed to `path` if the block succeeds. Two workers may write
    the same file at once, since they write the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    yield own
    os.replace(own, path)


def publish(path: pathlib.Path, content: bytes | memoryview) -> None:
    with publishing(path) as own:
        own.write_bytes(content)


@contextlib.contextmanager
def start_workers(processes: int, cluster: str | None) -> Iterator[Workers]:
    """Starts processes, or connects to the Dask scheduler at the address `cluster`.

    Raises:
        UserError: Dask is not installed, or no scheduler answers.
    """
    if cluster is not None:
        with _dask(cluster) as workers:
            yield workers
    elif processes == 1:
        yield this_process()
    else:
        with _Processes(processes) as executor:
            yield Workers(executor, lambda: processes)


def this_process() -> Workers:
    """Runs tasks one after the other, here."""
    return Workers(_ThisProcess(), lambda: 1)


class _ThisProcess(Executor):
    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes(Executor):
    """Worker processes, each in a pool of its own: if one dies, only its task is lost, and it is known which."""

    def __init__(self, processes: int):
        # A fork would copy the threads of libraries in an undefined state.
        self._context = multiprocessing.get_context("spawn")
        # Workers exit when the other end of this pipe is closed: when the parent exits or is killed.
        self._end, self._alive = self._context.Pipe(duplex=False)
        self._idle: queue.SimpleQueue[ProcessPoolExecutor] = queue.SimpleQueue()
        for _ in range(processes):
            self._idle.put(self._pool())
        self._number = processes

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, initializer=_start_worker, initargs=(self._end,))

    def submit(self, fn, /, *args, **kwargs):
        pool = self._idle.get()
        with _workers_import_no_main():
            future = pool.submit(fn, *args, **kwargs)

        def free(future: Future) -> None:
            died = isinstance(future.exception(), BrokenExecutor)
            self._idle.put(self._pool() if died else pool)

        future.add_done_callback(free)
        return future

    def __exit__(self, kind, value, traceback):
        if kind is not None:
            self._alive.close()
        for _ in range(self._number):
            self._idle.get().shutdown()
        self._alive.close()
        self._end.close()


def _start_worker(end: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one worker process per core

    def end_with_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            end.recv_bytes()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def _workers_import_no_main() -> Iterator[None]:
    """Prevents spawned workers from importing the caller's main module, which they do not need: it would be slow (jax)
    and, in a script without a main guard, endless."""
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__[name] for name in ("__spec__", "__file__") if name in main.__dict__}
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        main.__dict__.update(hidden)


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Workers]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            "prepare-no-dask",
            "prepare.cluster needs Dask: install it with `pip install distributed`, on the workers too",
        ) from error
    for name in ("distributed.client", "distributed.core", "distributed.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a lost scheduler is reported in one line of ours
    try:
        client = Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(
            "prepare-no-cluster",
            f"no Dask scheduler answers at {address!r}: start one with `dask scheduler`, and pass its address",
        ) from error

    def threads() -> int:
        found: Any = client.nthreads()
        return sum(found.values())

    with client, client.get_executor(pure=False) as executor:
        print(f"prepare: Dask at {address}, {threads()} workers, watch {client.dashboard_link}")
        # More tasks than workers, so that none waits; workers may join at any time.
        yield Workers(executor, lambda: 2 + 2 * threads(), address)
