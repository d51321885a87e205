"""What all processes of a sandboxed program use together, which no limit of a single process bounds.

Control groups could bound it, but only where the user may make them; without privileges nothing limits the number of
files of a tmpfs made by bubblewrap either. So it is watched from outside, some times a second, and the program is
killed. What it can use in between is small: about 100 MB and 10,000 files.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

SECONDS = 0.05  # between two looks
MOST_FILES = 10_000  # in the scratch folder; each takes about a kilobyte of the kernel's memory


def exceeded(pid: int, memory_bytes: int, scratch: str, scratch_bytes: int) -> str | None:
    """Names the limit that the program passes; None if it keeps to all of them.

    Args:
      pid: the first process, whose descendants are the program's.
      memory_bytes: of all processes together; pages that they share count once.
      scratch: path of the scratch folder inside the sandbox.
      scratch_bytes: its size, by which it is told from a folder of the same name outside.
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
    """The process and all that it started, also indirectly; parents first."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from _descendants(int(child))


def _resident(pid: int) -> int:
    """Bytes of the process in memory, without files that it maps."""
    return _kilobytes(f"/proc/{pid}/status", r"Rss(?:Anon|Shmem):\s+(\d+)")


def _proportional(pid: int) -> int:
    """Likewise, of a page that n processes share one nth; as `_resident` where the kernel does not tell."""
    return _kilobytes(f"/proc/{pid}/smaps_rollup", r"Pss_(?:Anon|Shmem):\s+(\d+)") or _resident(pid)


def _kilobytes(file: str, pattern: str) -> int:
    try:
        return 1024 * sum(map(int, re.findall(pattern, Path(file).read_text())))
    except OSError:  # it has ended
        return 0
