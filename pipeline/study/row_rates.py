"""Rates of rows: stored, read, published, and decoded from JPEG, by the code that does it in a run.

Rows are maps of one sample, stored in every profile and precision, so that a plan can say what
another recipe would cost. Each is a small level in the store, which is gone afterwards.

The sample is x_1 of the run's own images: what packs well is zeros and what is alike, so noise
says little of features. Layer 1 is used as it was solved, or else as it will begin.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.delivery import Delivery
from strata.pipeline.feed.features import read_layer
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.write import write_images
from strata.pipeline.plan.caching import FEATURES
from strata.pipeline.plan.costs import PROFILES
from strata.pipeline.plan.machine import RowRate
from strata.pipeline.plan.worth import PRECISIONS
from strata.pipeline.progress import Tick
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.device import ReadOptions
from strata.pipeline.run.levels import have_images
from strata.pipeline.run.overview import Overview
from strata.stages.data import augment
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Codec, codec, needs_scales
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
"""Least length of one repetition; the work is done over and over until then."""
SHORT_SECONDS = 0.05
"""Least length of a repetition of what is measured in many forms."""
SAMPLE_BYTES = 16 << 20
"""Size of the sample, as float32 maps."""
ROW_BYTES = 16 << 20
"""Most bytes of stored rows, in every form …"""
OWN_BYTES = 64 << 20
"""… and in the recipe's own precision, raw: more than the caches of a processor hold."""
BATCHES = 32
"""Most batches that are measured; small rows cost by the batch."""
SMALL_SHARDS = 9
JPEG_IMAGES = 512
FORWARD_ROWS = 256


def seconds(work: Callable[[], object], least: float = LEAST_SECONDS) -> float:
    """Seconds of one call: the median over repetitions, each of as many calls as make it long
    enough. What takes long by itself is done once more, and that is enough."""
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


# ---- the sample ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Some of a run's images, and their features."""

    images: np.ndarray
    """x_0: uint8 (n, channel, y, x); noise where there are no images yet."""
    maps: Tensor
    """x_1: float32 (n, channel, y, x), channels last; whole canvases where these are cached."""
    what: str
    """What they are, for people."""


def sample_of(found: Overview) -> Sample:
    """Images and maps of a run, as many as are worth measuring."""
    recipe, data = found.recipe, found.recipe.data
    count = max(64, SAMPLE_BYTES // (4 * int(np.prod(_shape(recipe)))))
    images, what = _images(found, count), FEATURES
    if images is None:
        shape = (min(count, 4 * FORWARD_ROWS), data.channels, data.size, data.size)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        what = "noise: there are no images yet"
    x = augment.pad(torch.from_numpy(images), recipe.augment.pad)
    if augmentation.mode(recipe) != "canvas":
        begin, end = recipe.centre, recipe.centre + recipe.augment.crop
        x = x[..., begin:end, begin:end]
    x, layer = augment.normalise(x, data.mean, data.std), _layer(found)
    with torch.no_grad():
        maps = torch.cat([layer(part) for part in x.split(FORWARD_ROWS)])
    return Sample(images, maps.contiguous(memory_format=torch.channels_last), what)


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.shape(1, augmentation.cached_size(recipe))


def _images(found: Overview, most: int) -> np.ndarray | None:
    if found.run is None or not have_images(found.run, found.store):
        return None
    key = LevelKey(0, found.run.nodes()[0].fingerprint, "train", "clean")
    level = found.store.open(key)
    return level.read(0, min(len(level), most))


def _layer(found: Overview) -> nn.Module:
    """Layer 1 in eval mode if it is solved; else as it begins, its statistics those of a batch."""
    spec, run = found.recipe.layers[0], found.run
    if run and run.solved() and (record := run.layer(1)):
        path = run.layer_directory(1) / "weights.safetensors"
        return read_layer(spec, path, record["weights"], torch.device("cpu"))
    return build([spec], 0)[0].train()


def codec_for(recipe: Recipe, precision: str, maps: Tensor) -> Codec:
    """The codec of a precision, with scales chosen on the given maps where it needs any."""
    scales = {}
    if needs_scales(precision):
        found = calibrate(iter([maps[:FORWARD_ROWS]]), precision, recipe.cache.percentile)
        scales = found.quantiser.tensors()
    return codec(precision, scales)


# ---- rows in every form -------------------------------------------------------------------------


def forms(recipe: Recipe) -> list[tuple[str, str]]:
    """Profile and precision of all that is measured, the recipe's own precision among them."""
    precisions = dict.fromkeys((recipe.cache.precision, *PRECISIONS))
    return [(profile, precision) for precision in precisions for profile in PROFILES]


def measure(
    recipe: Recipe, sample: Sample, place: Path, device: torch.device, tick: Tick
) -> tuple[list[RowRate], float]:
    """Rates of every form, and bytes per second of gathering rows that were read before.

    Args:
        device: a CPU also lays rows out, and makes floats of them.
    """
    rates, gather, on_cpu = [], 0.0, device.type == "cpu"
    for profile, precision in forms(recipe):
        own = (profile, precision) == ("raw", recipe.cache.precision)
        shape = _geometry(recipe, profile, precision, OWN_BYTES if own else ROW_BYTES)
        nbytes, scaled = shape.rows * shape.row_bytes, codec_for(recipe, precision, sample.maps)
        level, encoding = _stored(place, shape, scaled.encode(sample.maps), on_cpu)
        take = partial(_take, scaled if on_cpu else None, recipe.schedule.batch)
        decoding = seconds(partial(_read, level, take), SHORT_SECONDS)
        ratio = nbytes / level.nbytes if profile != "raw" else 1.0
        rates.append(RowRate(profile, precision, encoding, nbytes / decoding, ratio))
        if own:
            with _delivery(level) as delivery:
                take(delivery)
                gather = nbytes / seconds(partial(take, delivery))
        tick(1)
    return rates, gather


def _geometry(recipe: Recipe, profile: str, precision: str, nbytes: int) -> Geometry:
    """One shard of x_1, or less where rows are small."""
    rows = geometry(10**9, _shape(recipe), precision, nbytes, profile).shard_rows
    rows = min(rows, BATCHES * recipe.schedule.batch)
    return geometry(rows, _shape(recipe), precision, nbytes, profile)


def _stored(place: Path, shape: Geometry, codes: Tensor, on_cpu: bool) -> tuple[Level, float]:
    """A level of codes, repeated to fill it, and bytes per second of getting its shard ready for
    the disk, by as many threads as there are publishers."""
    repeated = codes[torch.arange(shape.rows) % len(codes)]
    computed = repeated.contiguous(memory_format=torch.channels_last)
    rows = _laid_out(shape, computed)
    writer = _writer(place, shape)
    level = put(writer, [rows])

    def publish(_: int) -> None:
        shard = _laid_out(shape, computed) if on_cpu else rows
        receipt_of(shape, 0, encode(shape, shard), shard)

    def by_publishers() -> None:
        with ThreadPoolExecutor(PUBLISHERS) as pool:
            list(pool.map(publish, range(PUBLISHERS)))

    return level, PUBLISHERS * rows.nbytes / seconds(by_publishers, SHORT_SECONDS)


def _laid_out(shape: Geometry, computed: Tensor) -> np.ndarray:
    rows = np.empty((shape.rows, *shape.stored), shape.dtype)
    torch.from_numpy(rows).copy_(computed)
    return rows


def _delivery(level: Level) -> Delivery:
    return Delivery([level], ReadOptions(torch.device("cpu"), tier="memory"))


def _read(level: Level, take: Callable[[Delivery], None]) -> None:
    """Take all rows for the first time: opened, mapped or decoded, and checked."""
    with _delivery(level) as delivery:
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
            codec.decode(rows, shape.sample[2])


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
    one, many = _small_level(place, 1), _small_level(place, SMALL_SHARDS)
    shard = max(1e-6, (many - one) / (SMALL_SHARDS - 1))
    return {"publish_shard": shard, "publish_level": max(1e-6, one - shard)}


def _small_level(place: Path, shards: int) -> float:
    """Seconds to write a level of so many rows of one byte, each a shard: the median of several."""
    found = []
    for depth in range(1, 1 + REPETITIONS):
        writer = _writer(place, Geometry(shards, (1, 1, 1), "uint8", 1, 1), depth)
        begun = time.perf_counter()
        put(writer, [np.zeros((1, 1, 1, 1), np.uint8)] * shards)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


# ---- images -------------------------------------------------------------------------------------


def decode_jpeg(recipe: Recipe, images: np.ndarray, place: Path) -> float | None:
    """Bytes of images decoded from JPEG by ffcv per second; None where the recipe has none, or ffcv
    cannot be had."""
    if not recipe.data.jpeg:
        return None
    with suppress(LoaderError):
        beton.ffcv()
        images = images[:JPEG_IMAGES]
        shape = geometry(len(images), images.shape[1:], "uint8", OWN_BYTES)
        shards = [slice(*shape.shard_range(shard)) for shard in range(shape.shards)]
        labels = np.zeros(len(images), np.int64)
        level = put(_writer(place, shape, 0), [images[s] for s in shards], {"labels": labels})
        path = place / "images.beton"
        write_images(path, level, recipe.data.jpeg)
        by_ffcv = ReadOptions(torch.device("cpu"), loader="ffcv")
        with Delivery([level], by_ffcv, beton=path) as delivery:
            asked = Rows.of(np.arange(len(images))), [len(images)]
            return images.nbytes / seconds(lambda: list(delivery.batches(*asked)))
    return None
