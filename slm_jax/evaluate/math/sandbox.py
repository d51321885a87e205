"""Runs programs written by a model where they can do no harm.

Each runs in bubblewrap: in separate namespaces, without network and unable to see other processes; on a separate file
system, read-only except for a scratch folder in memory that vanishes with it; without environment and input; as nobody;
within limits of memory, processor time, processes and file size (`sandbox_child`). At the limit of time, of output, of
the memory of all its processes together or of the number of its files (`sandbox_watch`) the program is killed with all
its processes.

A probe program tests the isolation before the first program runs. Where it fails, no program runs.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

from slm_jax.configurable import Above, AtMost, Count, OneOf, configurable
from slm_jax.errors import UserError
from slm_jax.evaluate.math import sandbox_watch

TRUST = "I accept that programs written by a model run on this machine"
LONGEST_PROGRAM = 60_000  # bytes, less than a pipe holds
CHILD = Path(__file__).with_name("sandbox_child.py")
INSIDE, SCRATCH = "/sandbox_child.py", "/scratch"
INSTALL = "install bubblewrap 0.8 or newer (Debian, Ubuntu: apt-get install bubblewrap)"
FIRST_USER, USERS = 1_900_000_000, 200_000_000  # ids beyond those that systems and containers assign
_programs = itertools.count()
# Checks from inside what must not work, and what must: a program like those that will run.
PROBE = """
import os, sys, time
import sympy
held = []
def fails(name, attempt):
    try:
        attempt()
    except OSError:
        return
    held.append(name)
def fork_without_end():
    for _ in range(1000):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
def reach_out():
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)
def write_much():
    for number in range(1000):
        with open(f"much{number}", "wb") as file:
            file.write(bytes(1 << 20))
fails("write to /", lambda: open("/probe", "w"))
fails("write to its Python", lambda: open(os.path.join(sys.prefix, "probe"), "w"))
fails("write without end", write_much)
fails("open a socket", reach_out)
fails("fork without end", fork_without_end)
if os.getuid() == 0: held.append("be root")
if os.path.exists("/proc/1"): held.append("see processes")
if set(os.environ) - {"PWD", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}: held.append("read the environment")
print("can", "; ".join(held) or "do nothing")
sys.stdout.flush()
"""


class Ran(NamedTuple):
    """The result of a program. ended: 'done', 'error', 'time', or 'output' (too much output)."""

    output: str
    error: str
    ended: str

    def shown(self, characters: int) -> str:
        """What the model reads: the output, or the error in one line; of a long text the beginning and the end."""
        text = self.output.strip() if self.ended in ("done", "output") else self.error.strip()
        half = characters // 2
        return text if len(text) <= characters else f"{text[:half]}...{text[-half:]}"


@configurable
@dataclasses.dataclass(frozen=True)
class Sandbox:
    """Limits of one program written by a model.

    Attributes:
      seconds: run time, and processor time of each of its processes.
      memory_mb: memory of each process, and of all of them together.
      processes: number of processes and threads.
      scratch_mb: size of its folder, which holds at most 10,000 files; one file may fill half of it.
      output_characters: maximum length of its output.
      trust: where bubblewrap does not work, programs run with these limits but without a sandbox, as you, if this is
        'I accept that programs written by a model run on this machine'.
    """

    seconds: Annotated[float, Above(0), AtMost(3600)] = 10.0
    memory_mb: Count = 1024
    processes: Count = 8
    scratch_mb: Count = 16
    output_characters: Count = 20_000
    trust: Annotated[str, OneOf([TRUST])] | None = None

    def check(self) -> str:
        """How programs run here, in words.

        Raises:
            UserError: there is no working sandbox, and no trust.
        """
        problem = _problem()
        if problem is None:
            return "in bubblewrap"
        if self.trust == TRUST:
            return f"without a sandbox, only with limits, as Sandbox.trust accepts ({problem})"
        raise UserError(
            "sandbox-not-working",
            f"programs written by a model do not run here: {problem}; {INSTALL}, allow it user namespaces if you are "
            f"not root, or set Sandbox.trust = {TRUST!r}",
        )

    def run_all(self, programs: Sequence[str]) -> list[Ran]:
        """Runs programs, one per core at a time.

        Raises:
            UserError: as `check`.
        """
        self.check()
        with ThreadPoolExecutor(max(1, min(len(programs), os.cpu_count() or 1))) as pool:
            return list(pool.map(self._run, programs))

    def _run(self, program: str) -> Ran:
        content = program.encode("utf-8", "replace")
        if len(content) > LONGEST_PROGRAM:
            return Ran("", f"MemoryError: a program of {len(content)} bytes is too long", "error")
        if _problem() is None:
            return _supervise(_isolated(self._child(isolated=True), self.scratch_mb << 20), content, self, "/")
        with tempfile.TemporaryDirectory(prefix="slm_jax_") as scratch:
            return _supervise([sys.executable, *self._child(isolated=False)], content, self, scratch)

    def _child(self, isolated: bool) -> list[str]:
        """Arguments of Python: the child's file and its limits."""
        # A different user for each program where we are root: the kernel counts and limits processes by user.
        user = FIRST_USER + (os.getpid() * 1000 + next(_programs)) % USERS
        limits = {
            "memory": self.memory_mb << 20,
            "cpu_seconds": max(1, round(self.seconds)),
            "file_bytes": self.scratch_mb << 19,
            "processes": self.processes,
            "stay_in_group": not isolated,  # without a namespace of processes, the group is what can be killed
            "user": user if isolated and os.geteuid() == 0 else None,
        }
        return ["-I", "-B", INSIDE if isolated else str(CHILD), json.dumps(limits)]


@functools.cache
def _problem() -> str | None:
    """Why there is no working sandbox here; None where there is one. Tries what it should prevent."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no sandbox that this works with"
    if shutil.which("bwrap") is None:
        return "bubblewrap (bwrap) is not installed"
    sandbox = Sandbox(60.0, 1024, 8, 16, 20_000, None)  # whatever the settings are
    ran = _supervise(_isolated(sandbox._child(isolated=True), sandbox.scratch_mb << 20), PROBE.encode(), sandbox, "/")
    if ran.output.strip() == "can do nothing":
        return None
    found = (ran.output.strip().splitlines() or ran.error.strip().splitlines() or [f"it ended: {ran.ended}"])[-1]
    return f"bubblewrap does not work here (a program in it {found})" if ran.output else f"bubblewrap fails: {found}"


def _isolated(child: Sequence[str], scratch_bytes: int) -> list[str]:
    """The command that runs Python in bubblewrap."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # as root it needs no user namespace; the child makes itself nobody, then sets its limits
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    for folder in _folders():
        for parent in list(Path(folder).parents)[-2::-1]:
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", folder, folder]
    command += ["--perms", "0755", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += ["--perms", "0755", "--dir", "/dev"]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # they count as processes
        command += ["--setenv", threads, "1"]
    command += ["--ro-bind", str(CHILD), INSIDE]
    command += ["--perms", "0777", "--size", str(scratch_bytes), "--tmpfs", SCRATCH, "--chdir", SCRATCH]
    return [*command, "--remount-ro", "/", sys.executable, *child]


def _folders() -> list[str]:
    """What a program may read: the system's libraries, this Python, and sympy's folder."""
    folders = {"/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix}
    sympy = importlib.util.find_spec("sympy")
    if sympy is not None and sympy.origin is not None:
        folders.add(str(Path(sympy.origin).parents[1]))
    there = sorted(folder for folder in folders if folder != "/" and os.path.isdir(folder))
    return [one for one in there if not any(one.startswith(other + "/") for other in there)]


def _supervise(command: Sequence[str], program: bytes, sandbox: Sandbox, folder: str) -> Ran:
    """Runs the command with the program as its input; reads its output; kills its process group at the limits."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=folder,
        start_new_session=True,
    )
    assert process.stdin and process.stdout and process.stderr
    deadline, most = time.monotonic() + sandbox.seconds, 4 * sandbox.output_characters
    written = {process.stdout: bytearray(), process.stderr: bytearray()}
    limit_reached = passed = None
    watches = sys.platform.startswith("linux")
    look = time.monotonic() + sandbox_watch.SECONDS
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(program)
            process.stdin.close()
        with selectors.DefaultSelector() as selector:
            for pipe, text in written.items():
                selector.register(pipe, selectors.EVENT_READ, text)
            while selector.get_map() and limit_reached is None:
                left = deadline - time.monotonic()
                for key, _ in selector.select(max(0.0, min(left, sandbox_watch.SECONDS) if watches else left)):
                    if piece := os.read(key.fd, 65536):
                        key.data.extend(piece)
                    else:
                        selector.unregister(key.fileobj)
                if watches and time.monotonic() > look:  # also while it prints without end
                    limits = (sandbox.memory_mb << 20, SCRATCH, sandbox.scratch_mb << 20)
                    passed = sandbox_watch.exceeded(process.pid, *limits)
                    look = time.monotonic() + sandbox_watch.SECONDS
                if passed:
                    limit_reached = "use"
                elif left <= 0:
                    limit_reached = "time"
                elif any(len(text) > most for text in written.values()):
                    limit_reached = "output"
        if limit_reached is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            limit_reached = "time" if process.poll() is None else None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, *written):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    output, error = (text.decode("utf-8", "replace")[: sandbox.output_characters] for text in written.values())
    if passed:
        return Ran(output, passed, "error")
    return _result(output, error, process.returncode, limit_reached, sandbox.seconds)


def _result(output: str, error: str, code: int, limit_reached: str | None, seconds: float) -> Ran:
    if limit_reached == "time" or code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Ran(output, f"TimeoutError: no result after {seconds:g} seconds", "time")
    if limit_reached is not None:
        return Ran(output, error, limit_reached)
    if code == 0:
        return Ran(output, error, "done")
    return Ran(output, (error.strip().splitlines() or [f"the program ended with code {code}"])[-1], "error")
