"""Keeps a command's standard error to its own lines; what libraries print goes to a log.

Orbax, tensorboardX, TensorFlow, gRPC and JAX's distributed service print at any time, from threads and from C++:
through Python's `sys.stderr`, through `logging`, or directly to file descriptor 2. Only redirecting the descriptor
catches all of it, so a command keeps a copy of the descriptor for its own lines and points descriptor 2 to a file.
Handlers of `logging`, `warnings` and `threading.excepthook` would miss C++, which reports lost processes.

The file starts in the temporary folder. A command that holds a lock moves it next to the lock, that is into the run
directory or the corpus, as `libraries.log`; the error line names it. Stages called from Python, in a notebook or a
test, redirect nothing. Imports no JAX.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes of commands
LOG = "libraries.log"
# A shell that reads lines until this process ends for any reason, and then prints the last of them.
_LAST_WORDS = 'while IFS= read -r line; do words=$line; done; [ -z "$words" ] || printf "%s\\n" "$words" >&2'

_own: Any = None  # the standard error of this command, while descriptor 2 is the log
_log: Path | None = None
_name = "slm-jax"
_beside: Path | None = None  # where the log goes if anything is in it
_shell: Any = None


def stderr() -> Any:
    """The stream for the command's own lines."""
    return _own or sys.stderr


def say(line: str) -> None:
    """Prints a line on standard error, unless that is closed. It may be the last line of this process."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=stderr(), flush=True)
    _last_words("")


def progress_bar(iterable: Iterable[Any] | None = None, desc: str | None = None, **settings: Any) -> tqdm:
    """A progress bar; if standard error is a file or a pipe, it prints at most once in 30 seconds."""
    pace = {"mininterval": 0.5, "delay": 0.5} if stderr().isatty() else {"mininterval": 30.0, "delay": 30.0}
    return tqdm(iterable, desc, file=stderr(), dynamic_ncols=True, **pace, **settings)


def name() -> str:
    """The prefix of this command's lines."""
    return _name


def command(run: Callable[[], int]) -> int:
    """Runs a command as a program. Any failure is one line on standard error; returns the exit code.

    Args:
      run: the command; returns its exit code.
    """
    global _own, _log, _shell
    handle, path = tempfile.mkstemp(prefix="slm-jax-", suffix=".log")
    _log, _own = Path(path), os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(handle, 2)
    os.close(handle)
    faulthandler.enable()  # after a crash in C++, the log has the Python traceback
    with contextlib.suppress(OSError):  # a machine without a shell
        _shell = subprocess.Popen(
            ["/bin/sh", "-c", _LAST_WORDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=_own,
            text=True,
            start_new_session=True,  # Ctrl-C at a terminal must not reach it
        )
    begin(_name)
    try:
        code = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
        say(f"{_name}: error: interrupted; the same command continues")
    except BrokenPipeError:
        code = FAILED
        say(f"{_name}: error: nothing reads its output any more: send it to a file; the same command continues")
    except Exception as error:
        code = FAILED
        traceback.print_exc()
        say(f"{_name}: error: unexpected: {in_one_line(error)}: please report it{log_named()} [unexpected]")
    try:
        sys.stdout.flush()
    except OSError:  # otherwise the interpreter would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    end(code)
    return code


def begin(name: str) -> None:
    """Sets the prefix of this command's lines, and the line to print if it is killed."""
    global _name
    _name = name
    _last_words(
        f"{name}: error: killed, out of memory, ended by a library, or another process of the job was lost; the same "
        f"command continues; libraries' messages are in {_log}"
    )


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def keep_log_beside(lock: Path, process: int = 0) -> None:
    """Sends libraries' messages to `libraries.log` in the folder of this lock, which the command holds."""
    global _beside
    ending = LOG if process == 0 else f"{process}.{LOG}"
    _beside = lock.with_name(lock.name.removesuffix("lock") + ending)


def log_named() -> str:
    """The end of an error line: where libraries' messages are, or nothing if there are none."""
    _move_log()
    return f"; libraries' messages are in {_log}" if _log and os.fstat(2).st_size else ""


def end(code: int) -> None:
    """Call after a command's last line: removes a log in the temporary folder, unless the command failed and the log
    is not empty."""
    _last_words("")
    moved = _move_log()
    if _log and not moved and (code == DONE or not os.fstat(2).st_size):
        _log.unlink(missing_ok=True)


def _move_log() -> bool:
    """Moves a log that is not empty next to the lock; returns whether it is there."""
    global _log
    sys.stderr.flush()
    if _log is None or _beside is None or not os.fstat(2).st_size:
        return False
    if _log != _beside:
        try:
            with _beside.open("ab") as kept:
                kept.write(_log.read_bytes())
                kept.flush()
                os.dup2(kept.fileno(), 2)
        except OSError:  # a full disk, or a folder that is gone: the log stays where it is
            return False
        _log.unlink()
        _log = _beside
    return True


def _last_words(line: str) -> None:
    if _shell is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line.replace("\n", " "), file=_shell.stdin, flush=True)
