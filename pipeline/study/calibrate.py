"""Measure this machine: the rates that a plan needs, for one recipe, in under a minute.

Every rate is that of the code that will do the work: shards are published, packed and unpacked as
the store does it, layers run as `featurize` and the solver run them, with the recipe's batch.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strata.pipeline.plan import hardware
from strata.pipeline.plan.costs import kind, level_geometry, operations
from strata.pipeline.plan.machine import LayerRate, Machine
from strata.pipeline.progress import Reporter
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import device as devices
from strata.pipeline.run.overview import Overview
from strata.pipeline.study import row_rates
from strata.pipeline.study.row_rates import codec_for, seconds
from strata.stages.features.quantise import memory_format
from strata.stages.network.featurize import Frozen, featurize, run_layer
from strata.stages.network.network import build_problem
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver
from strata.store.files.publish import put_exclusive

FILE_BYTES, FILES = 64 << 20, 4
"""Size and number of the files that are written and read: four shards."""
READ_BYTES, IN_FLIGHT = 1 << 20, 8


def measure(
    found: Overview, device: torch.device, compute: torch.dtype, report: Reporter
) -> Machine:
    """Rates of this machine for the recipe of a run.

    Args:
        found: the disk of its store is measured, in a directory that is gone afterwards; rows are
            those of its features, where there are any.

    Raises:
        DiskFull: there is no room for 256 MB.
    """
    recipe, layers = found.recipe, len(found.recipe.layers)
    sample, root = row_rates.sample_of(found), found.store.root
    root.mkdir(parents=True, exist_ok=True)
    parts = layers + len(row_rates.forms(recipe)) + 3
    with (
        report.task("measuring", parts, "parts") as tick,
        tempfile.TemporaryDirectory(prefix="calibration-", dir=root) as place,
    ):
        rates: dict[str, Any] = _disk(Path(place))
        tick(1)
        rows, gathering = row_rates.measure(recipe, sample, Path(place), device, tick)
        rates |= row_rates.publishing(Path(place)) | gathering
        tick(1)
        jpeg = row_rates.decode_jpeg(recipe, sample.images, Path(place))
        tick(1)
        kinds = []
        for j in range(1, layers + 1):
            kinds.append(_layer_rate(recipe, j, device, compute))
            tick(1)
    # Precisions that the table of rows does not have are taken to be like the recipe's own.
    own = [r for r in rows if r.precision == recipe.cache.precision and r.profile != "raw"]
    for rate, name in itertools.product(own, ("encode", "decode", "ratio")):
        rates[f"{name}_{rate.profile}"] = getattr(rate, name)
    return Machine(
        name="this machine",
        source=f"measured {time.strftime('%Y-%m-%d')}",
        sample=sample.what,
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
    )


# ---- the disk -----------------------------------------------------------------------------------


def _disk(place: Path) -> dict[str, float]:
    """Bytes per second, written with fsync, and read past the page cache: in pieces, in no order,
    several in flight."""
    random, paths = np.random.default_rng(0), [place / str(number) for number in range(FILES)]
    data, nbytes = random.bytes(FILE_BYTES), FILES * FILE_BYTES
    begun = time.perf_counter()
    for path in paths:
        put_exclusive(place, path.name, data)
    written = time.perf_counter() - begun
    for path in paths:
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(at: int) -> None:
        with paths[at // FILE_BYTES].open("rb", buffering=0) as file:
            os.pread(file.fileno(), READ_BYTES, at % FILE_BYTES)

    begun = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(read, random.permutation(np.arange(0, nbytes, READ_BYTES)).tolist()))
    taken = time.perf_counter() - begun
    for path in paths:
        path.unlink()
    return {"disk_write": nbytes / written, "disk_read": nbytes / taken}


# ---- layers -------------------------------------------------------------------------------------


def _layer_rate(recipe: Recipe, j: int, device: torch.device, compute: torch.dtype) -> LayerRate:
    layer, auxiliary = recipe.problems[j - 1]
    shape = recipe.shape(j - 1, recipe.augment.crop)
    before, after = (level_geometry(recipe, depth, 1).axis for depth in (j - 1, j))
    problem = build_problem(layer, auxiliary, 0)
    schedule = SGDSchedule("step", 10**6, recipe.schedule.batch, 1e-6, 0.9, 0.0)
    solver = Solver(problem, schedule, device, compute)
    generator = torch.Generator().manual_seed(0)
    seen = shape[0] + auxiliary.context, *shape[1:]
    x = torch.randn(recipe.schedule.batch, *seen, generator=generator).to(device)
    x = x.contiguous(memory_format=memory_format(x, before))
    if j == 1 and recipe.data.dtype == "int32":
        x = torch.zeros(x.shape, dtype=torch.int32, device=device)
    labels = (len(x), *recipe.data.shape[:1]) if recipe.data.targets == "token" else (len(x),)
    y = torch.zeros(labels, dtype=torch.int64, device=device)

    training = seconds(partial(solver.step, x, y))
    trained = 3 * operations(recipe, (layer, auxiliary)) * len(x) / training
    problem.eval()
    with torch.no_grad():
        x = x[:, : shape[0]] if auxiliary.context else x
        maps = run_layer(problem.layer, x, compute, before).float().cpu()
    # A layer's output is rounded, stored or not.
    stored = codec_for(recipe, recipe.cache.precision, maps, after).to(device)
    frozen = Frozen(problem.layer, stored, before)
    passing = seconds(partial(featurize, [frozen], x, block=len(x), compute=compute))
    return LayerRate(kind(recipe, j), layer.operations(shape) * len(x) / passing, trained)


def _copy(device: torch.device) -> float:
    """Bytes per second from pinned memory to a GPU; for a CPU nothing is copied."""
    if device.type == "cpu":
        return 1e12
    host = torch.empty(FILE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(FILE_BYTES, dtype=torch.uint8, device=device)
    return FILE_BYTES / seconds(partial(there.copy_, host, non_blocking=True))
