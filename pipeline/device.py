"""Which device, and which dtype its convolutions run in; an automatic choice gives its reason."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch

from stages.errors import DeviceError


def pick(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to a device.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu": gpu,
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    named = {name: version(name) for name in ("torch", "torchvision", "zarr", "numpy")}
    return {"python": platform.python_version(), **named}


def available_memory() -> int:
    """Bytes of RAM that can be used without pushing anything out but page cache."""
    with suppress(OSError), open("/proc/meminfo", encoding="utf-8") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:  # noqa: PTH123
            names = [
                line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")
            ]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
