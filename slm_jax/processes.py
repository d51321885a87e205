"""Several processes that run one stage together, one per host or per GPU: how they start, agree and end.

All of them compute. Only the first one prints, holds locks and writes files; checkpoints alone are written by all.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # jax.distributed has no public access to its key-value store
from jax.experimental import multihost_utils

from slm_jax import files, messages
from slm_jax.errors import UserError

HEARTBEAT_SECONDS = 60  # a process that is silent for this long counts as lost, and the others exit
PATIENCE_SECONDS = 15  # after this time a process prints that it is waiting for the others to start
FAREWELL_SECONDS = 3  # how long a failing process waits for the others to hear of it
FOREVER_MS = 10**10
FAILURE = "slm_jax/failure"

Json = TypeVar("Json")
_calls = itertools.count()
_watcher: threading.Thread | None = None


def start(preemptible: bool) -> None:
    """Joins the other processes of this job, if any; call it before JAX starts a device.

    On Cloud TPU (VMs and GKE), under Slurm and under Open MPI, JAX finds them by itself. Elsewhere three environment
    variables name them: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      preemptible: SIGTERM is a notice that `termination` passes on; otherwise it ends the process as usual.

    Raises:
      UserError: `processes-incomplete`: the variables are incomplete; `processes-no-start`: the port is taken. JAX
        itself ends a process if the others do not start within five minutes.
    """
    named = _named_processes()
    number = named["num_processes"] if named else _count_found()
    if named is None and number < 2:
        return
    jax.config.update("jax_enable_preemption_service", preemptible)
    waiting = f"waiting for all {number} processes of this job: start the same command in each of them"
    patience = threading.Timer(PATIENCE_SECONDS, print, [waiting], {"file": messages.stderr(), "flush": True})
    patience.start()
    try:
        jax.distributed.initialize(**(named or {}), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            "processes-no-start", f"the job cannot start ({reason}): stop what uses its port, or name another port"
        ) from error
    finally:
        patience.cancel()
    global _watcher
    _watcher = threading.Thread(target=_end_when_another_fails, name="failures", daemon=True)
    _watcher.start()
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends): it would print the same again


def _named_processes() -> dict[str, Any] | None:
    """The three variables as arguments of jax.distributed.initialize; None if none is set."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = values = [os.environ.get(name) for name in names]
    if not any(values):
        return None
    try:
        count, index = (int(number or "") for number in numbers)
    except ValueError:
        count, index = 0, 0
    if not address or ":" not in address or not 0 <= index < count:
        given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True) if value)
        raise UserError(
            "processes-incomplete",
            f"{given}: several processes need {', '.join(names)}, for example 10.0.0.2:8476, 4 and 0 to 3",
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _count_found() -> int:
    """Number of processes of the job according to its environment; JAX would also start a job of one."""
    for step, count in (("SLURM_STEP_NODELIST", "SLURM_NTASKS"), ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE")):
        if step in os.environ:
            return int(os.environ.get(count, 1))
    if importlib.util.find_spec("libtpu") is None:
        return 1
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ:  # set by JAX where it finds no TPU
        hosts = _tpu_metadata("worker-network-endpoints")
        described = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _tpu_metadata("tpu-env"))
        slices = slices or (described and described[1])
    return len((hosts or "").split(",")) * int(slices or 1)


def _tpu_metadata(name: str) -> str:
    """A value from the metadata server of a TPU VM; empty where there is no such server."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.read().decode()
    except OSError:
        return ""


def first() -> bool:
    """Whether this process is the one that prints and writes. Starts no device."""
    return distributed.global_state.process_id == 0


def count() -> int:
    """Number of processes that run this stage. Starts no device."""
    return distributed.global_state.num_processes


def on_first(do: Callable[[], Json]) -> Json:
    """Calls `do` in the first process and returns its result, a plain JSON value, in every process; the others wait.

    Raises:
      UserError: in every process, if `do` raises it.
    """
    if count() == 1:
        return do()
    key = f"slm_jax/on_first/{next(_calls)}"
    if not first():
        answer = json.loads(_client().blocking_key_value_get(key, FOREVER_MS))
        if "refused" in answer:
            raise UserError(*answer["refused"])
        return answer["value"]
    try:
        value = do()
    except UserError as error:
        _client().key_value_set(key, json.dumps({"refused": [error.code, str(error)]}))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def everywhere(fact: bool) -> bool:
    """Whether the fact holds in every process."""
    return fact if count() == 1 else bool(multihost_utils.process_allgather(np.array(fact)).all())


def same(find: Callable[[], dict[str, Any]]) -> None:
    """Compares plain JSON values by name, which `find` returns, with those of the first process.

    Raises:
      UserError: `processes-differ`: names the first that differs.
    """
    if count() == 1:
        return
    facts = json.loads(json.dumps(find()))
    firsts = on_first(lambda: facts)
    for name, value in facts.items():
        if value != firsts.get(name):
            shown = [text if len(text) < 200 else text[:200] + "..." for text in (repr(value), repr(firsts.get(name)))]
            raise UserError(
                "processes-differ",
                f"the processes of this job differ in {name}, here {shown[0]}, in process 0 {shown[1]}: start the same "
                "command and version in all, on the same corpora",
            )
    _client().wait_at_barrier(f"slm_jax/same/{next(_calls)}", FOREVER_MS)  # nobody goes on before all have compared


@contextlib.contextmanager
def lock(path: Path, busy: str) -> Iterator[None]:
    """Keeps other commands out while the block runs: `files.lock` in the first process, for all of them.

    Raises:
      UserError: `in-use`, with the text `busy`, in every process: another command holds the lock.
    """
    with contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(files.lock(path, busy)))
        messages.keep_log_beside(path, distributed.global_state.process_id)
        yield


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields a function to call after every step with the number of finished steps. It says whether to save and stop
    because of SIGTERM (a preemption).

    A SIGTERM to any one process is enough: all get the same answer after the same step, without waiting for each other.
    """
    if count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signalled.set())
    try:
        yield lambda step: signalled.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Wraps the work after `start`: either all processes finish, or an exception in one of them ends all."""
    try:
        yield
    except Exception as error:
        if _watcher:
            traceback.print_exc()  # into the log
            reason = f"{messages.in_one_line(error)}: the same command in all {count()} processes continues"
            fail(f"{messages.name()}: error: {reason}{messages.log_named()}", messages.FAILED)
        raise
    if _watcher:
        jax.distributed.shutdown()  # waits for the others


def fail(line: str, code: int) -> None:
    """Ends all processes with this exit code; the first process prints the line. Returns if there is only one process.

    The first failure is the one that is reported. Without this the others would wait in a collective until the
    heartbeat is missed.
    """
    if _watcher is None:
        return
    where = "" if first() else f" (process {distributed.global_state.process_id})"
    try:
        _client().key_value_set(FAILURE, json.dumps({"line": line + where, "code": code}))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):  # the process that would print it has ended
            messages.say(line)
    _watcher.join(2 * FAREWELL_SECONDS)
    _leave(code)


def _end_when_another_fails() -> None:
    client = _client()
    try:
        failure = json.loads(client.blocking_key_value_get(FAILURE, FOREVER_MS))
    except jax.errors.JaxRuntimeError:  # the job is over, whether it succeeded or not
        return
    if first():
        messages.say(failure["line"])
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(FAILURE, 1000 * FAREWELL_SECONDS)
    if first():
        time.sleep(0.5)  # this process hosts the coordination service; without it the others print pages of errors
    _leave(failure["code"])


def _leave(code: int) -> None:
    """Exits without waiting for the others, unlike the usual exit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    messages.end(code)
    os._exit(code)


def _client() -> Any:
    return distributed.global_state.client
