"""Tasks for the tests of `slm_jax.data.workers`, in a module that worker processes import quickly."""

import os
import pathlib
import signal
import time
from typing import Any


def die_once(work: pathlib.Path, key: str, number: int) -> dict[str, Any]:
    """Kills its process at the first attempt if `number` is odd."""
    flag = work / f"{key}.tried"
    if number % 2 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": number, "pid": os.getpid()}


def die(work: pathlib.Path, key: str) -> dict[str, Any]:
    with (work / "attempts").open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def fail(work: pathlib.Path, key: str) -> dict[str, Any]:
    with (work / "attempts").open("a") as file:
        file.write("x")
    raise ZeroDivisionError("a mistake in the program")


def sleep(work: pathlib.Path, key: str) -> dict[str, Any]:
    (work / f"{key}.pid").write_text(str(os.getpid()))
    time.sleep(60)
    return {}
