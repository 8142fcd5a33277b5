"""Device and compute dtype: chosen with a reason, refused where it cannot be."""

import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch
from root import PYTHONPATH, ROOT

from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.run import device
from strata.stages.errors import DeviceError

CPU = torch.device("cpu")


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(DeviceError, match="GPU only"):
        device.compute_dtype("float16", CPU)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recipe_has_its_way(precision: str) -> None:
    assert device.compute_dtype(precision, CPU)[0] == precision


def test_auto_on_a_cpu_is_bfloat16_only_where_the_kernel_lists_it() -> None:
    chosen, reason = device.compute_dtype("auto", CPU)
    assert chosen == ("bfloat16" if device.cpu_has_bfloat16() else "float32")
    assert "CPU" in reason


def test_cuda_without_a_gpu_says_what_to_use() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="--device cpu or auto"):
        device.pick("cuda")
    assert device.pick("auto") == CPU


FAULTS = """
import resource, sys, torch
import threading
from strata.pipeline.plan import hardware

def work():
    for _ in range(40):  # until small things have found their place between the large ones
        torch.ones(SIZE)
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(SIZE)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)

how, where = sys.argv[1:]
SIZE = (12 if where == "main" else 24) << 20  # 48 MiB; more than a heap of a thread's own holds
if how == "kept":
    hardware.keep_freed_memory()
if where == "main":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""


def faults(how: str, where: str, **more: str) -> int:
    """Page faults of four tensors: each is mapped anew, or none."""
    command = [sys.executable, "-c", FAULTS, how, where]
    # Starting workers leaves their environment in ours.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    root, env = ROOT, env | {"PYTHONPATH": PYTHONPATH} | more
    return int(subprocess.run(command, cwd=root, env=env, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    kept, pages = faults("kept", "main"), 4 * (48 << 20) // mmap.PAGESIZE
    assert kept < pages / 100
    assert faults("not kept", "main") > 10 * kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_kept_for_threads_where_they_compute() -> None:
    kept = faults("kept", "thread", **dict([cluster.ONE_HEAP]))
    assert kept < 4 * (96 << 20) // mmap.PAGESIZE / 100
    assert faults("kept", "thread") > 10 * kept, "a thread's own heap holds no such tensor"
