"""What this machine is, without torch."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

from pipeline.progress import size


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
