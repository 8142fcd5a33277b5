"""Which device, and which dtype its convolutions run in; an automatic choice gives its reason."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from strata.pipeline.plan import hardware
from strata.stages.errors import DeviceError

GATHERERS = max(1, min(4, len(os.sched_getaffinity(0)) - 1))
"""Threads that gather from memory or decode, beside the one that waits for a batch and takes part
meanwhile: a few of them are as fast as memory is."""


@dataclass(frozen=True)
class ReadOptions:
    """How rows are to be read: the machine's side, which does not change what is read."""

    device: torch.device
    tier: str = "auto"
    loader: str = "native"
    threads: int = GATHERERS
    device_bytes: int | None = None
    """Of the GPU's memory, for rows; None: what is free."""
    memory_bytes: int | None = None
    """Of the host's."""

    def free(self) -> tuple[int, int]:
        """Bytes of the GPU's and of the host's memory that rows may take."""
        device = free_device_memory(self.device)
        there = (device, self.device_bytes), (available_memory(), self.memory_bytes)
        on_device, on_host = (free if cap is None else min(free, cap) for free, cap in there)
        return on_device, on_host


def pick(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to a device.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"torch {torch.__version__} sees no GPU"
        raise DeviceError(f"--device cuda was asked for, but {built}. Use --device cpu or auto")
    return torch.device(name)


def compute_dtype(precision: str, device: torch.device) -> tuple[str, str]:
    """Dtype of the convolutions and why.

    Raises:
        DeviceError: the device cannot run the precision asked for.
    """
    check(precision, device)
    if precision != "auto":
        return precision, "the recipe says so"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "the GPU has it in hardware"
        return "float16", "the GPU has no bfloat16 in hardware"
    if cpu_has_bfloat16():
        return "bfloat16", "this CPU has it in hardware: about twice the rate of float32"
    return "float32", "this CPU has no bfloat16 instructions, without which it is many times slower"


def check(precision: str, device: torch.device) -> None:
    """Refuse what cannot train: float16 on a CPU. Raises DeviceError."""
    if precision == "float16" and device.type == "cpu":
        raise DeviceError(
            "float16 convolutions train on a GPU only. Use --device cuda, or a recipe whose "
            "'schedule.precision' is auto"
        )


def cpu_has_bfloat16() -> bool:
    """AVX512-BF16 or AMX on x86, BF16 on Arm, as the kernel lists them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:  # noqa: PTH123
            words = set(cpuinfo.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def facts(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, for reports."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "machine": {
            "processor": hardware.processor(),
            "cores": hardware.cores(),
            "memory_bytes": hardware.memory_bytes(),
            "gpu": gpu,
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    named = {name: version(name) for name in ("torch", "torchvision", "zarr", "numpy")}
    return {"python": platform.python_version(), **named}


def available_memory() -> int:
    """Bytes of RAM that can be used without pushing anything out but page cache: of the machine, or
    of the control group that we are in, where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with suppress(OSError), open("/proc/meminfo", encoding="utf-8") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("MemAvailable:"):
                machine = int(line.split()[1]) * 1024
    return min(machine, _group_memory())


def _group_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Of a container (cgroup v2): its limit, less what is used and is not page cache."""
    with suppress(OSError, ValueError):
        limit = int((root / "memory.max").read_text("utf-8"))
        used = int((root / "memory.current").read_text("utf-8"))
        counts = dict(ln.split() for ln in (root / "memory.stat").read_text("utf-8").splitlines())
        return max(0, limit - used + int(counts["inactive_file"]) + int(counts["active_file"]))
    return sys.maxsize


def free_device_memory(device: torch.device) -> int:
    """Bytes free on a GPU; 0 for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
