"""Measure this machine: the rates that a plan needs, for one recipe, in under a minute.

Every rate is that of the code that will do the work: shards are published, packed and unpacked as
the store does it, layers run as `featurize` and the solver run them, with the recipe's batch.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import device as devices
from pipeline import hardware, views
from pipeline.economics import PROFILES, kind, operations
from pipeline.machine import LayerRate, Machine
from pipeline.overview import Overview
from pipeline.progress import Reporter
from pipeline.recipe import Recipe
from pipeline.sample_rows import sample
from stages.featurize import run_layer
from stages.network import build_problem
from stages.solve import Schedule, Solver
from store.codec import encode, unpack
from store.layout import Geometry, geometry
from store.memory import aligned
from store.publish import put_exclusive

FILE_BYTES, FILES = 64 << 20, 4
"""What is written and read: four shards."""
READ_BYTES, IN_FLIGHT = 1 << 20, 8
REPETITIONS = 3
LEAST_SECONDS = 0.3
"""Of one repetition, by doing the work over and over."""


def measure(
    found: Overview, device: torch.device, compute: torch.dtype, report: Reporter
) -> Machine:
    """
    Args:
        found: the disk of its store is measured, in a directory that is gone afterwards; packing on
            its features, where there are any.

    Raises:
        DiskFull: there is no room for 256 MB.
    """
    recipe, layers = found.recipe, len(found.recipe.layers)
    stored = sample(found, _shard(recipe, "raw").rows)
    with report.task("measuring", layers + 4, "parts") as tick:
        rates = _disk(found.store.root)
        tick(1)
        for profile in PROFILES:
            rates |= _packing(_shard(recipe, profile), stored.rows)
            tick(1)
        kinds = []
        for j in range(1, layers + 1):
            kinds.append(_layer(recipe, j, device, compute))
            tick(1)
    return Machine(
        name="this machine",
        source=f"measured {time.strftime('%Y-%m-%d')}",
        packed=f"{recipe.cache.precision}, {stored.what}",
        device=device.type,
        forward=statistics.median(rate.forward for rate in kinds),
        train=statistics.median(rate.train for rate in kinds),
        memory=float(devices.available_memory()),
        copy=_copy(device),
        layers=tuple(kinds),
        hardware=hardware.described(),
        **rates,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of one call: the median over repetitions, each of as many calls as make it long enough. What
    takes long by itself is done once more, and that is enough."""
    begun, found = time.perf_counter(), []
    work()
    long = time.perf_counter() - begun > LEAST_SECONDS
    for _ in range(1 if long else REPETITIONS):
        begun, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - begun < LEAST_SECONDS:
            work()
            calls += 1
        found.append((time.perf_counter() - begun) / calls)
    return statistics.median(found)


# ---- the disk -----------------------------------------------------------------------------------


def _disk(root: Path) -> dict[str, float]:
    data = np.random.default_rng(0).bytes(FILE_BYTES)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="calibration-", dir=root) as place:
        begun = time.perf_counter()
        for number in range(FILES):
            put_exclusive(Path(place), str(number), data)
        written = time.perf_counter()
        read = _read_cold([Path(place) / str(number) for number in range(FILES)])
    nbytes = FILES * FILE_BYTES
    return {"disk_write": nbytes / (written - begun), "disk_read": nbytes / read}


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


# ---- rows ---------------------------------------------------------------------------------------


def _packing(shape: Geometry, rows: np.ndarray) -> dict[str, float]:
    """Rates of bytes of rows into and out of a profile, by all cores."""
    profile, rows = shape.profile, rows[: shape.rows]
    if profile == "raw":
        return {"gather": rows.nbytes / _seconds(partial(_gather, rows))}
    chunks = [np.frombuffer(chunk, np.uint8) for chunk in encode(shape, rows)[:-1]]
    packed = sum(map(len, chunks))
    return {
        f"encode_{profile}": rows.nbytes / _seconds(lambda: encode(shape, rows)),
        f"decode_{profile}": rows.nbytes / _seconds(partial(_unpack_all, shape, chunks)),
        f"ratio_{profile}": rows.nbytes / packed,
    }


def _shard(recipe: Recipe, profile: str) -> Geometry:
    """One shard of x_1 as the recipe stores it."""
    sample, precision = recipe.shape(1, views.cached_size(recipe)), recipe.cache.precision
    rows = geometry(10**9, sample, precision, FILE_BYTES, profile).shard_rows
    return geometry(rows, sample, precision, FILE_BYTES, profile)


def _gather(rows: np.ndarray) -> None:
    """All rows in random order, in batches of 128."""
    flat = rows.reshape(len(rows), -1).view(np.uint8)
    order = np.random.default_rng(0).permutation(len(flat))
    parts = [order[at : at + 128] for at in range(0, len(order), 128)]

    def take(parts: list[np.ndarray]) -> None:
        out = aligned(128 * flat.shape[1]).reshape(128, -1)
        for part in parts:
            flat.take(part, axis=0, out=out[: len(part)], mode="clip")

    _by_all_cores(take, parts)


def _unpack_all(shape: Geometry, chunks: list[np.ndarray]) -> None:
    def some(chunks: list[np.ndarray]) -> None:
        out = aligned(shape.chunk_rows * shape.row_bytes).reshape(shape.chunk_rows, -1)
        for chunk in chunks:
            unpack(shape, chunk, out)

    _by_all_cores(some, chunks)


def _by_all_cores(work: Callable[[list[Any]], None], items: list[Any]) -> None:
    cores = hardware.cores()
    with ThreadPoolExecutor(cores) as pool:
        for done in [pool.submit(work, items[core::cores]) for core in range(cores)]:
            done.result()


# ---- layers -------------------------------------------------------------------------------------


def _layer(recipe: Recipe, j: int, device: torch.device, compute: torch.dtype) -> LayerRate:
    layer, auxiliary = recipe.layers[j - 1], recipe.auxiliaries[j - 1]
    shape = recipe.shape(j - 1, recipe.augment.crop)
    problem = build_problem(layer, auxiliary, 0)
    schedule = Schedule("step", 10**6, recipe.schedule.batch, 1e-6, 0.9, 0.0)
    solver = Solver(problem, schedule, device, compute)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(recipe.schedule.batch, *shape, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)

    def train() -> None:
        solver.step(x, y)
        devices.finish(device)

    @torch.no_grad()
    def forward() -> None:
        run_layer(problem.layer, x, compute)
        devices.finish(device)

    trained = 3 * operations(recipe, j) * len(x) / _seconds(train)
    problem.eval()
    return LayerRate(kind(recipe, j), layer.operations(shape) * len(x) / _seconds(forward), trained)


def _copy(device: torch.device) -> float:
    """Bytes per second from pinned memory to a GPU; for a CPU nothing is copied."""
    if device.type == "cpu":
        return 1e12
    host = torch.empty(FILE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(FILE_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        devices.finish(device)

    return FILE_BYTES / _seconds(copy)
