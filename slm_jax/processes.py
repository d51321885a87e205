"""Several processes that run one stage together, one per host or per GPU: how they start, agree and end.

All of them compute. The first one alone speaks, holds locks and writes files; only checkpoints are written by all.
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
from jax._src import distributed  # the key-value store of jax.distributed has no public door
from jax.experimental import multihost_utils

from slm_jax import files
from slm_jax.errors import UserError

HEARTBEAT_SECONDS = 60  # a process that vanished for so long ends the others
PATIENCE_SECONDS = 15  # until a process that waits for the others to be started says so
FAREWELL_SECONDS = 3  # how long a process that fails waits for the others to hear of it
FOREVER_MS = 10**10
FAILURE = "slm_jax/failure"

Json = TypeVar("Json")
_calls = itertools.count()
_watcher: threading.Thread | None = None


def start(preemptible: bool) -> None:
    """Joins the other processes of this job, where there are any; call it before JAX starts a device.

    On Cloud TPU (VMs and GKE), under Slurm and under Open MPI, JAX finds them by itself. Anywhere else three variables
    name them: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    preemptible: SIGTERM is a notice that `termination` will pass on; otherwise it ends the process as ever.

    Raises:
      UserError: the variables are incomplete, or the port is taken. JAX itself ends a process whose others do not come
        within five minutes.
    """
    named = _named_processes()
    number = named["num_processes"] if named else _count_found()
    if named is None and number < 2:
        return
    jax.config.update("jax_enable_preemption_service", preemptible)
    waiting = f"waiting for all {number} processes of this job: start the same command in each of them"
    patience = threading.Timer(PATIENCE_SECONDS, print, [waiting], {"file": sys.stderr, "flush": True})
    patience.start()
    try:
        jax.distributed.initialize(**(named or {}), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the job cannot start ({reason}): end what holds its port, or name another one") from error
    finally:
        patience.cancel()
    global _watcher
    _watcher = threading.Thread(target=_end_when_another_fails, name="failures", daemon=True)
    _watcher.start()
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process): it would say the same once more


def _named_processes() -> dict[str, Any] | None:
    """What the three variables say, as arguments of jax.distributed.initialize."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = values = [os.environ.get(name) for name in names]
    if not any(values):
        return None
    try:
        count, index = (int(number or "") for number in numbers)
    except ValueError:
        count, index = 0, 0
    if not address or ":" not in address or not 0 <= index < count:
        said = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True) if value)
        raise UserError(f"{said}: several processes need {', '.join(names)}, like 10.0.0.2:8476, 4 and 0 to 3")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _count_found() -> int:
    """How many processes the job has by what its environment says; JAX would also start a job of one."""
    for step, count in (("SLURM_STEP_NODELIST", "SLURM_NTASKS"), ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE")):
        if step in os.environ:
            return int(os.environ.get(count, 1))
    if importlib.util.find_spec("libtpu") is None:
        return 1
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ:  # which JAX sets where it sees no TPU
        hosts = _tpu_metadata("worker-network-endpoints")
        described = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _tpu_metadata("tpu-env"))
        slices = slices or (described and described[1])
    return len((hosts or "").split(",")) * int(slices or 1)


def _tpu_metadata(name: str) -> str:
    """What the metadata server of a TPU VM says; empty where there is none."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.read().decode()
    except OSError:
        return ""


def first() -> bool:
    """Whether this process is the one that speaks and writes. Starts no device."""
    return distributed.global_state.process_id == 0


def count() -> int:
    """How many processes run this stage. Starts no device."""
    return distributed.global_state.num_processes


def on_first(do: Callable[[], Json]) -> Json:
    """What `do` returns in the first process, in every process; the others wait for it. Plain JSON values only.

    Raises:
      UserError: in every process, where `do` raises it.
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


@contextlib.contextmanager
def lock(path: Path, busy: str) -> Iterator[None]:
    """Keeps other commands out while the block runs: `files.lock` in the first process, for all of them.

    Raises:
      UserError: `in-use`, with the text `busy`, in every process: another command holds the lock.
    """
    with contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(files.lock(path, busy)))
        yield


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields what tells, asked after every step, whether to save and leave because of SIGTERM (a preemption).

    A SIGTERM to any one process is enough: all get the same answer after the same step, which costs them no waiting.
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
    """Around what `start` begins: all processes end well, or an exception in one of them ends all."""
    try:
        yield
    except Exception as error:
        if _watcher:
            traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"{reason}; the same command in all {count()} processes continues", 1)
        raise
    if _watcher:
        jax.distributed.shutdown()  # waits for the others


def fail(line: str, code: int) -> None:
    """Ends all processes with this exit code; the first says why, in this line. Returns where there is but one.

    The first to fail is heard. Without this the others would wait in a collective until the heartbeat is missed.
    """
    if _watcher is None:
        return
    where = "" if first() else f" (process {distributed.global_state.process_id})"
    try:
        _client().key_value_set(FAILURE, json.dumps({"line": line + where, "code": code}))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):  # the process that would have said it has ended
            print(line, file=sys.stderr)
    _watcher.join(2 * FAREWELL_SECONDS)
    _leave(code)


def _end_when_another_fails() -> None:
    client = _client()
    try:
        failure = json.loads(client.blocking_key_value_get(FAILURE, FOREVER_MS))
    except jax.errors.JaxRuntimeError:  # the end of the job, good or bad
        return
    if first():
        print(failure["line"], file=sys.stderr)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(FAILURE, 1000 * FAREWELL_SECONDS)
    if first():
        time.sleep(0.5)  # its end is the end of the service, of which the others would complain at length
    _leave(failure["code"])


def _leave(code: int) -> None:
    """Without waiting for the others, as the usual exit does."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _client() -> Any:
    return distributed.global_state.client
