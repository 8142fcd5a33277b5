"""Rates of rows: stored, read, published, and decoded from JPEG, by the code that does it in a run.

Rows are maps of one sample, stored in every profile and precision, so that a plan can say what
another recipe would cost. Each is a small level in the store, which is gone afterwards.

The sample is x_1 of the run's own images: what packs well is zeros and what is alike, so noise
says little of features. Layer 1 is used as it was solved, or else as it will begin.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.delivery import Delivery
from strata.pipeline.feed.features import frozen_layer, image_views, level_draws
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.write import write_images
from strata.pipeline.plan import hardware
from strata.pipeline.plan.caching import FEATURES
from strata.pipeline.plan.costs import PROFILES, level_geometry
from strata.pipeline.plan.machine import RowRate
from strata.pipeline.plan.worth import PRECISIONS
from strata.pipeline.progress import Tick
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.device import ReadOptions
from strata.pipeline.run.levels import have_images
from strata.pipeline.run.overview import Overview
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Codec, codec, memory_format, needs_scales
from strata.stages.network.network import build
from strata.store.fingerprint import fingerprint
from strata.store.level.codec import encode
from strata.store.level.layout import Geometry, LevelKey, geometry
from strata.store.level.level import Level, receipt_of
from strata.store.read.order import batches
from strata.store.read.rows import Rows
from strata.store.write.writer import PUBLISHERS, LevelWriter

REPETITIONS = 3
LEAST_SECONDS = 0.3
"""Length of one repetition …"""
SHORT_SECONDS = 0.05
"""… and of one of what is measured in many forms."""
SAMPLE_BYTES = 16 << 20
"""Size of the sample, as float32 maps."""
ROW_BYTES = 16 << 20
"""Most bytes of stored rows, in every form …"""
OWN_BYTES = 64 << 20
"""… and in the recipe's own precision, raw: more than the caches of a processor hold."""
BATCHES = 32
"""Most batches that are measured; small rows cost by the batch."""
SMALL_SHARDS = 9
NEARLY = 0.95
"""Of the highest rate: more threads are not worth the rest."""
JPEG_IMAGES = 512
FORWARD_ROWS = 256
HELD = ReadOptions(torch.device("cpu"), tier="memory")


def seconds(work: Callable[[], object], least: float = LEAST_SECONDS) -> float:
    """Seconds of one call: the median over repetitions, each of as many calls as make it long
    enough. Of what takes that long by itself, the second call counts."""
    timer = timeit.Timer(work, timer=_clock)
    once = min(timer.repeat(2, 1))
    calls = int(least / once)
    return statistics.median(timer.repeat(REPETITIONS, calls)) / calls if calls else once


def _clock() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- the sample ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Some of a run's images, and their features."""

    images: np.ndarray
    """x_0, for example uint8 (n, channel, y, x); noise where there are no images yet."""
    maps: Tensor
    """x_1, for example float32 (n, channel, y, x), channels last; whole canvases where these are
    cached."""
    what: str
    """What they are, for people."""


def sample_of(found: Overview) -> Sample:
    """Images and maps of a run, as many as are worth measuring: layer 1 as it was solved, or else
    as it begins, with the statistics of a batch."""
    recipe, data, run = found.recipe, found.recipe.data, found.run
    shape = recipe.shape(1, augmentation.cached_size(recipe))
    count = max(64, SAMPLE_BYTES // (4 * prod(shape)))
    if run and have_images(run, found.store):
        level = found.store.open(LevelKey(0, run.nodes()[0].fingerprint, "train", "clean"))
        images, what = level.read(0, min(len(level), count)), FEATURES
    else:
        shape = (min(count, 4 * FORWARD_ROWS), *data.sample(data.size))
        top = 256 if data.dtype == "uint8" else data.classes  # of tokens, all that are sure to be
        images = np.random.default_rng(0).integers(0, top, shape).astype(data.dtype)
        what = "noise: there are no images yet"
    solved = run and run.solved() and frozen_layer(run, 1, torch.device("cpu"))
    layer = solved.layer if solved else build([recipe.layers[0]], 0)[0].train()
    draws = level_draws(recipe, 0, "clean", len(images))
    x = image_views(recipe, torch.from_numpy(images), draws)
    with torch.no_grad():
        maps = torch.cat([layer(part) for part in x.split(FORWARD_ROWS)])
    form = memory_format(maps, level_geometry(recipe, 1, 1).axis)
    return Sample(images, maps.contiguous(memory_format=form), what)


def codec_for(recipe: Recipe, precision: str, maps: Tensor, axis: int) -> Codec:
    """The codec of a precision, with scales chosen on the given maps where it needs any.

    Args:
        axis: of the channels in a batch, 1 or -1.
    """
    scales = {}
    if needs_scales(precision):
        found = calibrate(iter([maps[:FORWARD_ROWS]]), precision, recipe.cache.percentile, axis)
        scales = found.quantiser.tensors()
    return codec(precision, scales, axis)


# ---- rows in every form -------------------------------------------------------------------------


def forms(recipe: Recipe) -> list[tuple[str, str]]:
    """Profile and precision of all that is measured, the recipe's own precision among them."""
    precisions = dict.fromkeys((recipe.cache.precision, *PRECISIONS))
    return [(profile, precision) for precision in precisions for profile in PROFILES]


def measure(
    recipe: Recipe, sample: Sample, place: Path, device: torch.device, tick: Tick
) -> tuple[list[RowRate], dict[str, Any]]:
    """Rates of every form; and ``gather``, bytes per second of gathering rows that were read
    before, by the fewest threads that are as fast as any, ``gatherers``.

    Args:
        device: a CPU also lays rows out, and makes floats of them.
    """
    rates, gathering, on_cpu = [], {"gather": 0.0}, device.type == "cpu"
    maps = recipe.shape(1, augmentation.cached_size(recipe))
    last = recipe.layers[0].features_last
    for profile, precision in forms(recipe):
        own = (profile, precision) == ("raw", recipe.cache.precision)
        how = precision, OWN_BYTES if own else ROW_BYTES, profile
        rows = min(geometry(10**9, maps, *how).shard_rows, BATCHES * recipe.schedule.batch)
        # One shard, or less where rows are small.
        shape = geometry(rows, maps, *how, features_last=last)
        nbytes = shape.rows * shape.row_bytes
        scaled = codec_for(recipe, precision, sample.maps, shape.axis)
        level, encoding = _stored(place, shape, scaled.encode(sample.maps), on_cpu)
        take = partial(_take, scaled if on_cpu else None, recipe.schedule.batch)
        decoding = seconds(partial(_read, level, take), SHORT_SECONDS)
        ratio = nbytes / level.nbytes if profile != "raw" else 1.0
        rates.append(RowRate(profile, precision, encoding, nbytes / decoding, ratio))
        if own:
            gathering = _gathering(level, take)
        tick(1)
    return rates, gathering


def _gathering(level: Level, take: Callable[[Delivery], None]) -> dict[str, Any]:
    nbytes, rates = level.geometry.rows * level.geometry.row_bytes, dict[int, float]()
    cores = hardware.cores()
    for threads in sorted({min(2**n, max(1, cores - 1)) for n in range(cores.bit_length())}):
        with Delivery([level], replace(HELD, threads=threads)) as delivery:
            take(delivery)
            rates[threads] = nbytes / seconds(partial(take, delivery))
    enough = NEARLY * max(rates.values())
    threads = next(n for n, rate in rates.items() if rate >= enough)
    return {"gather": rates[threads], "gatherers": threads}


def _stored(place: Path, shape: Geometry, codes: Tensor, on_cpu: bool) -> tuple[Level, float]:
    """A level of codes, repeated to fill it, and bytes per second of getting its shard ready for
    the disk, by as many threads as there are publishers."""
    repeated = codes[torch.arange(shape.rows) % len(codes)]
    computed = repeated.movedim(shape.axis, -1).contiguous()

    def laid_out() -> np.ndarray:
        rows = np.empty((shape.rows, *shape.lying), shape.dtype)
        torch.from_numpy(rows).copy_(computed)
        return rows

    rows = laid_out()
    level = _put(place, shape, [np.moveaxis(rows, -1, shape.axis)])

    def publish(_: int) -> None:
        shard = laid_out() if on_cpu else rows
        receipt_of(shape, 0, encode(shape, shard), shard)

    def by_publishers() -> None:
        with ThreadPoolExecutor(PUBLISHERS) as pool:
            list(pool.map(publish, range(PUBLISHERS)))

    return level, PUBLISHERS * rows.nbytes / seconds(by_publishers, SHORT_SECONDS)


def _read(level: Level, take: Callable[[Delivery], None]) -> None:
    """Take all rows for the first time: opened, mapped or decoded, and checked."""
    with Delivery([level], HELD) as delivery:
        take(delivery)


def _take(codec: Codec | None, batch: int, delivery: Delivery) -> None:
    """Take all rows in batches, in a shuffled order.

    Args:
        codec: makes floats of them; None: it is not done here.
    """
    shape = delivery.geometry
    order = np.random.default_rng(0).permutation(shape.rows)
    order, lengths = batches(order, batch, drop_last=False)
    for rows in delivery.batches(Rows.of(order), lengths):
        if codec is not None:
            codec.decode(rows, shape.features)


# ---- levels -------------------------------------------------------------------------------------


def _put(place: Path, shape: Geometry, shards: list[np.ndarray], depth: int = 1) -> Level:
    """Write a whole level with labels."""
    intent = {"calibration": [shape.profile, shape.precision, shape.rows]}
    key = LevelKey(depth, fingerprint(intent), "train", "clean")
    writer = LevelWriter(place, key, shape, [intent])
    with writer.locked():
        writer.fill(zip(writer.missing(), shards, strict=True))
        names = ("label", "sample_id")
        return writer.commit(None, dict.fromkeys(names, np.zeros(shape.rows, np.int64)))


def publishing(place: Path) -> dict[str, float]:
    """Seconds of a shard and of a level that hold next to nothing."""
    found: dict[int, list[float]] = {1: [], SMALL_SHARDS: []}
    for depth, shards in product(range(1, 1 + REPETITIONS), found):
        begun, shape = time.perf_counter(), Geometry(shards, (1, 1, 1), "uint8", 1, 1)
        _put(place, shape, [np.zeros((1, 1, 1, 1), np.uint8)] * shards, depth)
        found[shards].append(time.perf_counter() - begun)
    one, many = map(statistics.median, found.values())
    shard = max(1e-6, (many - one) / (SMALL_SHARDS - 1))
    return {"publish_shard": shard, "publish_level": max(1e-6, one - shard)}


# ---- images -------------------------------------------------------------------------------------


def decode_jpeg(recipe: Recipe, images: np.ndarray, place: Path) -> float | None:
    """Bytes of images decoded from JPEG by ffcv per second; None where the recipe has none, or ffcv
    cannot be had."""
    if not recipe.data.jpeg:
        return None
    with suppress(LoaderError):
        beton.ffcv()
        images = images[:JPEG_IMAGES]
        shape = geometry(len(images), images.shape[1:], "uint8", images.nbytes)
        level, path = _put(place, shape, [images], 0), place / "images.beton"
        write_images(path, level, recipe.data.jpeg)
        by_ffcv = ReadOptions(torch.device("cpu"), loader="ffcv")
        with Delivery([level], by_ffcv, beton=path) as delivery:
            asked = Rows.of(np.arange(len(images))), [len(images)]
            return images.nbytes / seconds(lambda: list(delivery.batches(*asked)))
    return None
