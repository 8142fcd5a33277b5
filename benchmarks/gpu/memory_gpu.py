"""Memory on a GPU: layer by layer against end to end, as the allocator counts it.

Claim: as in benchmarks/memory.py: at most 1/5 of the peak bytes of backpropagation end to end, less
than with checkpointing in micro-batches of the same size, and under a cap of 2 GB a network of 4
times the parameters.

Method: the cases of benchmarks/memory.py on the device; the peak is
`torch.cuda.max_memory_allocated`, which starts anew for each. The largest networks are found by
training for two steps under `set_per_process_memory_fraction`: a size that runs out of memory does
not fit, and what the allocator cannot use counts against it. On a GPU all weights are updated in
one call, so weight decay takes as many bytes as there are gradients. `--device cpu --quick` runs
the same lines without a GPU, under a small cap and with counted tensors.

    python benchmarks/gpu/memory_gpu.py [--parts cases largest] [--device cuda] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import RESULTS, keep
from memory import (
    CAP,
    FAMILIES,
    RECIPE,
    all_cases,
    largest_of,
    measured,
    prepare,
    summary,
)
from memory_cases import Case, Net, peak

from strata.pipeline.recipe.builtin import load

PARTS = ("cases", "largest")
SMALL_CAP = 20_000_000


def cases(device: torch.device, *, quick: bool) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory(prefix="memory-", dir=Path.cwd()) as place:
        prepare(Path(place), device, 16 if quick else None)
        for case in all_cases(len(load(RECIPE)[1].layers)):
            found[case.name] = measured(Path(place), case, device)
            del found[case.name]["process_bytes"]  # of all cases so far, in one process
            forget(device)
    return {"cases": found, "greedy": summary(found)}


def largest_ones(device: torch.device, *, quick: bool) -> dict[str, Any]:
    cap = SMALL_CAP if quick else CAP
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap / whole, device)

    def measure(net: Net, case: Case) -> int:
        return tried(net, case, device)

    families = FAMILIES[: 1 if quick else None]
    found = {}
    for family in families:
        found[family.name] = largest_of(family, measure, cap)
        print(family.name, json.dumps(found[family.name]), file=sys.stderr, flush=True)
    return {"largest": found}


def tried(net: Net, case: Case, device: torch.device) -> int:
    """The peak of two steps; more than any cap if they run out of memory."""
    try:
        return peak(net, case, device=device, fake=False)
    except torch.OutOfMemoryError:
        return sys.maxsize
    finally:
        forget(device)


def forget(device: torch.device) -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small, little: does it run?")
    parser.add_argument("--out", type=Path, help="default: the committed result, if not --quick")
    options = parser.parse_args()
    device = torch.device(options.device)
    out = options.out or (None if options.quick else RESULTS / "memory-gpu.json")
    found = json.loads(out.read_text("utf-8")) if out and out.exists() else {}
    for part in options.parts:
        found |= {"cases": cases, "largest": largest_ones}[part](device, quick=options.quick)
        keep(found, out, show=out is None, on=device)


if __name__ == "__main__":
    main()
