"""Limits on all processes of a sandboxed program together, which limits per process cannot enforce.

Control groups could enforce them, but creating one often needs privileges; nor can the number of files in bubblewrap's
tmpfs be limited without privileges. So usage is checked from outside, 20 times a second, and a program over a limit is
killed. What it can use between two checks is small: about 100 MB and 10,000 files.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

SECONDS = 0.05  # between two checks
MOST_FILES = 10_000  # in the scratch folder; each takes about a kilobyte of the kernel's memory


def exceeded(pid: int, memory_bytes: int, scratch: str, scratch_bytes: int) -> str | None:
    """The limit that the program exceeds, as an error message; None if it exceeds none.

    Args:
      pid: the first process, whose descendants are the program's.
      memory_bytes: limit for all processes together; shared pages count once.
      scratch: path of the scratch folder inside the sandbox.
      scratch_bytes: its size, which distinguishes it from a folder of the same name outside.
    """
    pids = list(_descendants(pid))
    # Resident sizes count shared pages once per process and are quick to read; proportional ones are exact and slow.
    if sum(map(_resident, pids)) > memory_bytes and sum(map(_proportional, pids)) > memory_bytes:
        return f"MemoryError: its processes use more than {memory_bytes >> 20} MB together"
    for inside in pids[::-1]:  # the last ones are surely in the sandbox
        with contextlib.suppress(OSError):
            space = os.statvfs(f"/proc/{inside}/root{scratch}")
            if space.f_blocks * space.f_frsize == scratch_bytes:
                if space.f_files - space.f_ffree > MOST_FILES:
                    return f"OSError: it has more than {MOST_FILES} files"
                break
    return None


def _descendants(pid: int) -> Iterator[int]:
    """The process and all its descendants, parents first."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from _descendants(int(child))


def _resident(pid: int) -> int:
    """Resident bytes of the process, without mapped files."""
    return _kilobytes(f"/proc/{pid}/status", r"Rss(?:Anon|Shmem):\s+(\d+)")


def _proportional(pid: int) -> int:
    """As `_resident`, but a page shared by n processes counts 1/n; `_resident` if the kernel does not report it."""
    return _kilobytes(f"/proc/{pid}/smaps_rollup", r"Pss_(?:Anon|Shmem):\s+(\d+)") or _resident(pid)


def _kilobytes(file: str, pattern: str) -> int:
    try:
        return 1024 * sum(map(int, re.findall(pattern, Path(file).read_text())))
    except OSError:  # the process has ended
        return 0
