"""What safety costs: a committed level against a bare write of the same bytes with fsync.

The level is written by the real writer: encoded, hashed, written under another name, synced,
linked, its directory synced, a receipt with a checksum for every row, and a commit. The bare write
creates a file per shard, writes the same bytes in calls of the same size, which is faster than one
call for all, and calls fsync once on each. Pairs are interleaved in one process; the ratio is the
median over the pairs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import checkout  # noqa: F401
from strata.store.files.publish import WRITE_BYTES
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey, geometry
from strata.store.write.writer import LevelWriter

SHARD_BYTES, SHARDS = 64 << 20, 8
LINEAGE = [{"depth": 1, "of": "a benchmark"}]
KEY = LevelKey(1, fingerprint(LINEAGE[0]), "train", "v0")
AT_LEAST = 0.85
SAMPLES = {"128 KB rows": (64, 32, 32), "8 KB rows": (64, 8, 8)}


def features(shape: Geometry) -> np.ndarray:
    """Half zeros, as after a ReLU: one shard of float16, used for every shard."""
    values = np.random.default_rng(0).standard_normal((shape.shard_rows, *shape.lying), np.float32)
    return np.maximum(values, 0).astype(np.float16)


def committed(place: Path, shape: Geometry, rows: np.ndarray) -> None:
    writer = LevelWriter(place, KEY, shape, LINEAGE)
    with writer.locked():
        seen = np.moveaxis(rows, -1, 1)  # as a convolution makes them: channels lie last
        writer.fill((shard, seen) for shard in writer.missing())
        writer.commit(None)


def bare(place: Path, shape: Geometry, rows: np.ndarray) -> None:
    """As many files, of the same rows, each synced once."""
    place.mkdir()
    for shard in range(shape.shards):
        descriptor = os.open(place / str(shard), os.O_CREAT | os.O_WRONLY, 0o644)
        view = rows.data.cast("B")
        while len(view):
            view = view[os.write(descriptor, view[:WRITE_BYTES]) :]
        os.fsync(descriptor)
        os.close(descriptor)


def seconds(write: Callable[..., None], shape: Geometry, rows: np.ndarray) -> float:
    place = Path(tempfile.mkdtemp(prefix="cost-", dir=Path.cwd()))
    os.sync()
    begun = time.perf_counter()
    write(place / "level", shape, rows)
    taken = time.perf_counter() - begun
    shutil.rmtree(place)
    return taken


def measure(pairs: int) -> dict[str, Any]:
    """Medians and the ratio, for two sizes of a row."""
    found = {name: _measure(sample, pairs) for name, sample in SAMPLES.items()}
    holds = all(entry["ratio_committed_to_bare"] >= AT_LEAST for entry in found.values())
    return {**found, "holds": holds}


def _measure(sample: tuple[int, int, int], pairs: int) -> dict[str, Any]:
    one = geometry(10**9, sample, "float16", SHARD_BYTES)
    shape = geometry(one.shard_rows * SHARDS, sample, "float16", SHARD_BYTES)
    rows = features(shape)
    nbytes = rows.nbytes * SHARDS
    times: dict[str, list[float]] = {"committed": [], "bare": []}
    for pair in range(pairs + 1):  # the first pair warms up
        for name, write in (("committed", committed), ("bare", bare))[:: 1 if pair % 2 else -1]:
            taken = seconds(write, shape, rows)
            times[name] += [taken] if pair else []
        print(f"  cost: pair {pair} of {pairs}", file=sys.stderr)
    ratios = [b / c for b, c in zip(times["bare"], times["committed"], strict=True)]
    return {
        "pairs": pairs,
        "level_bytes": nbytes,
        "shards": SHARDS,
        "median_mb_per_s": {
            name: round(nbytes / statistics.median(values) / 1e6, 1)
            for name, values in times.items()
        },
        "ratio_committed_to_bare": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
    }
