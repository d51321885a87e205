"""Settings that a command makes before it imports JAX: the compilation cache and, on CPU, the memory allocator."""

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

MAX_CACHE_BYTES = 4 << 30
# Device files of NVIDIA GPUs and TPUs.
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")
# Options of glibc's mallopt: keep freed memory, use one arena, and no mmap.
MALLOPT = {-1: (1 << 31) - 1, -2: 1 << 28, -4: 0, -8: 1}  # TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX


def before_jax(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the environment variables that JAX reads on import, except those that are already set.

    Compiled programs are kept in the user's cache folder, so that the next command with the same shapes starts in
    seconds. JAX_ENABLE_COMPILATION_CACHE=0 turns this off, JAX_COMPILATION_CACHE_DIR sets another folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        # JAX's key does not name the CPU, and a home may be shared by machines with other instructions.
        environment["JAX_COMPILATION_CACHE_DIR"] = os.path.join(home, "slm_jax", "programs", cpu())
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        if importlib.util.find_spec("filelock"):  # without it JAX cannot remove the oldest programs
            environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_CACHE_BYTES))
    if on_cpu(environment) and not any(name.startswith("MALLOC_") for name in environment):
        # XLA's temporaries would be returned to the system after each use, and fetched with a page fault per 4 KiB.
        with contextlib.suppress(AttributeError):  # another libc
            for option, value in MALLOPT.items():
                ctypes.CDLL(None).mallopt(option, value)


def on_cpu(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether JAX will compute on the CPU, because JAX_PLATFORMS says so or there is no accelerator."""
    platforms = environment.get("JAX_PLATFORMS")
    return platforms == "cpu" if platforms else not any(map(glob.glob, ACCELERATORS))


def cpu() -> str:
    """A short name for the type of CPU: its architecture and a hash of its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        features = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        features = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(''.join(features).encode()).hexdigest()[:8]}"
