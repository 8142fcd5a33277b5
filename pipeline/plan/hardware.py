"""What this machine is, without torch."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

from strata.pipeline.progress import size

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those that we may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def described() -> str:
    """``AMD EPYC, 2 cores, 25.3 GB``: whether rates that were measured are of this machine."""
    return f"{processor()}, {cores()} cores, {size(memory_bytes())}"


def peak_memory_bytes() -> int | None:
    """The most memory of this process so far, libraries included; None where /proc does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return None


# ---- memory that was freed ----------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, of any size.

    By default what is larger than 32 MiB goes back to the kernel, which gives it again page by
    page: touching a new tensor of 40 MB then takes 20 ms and not 2, and a forward pass of small
    layers half as long again. What it costs: memory once used stays with the process. It is for
    the thread that the process began with; the heaps of others hold no such tensor, unless there
    is one for all (``MALLOC_ARENA_MAX=1``). Elsewhere than on glibc this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
