"""Rates of rows: stored, read, published, and decoded from JPEG, by the code that does it in a run.

Rows are maps of one sample, stored in every profile and precision, so that a plan can say what
another recipe would cost. Each is a small level in the store, which is gone afterwards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.delivery import Delivery
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.rows import FfcvRows
from strata.pipeline.plan.costs import PROFILES
from strata.pipeline.plan.machine import RowRate
from strata.pipeline.plan.worth import PRECISIONS
from strata.pipeline.progress import Tick
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.device import ReadOptions
from strata.pipeline.run.overview import Overview
from strata.pipeline.study.sample_rows import Sample, codec_for, sample
from strata.stages.features.quantise import Codec
from strata.store.fingerprint import fingerprint
from strata.store.level.codec import encode
from strata.store.level.layout import Geometry, LevelKey, geometry
from strata.store.level.level import Level, receipt_of
from strata.store.write.writer import PUBLISHERS, LevelWriter

REPETITIONS = 3
LEAST_SECONDS = 0.3
"""Of one repetition, by doing the work over and over."""
SHORT_SECONDS = 0.05
"""The same, of what is measured in many forms."""
SAMPLE_BYTES = 16 << 20
"""Of float32 maps."""
ROW_BYTES = 16 << 20
"""Of rows as they are stored, in every form …"""
OWN_BYTES = 64 << 20
"""… and in the recipe's own precision, raw: more than caches of a processor hold."""
BATCHES = 32
"""At most; small rows cost by the batch."""
SMALL_SHARDS = 9
JPEG_IMAGES = 512


def seconds(work: Callable[[], object], least: float = LEAST_SECONDS) -> float:
    """Of one call: the median over repetitions, each of as many calls as make it long enough. What
    takes long by itself is done once more, and that is enough."""
    begun, found = time.perf_counter(), []
    work()
    long = time.perf_counter() - begun > max(least, 4 * SHORT_SECONDS)
    for _ in range(1 if long else REPETITIONS):
        begun, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - begun < least:
            work()
            calls += 1
        found.append((time.perf_counter() - begun) / calls)
    return statistics.median(found)


def sample_of(found: Overview) -> Sample:
    """Images and maps of a run; as many rows as are worth measuring."""
    row = 4 * int(np.prod(_shape(found.recipe)))
    return sample(found, max(64, SAMPLE_BYTES // row))


def forms(recipe: Recipe) -> list[tuple[str, str]]:
    """Profile and precision of all that is measured, the recipe's own precision among them."""
    precisions = dict.fromkeys((recipe.cache.precision, *PRECISIONS))
    return [(profile, precision) for precision in precisions for profile in PROFILES]


def measure(
    recipe: Recipe, stored: Sample, place: Path, device: torch.device, tick: Tick
) -> tuple[list[RowRate], float]:
    """Rates of every form, and of gathering rows that were read before.

    Args:
        device: a CPU also lays rows out, and makes floats of them.
    """
    rates, gather = [], 0.0
    for profile, precision in forms(recipe):
        own = (profile, precision) == ("raw", recipe.cache.precision)
        shape = _geometry(recipe, profile, precision, OWN_BYTES if own else ROW_BYTES)
        rows = _Rows(recipe, shape, stored, place, on_cpu=device.type == "cpu")
        rates.append(rows.rate())
        if own:
            gather = rows.gathered()
        tick(1)
    return rates, gather


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.shape(1, augmentation.cached_size(recipe))


def _geometry(recipe: Recipe, profile: str, precision: str, nbytes: int) -> Geometry:
    """One shard of x_1, or less where rows are small."""
    rows = geometry(10**9, _shape(recipe), precision, nbytes, profile).shard_rows
    rows = min(rows, BATCHES * recipe.schedule.batch)
    return geometry(rows, _shape(recipe), precision, nbytes, profile)


@dataclass(frozen=True)
class _Rows:
    """One shard of rows in one form."""

    recipe: Recipe
    shape: Geometry
    stored: Sample
    place: Path
    on_cpu: bool

    def rate(self) -> RowRate:
        codec = codec_for(self.recipe, self.shape.precision, self.stored.maps)
        some = codec.encode(self.stored.maps)
        repeated = torch.arange(self.shape.rows) % len(some)
        computed = some[repeated].contiguous(memory_format=torch.channels_last)
        rows = np.empty((self.shape.rows, *self.shape.stored), self.shape.dtype)
        torch.from_numpy(rows).copy_(computed)
        writer = self._writer()
        level = put(writer, [rows])
        work = partial(_encode, writer, computed if self.on_cpu else None, rows)
        encoding = seconds(partial(_by_publishers, work), SHORT_SECONDS)
        decoding = seconds(partial(self._read, level, codec), SHORT_SECONDS)
        return RowRate(
            self.shape.profile,
            self.shape.precision,
            PUBLISHERS * rows.nbytes / encoding,
            rows.nbytes / decoding,
            rows.nbytes / level.nbytes if self.shape.profile != "raw" else 1.0,
        )

    def gathered(self) -> float:
        """Bytes per second of rows that were read before."""
        codec = codec_for(self.recipe, self.shape.precision, self.stored.maps)
        level = Level.open(self.place, self._writer().key)
        with _delivery(level) as delivery:
            self._take(delivery, codec)
            again = seconds(partial(self._take, delivery, codec))
        return self.shape.rows * self.shape.row_bytes / again

    def _writer(self) -> LevelWriter:
        return _writer(self.place, self.shape)

    def _read(self, level: Level, codec: Codec) -> None:
        """All rows for the first time: opened, mapped or decoded, and checked."""
        with _delivery(level) as delivery:
            self._take(delivery, codec)

    def _take(self, delivery: Delivery, codec: Codec) -> None:
        order = np.random.default_rng(0).permutation(self.shape.rows)
        batch = self.recipe.schedule.batch
        parts = [np.sort(order[at : at + batch]) for at in range(0, len(order), batch)]
        for rows in delivery.batches(parts):
            if self.on_cpu:
                codec.decode(rows, self.shape.sample[2])


def _delivery(level: Level) -> Delivery:
    return Delivery([level], ReadOptions(torch.device("cpu"), tier="memory"))


def _encode(writer: LevelWriter, computed: torch.Tensor | None, rows: np.ndarray) -> None:
    """What is done to a shard before the disk has it."""
    if computed is not None:
        rows = np.empty_like(rows)
        torch.from_numpy(rows).copy_(computed)
    receipt_of(writer.geometry, 0, encode(writer.geometry, rows), rows)


def _by_publishers(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(PUBLISHERS) as pool:
        for done in [pool.submit(work) for _ in range(PUBLISHERS)]:
            done.result()


# ---- levels -------------------------------------------------------------------------------------


def _writer(place: Path, shape: Geometry, depth: int = 1) -> LevelWriter:
    intent = {"calibration": [shape.profile, shape.precision, shape.rows]}
    key = LevelKey(depth, fingerprint(intent), "train", "clean")
    return LevelWriter(place, key, shape, [intent])


def put(
    writer: LevelWriter, shards: list[np.ndarray], arrays: dict[str, np.ndarray] | None = None
) -> Level:
    """Write a whole level."""
    with writer.locked():
        todo = writer.missing()
        writer.fill(zip(todo, shards, strict=True))
        return writer.commit(None, arrays)


def publishing(place: Path) -> dict[str, float]:
    """Seconds of a shard and of a level that hold next to nothing."""
    one = statistics.median(_small(place, 1, depth) for depth in range(1, 1 + REPETITIONS))
    many = statistics.median(
        _small(place, SMALL_SHARDS, depth) for depth in range(1, 1 + REPETITIONS)
    )
    shard = max(1e-6, (many - one) / (SMALL_SHARDS - 1))
    return {"publish_shard": shard, "publish_level": max(1e-6, one - shard)}


def _small(place: Path, shards: int, depth: int) -> float:
    """Seconds of a level of so many rows of one byte, each a shard."""
    writer = _writer(place, Geometry(shards, (1, 1, 1), "uint8", 1, 1), depth)
    begun = time.perf_counter()
    put(writer, [np.zeros((1, 1, 1, 1), np.uint8)] * shards)
    return time.perf_counter() - begun


# ---- images -------------------------------------------------------------------------------------


def decode_jpeg(recipe: Recipe, images: np.ndarray, place: Path) -> float | None:
    """Bytes of images decoded from JPEG by ffcv per second; None where the recipe has none, or ffcv
    cannot be had."""
    if not recipe.data.jpeg:
        return None
    with suppress(LoaderError):
        beton.check()
        images = images[:JPEG_IMAGES]
        shape = geometry(len(images), images.shape[1:], "uint8", OWN_BYTES)
        labels = np.zeros(len(images), np.int64)
        level = put(_writer(place, shape, 0), list(_shards(shape, images)), {"labels": labels})
        path = place / "images.beton"
        beton.write_images(path, level, "jpeg", recipe.data.jpeg)
        with FfcvRows.of_beton(path, level) as rows:
            parts = [np.arange(len(images))]
            return images.nbytes / seconds(lambda: list(rows.batches(parts)))
    return None


def _shards(shape: Geometry, rows: np.ndarray) -> Iterator[np.ndarray]:
    for shard in range(shape.shards):
        first, last = shape.shard_range(shard)
        yield rows[first:last]
