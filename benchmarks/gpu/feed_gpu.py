"""Feeding a GPU: how near to the rate of a pinned copy, and does a training step wait?

Claim: raw levels in host memory reach the device at 0.8 or more of the rate of one pinned copy
after another, or of gathering by the host's threads if that is slower; from the device tier a step
of layer 2 of `cifar10-small` runs at 0.95 or more of the rate that a tensor on the device allows,
from memory at 0.9.

Method: one process, rounds interleaved, medians; the device is waited for before the clock stops.
`--device cpu --quick` runs the same lines without a GPU.

    python benchmarks/gpu/feed_gpu.py [--device cuda] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from feed_levels import features, load_images, make_level
from feed_training import fed_against_memory
from measuring import RESULTS, keep, ratio, seconds

from strata.pipeline.feed.buffers import host_memory
from strata.pipeline.feed.level_feed import feed
from strata.pipeline.run import device as devices
from strata.store.level.level import Level

BATCH, COPIES = 256, 64


def copies(device: torch.device, nbytes: int) -> float:
    """GB/s of copies of a batch from host memory, pinned where that helps."""
    source = torch.from_numpy(host_memory(device)(nbytes))
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def work() -> None:
        for _ in range(COPIES):
            target.copy_(source, non_blocking=True)
        devices.finish(device)

    return COPIES * nbytes / seconds(work) / 1e9


def epoch(level: Level, device: torch.device, tier: str, epochs: int) -> list[float]:
    """GB/s of stored rows on the device."""
    labels, rates = np.arange(len(level)), []
    whole = len(level) * level.geometry.row_bytes
    with feed(level, batch=BATCH, device=device, labels=labels, tier=tier, stored=True) as batches:

        def work() -> None:
            for _ in batches:
                pass
            devices.finish(device)

        for number in range(epochs + 1):
            taken = seconds(work)
            rates += [whole / taken / 1e9] if number else []
    return rates


def measure(device: torch.device, *, quick: bool) -> dict[str, Any]:
    epochs, nbytes = (1, 50_000_000) if quick else (5, 4_000_000_000)
    source, found = features(load_images(None), "32KB", "uint8"), {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        level = make_level(Path(place), source, "raw", nbytes)
        limit = [copies(device, BATCH * level.geometry.row_bytes) for _ in range(epochs)]
        found["gb_per_s"] = {"copies": round(statistics.median(limit), 2)}
        for tier in ("memory", "device") if device.type == "cuda" else ("memory",):
            rates = epoch(level, device, tier, epochs)
            found["gb_per_s"][tier] = round(statistics.median(rates), 2)
            found[f"ratio_{tier}_to_copies"] = ratio(rates, limit)
    images, rounds, steps = (2_048, 1, 8) if quick else (32_768, 9, 128)
    for tier in ("memory", "device") if device.type == "cuda" else ("memory",):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
            found[f"training from {tier}"] = fed_against_memory(
                Path(place), images, rounds, steps, device=device, tier=tier
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small, once: does it run?")
    parser.add_argument("--out", type=Path, help="default: the committed result, if not --quick")
    options = parser.parse_args()
    device = torch.device(options.device)
    out = options.out or (None if options.quick else RESULTS / "feed-gpu.json")
    keep(measure(device, quick=options.quick), out, show=True, on=device)


if __name__ == "__main__":
    main()
