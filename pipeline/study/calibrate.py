"""Measure this machine: the rates that a plan needs, for one recipe, in under a minute.

Every rate is that of the code that will do the work: shards are published, packed and unpacked as
the store does it, layers run as `featurize` and the solver run them, with the recipe's batch.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from strata.pipeline.plan import hardware
from strata.pipeline.plan.costs import kind, operations
from strata.pipeline.plan.machine import LayerRate, Machine, RowRate
from strata.pipeline.progress import Reporter
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import device as devices
from strata.pipeline.run.overview import Overview
from strata.pipeline.study import row_rates
from strata.pipeline.study.row_rates import seconds
from strata.pipeline.study.sample_rows import codec_for
from strata.stages.features.quantise import Codec
from strata.stages.network.featurize import Frozen, featurize, run_layer
from strata.stages.network.network import build_problem
from strata.stages.solve.solve import SGDSchedule, Solver
from strata.store.files.publish import put_exclusive

FILE_BYTES, FILES = 64 << 20, 4
"""What is written and read: four shards."""
READ_BYTES, IN_FLIGHT = 1 << 20, 8


def measure(
    found: Overview, device: torch.device, compute: torch.dtype, report: Reporter
) -> Machine:
    """
    Args:
        found: the disk of its store is measured, in a directory that is gone afterwards; rows are
            those of its features, where there are any.

    Raises:
        DiskFull: there is no room for 256 MB.
    """
    recipe, layers = found.recipe, len(found.recipe.layers)
    stored, root = row_rates.sample_of(found), found.store.root
    root.mkdir(parents=True, exist_ok=True)
    parts = layers + len(row_rates.forms(recipe)) + 3
    with (
        report.task("measuring", parts, "parts") as tick,
        tempfile.TemporaryDirectory(prefix="calibration-", dir=root) as place,
    ):
        rates = _disk(Path(place))
        tick(1)
        rows, gather = row_rates.measure(recipe, stored, Path(place), device, tick)
        rates |= row_rates.publishing(Path(place)) | {"gather": gather}
        tick(1)
        jpeg = row_rates.decode_jpeg(recipe, stored.images, Path(place))
        tick(1)
        kinds = []
        for j in range(1, layers + 1):
            kinds.append(_layer(recipe, j, device, compute))
            tick(1)
    return Machine(
        name="this machine",
        source=f"measured {time.strftime('%Y-%m-%d')}",
        sample=stored.what,
        device=device.type,
        forward=statistics.median(rate.forward for rate in kinds),
        train=statistics.median(rate.train for rate in kinds),
        memory=float(devices.available_memory()),
        device_memory=float(devices.free_device_memory(device)) or None,
        copy=_copy(device),
        decode_jpeg=jpeg,
        layers=tuple(kinds),
        rows=tuple(rows),
        hardware=hardware.described(),
        **rates,
        **_own(rows, recipe.cache.precision),
    )


def _own(rows: Sequence[RowRate], precision: str) -> dict[str, float]:
    """What is taken for precisions that are not in the table: the recipe's own rates."""
    found = {}
    for rate in rows:
        if rate.precision == precision and rate.profile != "raw":
            for name in ("encode", "decode", "ratio"):
                found[f"{name}_{rate.profile}"] = getattr(rate, name)
    return found


# ---- the disk -----------------------------------------------------------------------------------


def _disk(place: Path) -> dict[str, float]:
    data = np.random.default_rng(0).bytes(FILE_BYTES)
    paths = [place / str(number) for number in range(FILES)]
    begun = time.perf_counter()
    for path in paths:
        put_exclusive(place, path.name, data)
    written = time.perf_counter() - begun
    read, nbytes = _read_cold(paths), FILES * FILE_BYTES
    for path in paths:
        path.unlink()
    return {"disk_write": nbytes / written, "disk_read": nbytes / read}


def _read_cold(paths: list[Path]) -> float:
    """Seconds to read files that are not in the page cache, in pieces and in no order."""
    pieces = [(path, at) for path in paths for at in range(0, FILE_BYTES, READ_BYTES)]
    order = np.random.default_rng(0).permutation(len(pieces))
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    def read(path: Path, at: int) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.pread(descriptor, READ_BYTES, at)
        os.close(descriptor)

    begun = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for done in [pool.submit(read, *pieces[i]) for i in order]:
            done.result()
    return time.perf_counter() - begun


# ---- layers -------------------------------------------------------------------------------------


def _layer(recipe: Recipe, j: int, device: torch.device, compute: torch.dtype) -> LayerRate:
    layer, auxiliary = recipe.problems[j - 1]
    shape = recipe.shape(j - 1, recipe.augment.crop)
    problem = build_problem(layer, auxiliary, 0)
    schedule = SGDSchedule("step", 10**6, recipe.schedule.batch, 1e-6, 0.9, 0.0)
    solver = Solver(problem, schedule, device, compute)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(recipe.schedule.batch, *shape, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)

    def train() -> None:
        solver.step(x, y)
        devices.finish(device)

    def forward() -> None:
        featurize([frozen], x, block=len(x), compute=compute)
        devices.finish(device)

    trained = 3 * operations(recipe, j) * len(x) / seconds(train)
    problem.eval()
    frozen = Frozen(problem.layer, _rounding(recipe, problem.layer, x, compute))
    passed = layer.operations(shape) * len(x) / seconds(forward)
    return LayerRate(kind(recipe, j), passed, trained)


@torch.no_grad()
def _rounding(
    recipe: Recipe, layer: torch.nn.Module, x: torch.Tensor, compute: torch.dtype
) -> Codec:
    """What its output is rounded to, stored or not."""
    maps = run_layer(layer, x, compute).float().cpu()
    return codec_for(recipe, recipe.cache.precision, maps).to(x.device)


def _copy(device: torch.device) -> float:
    """Bytes per second from pinned memory to a GPU; for a CPU nothing is copied."""
    if device.type == "cpu":
        return 1e12
    host = torch.empty(FILE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(FILE_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        devices.finish(device)

    return FILE_BYTES / seconds(copy)
