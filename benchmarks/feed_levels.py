"""Levels to measure a feed on: features of real images, written by the real writer.

CIFAR-10 images go through a seeded convolution, batch norm with statistics of these images, and
ReLU: half of the values are 0, as in a trained network, and zstd-1 packs them to about half (random
bytes would not pack at all, smooth ones too well). A row has the same number of bytes in both
precisions, so float16 has half the channels. A map larger than an image is of a mosaic of images,
as one enlarged would be smoother than any real one. No more than 256 MB of rows are computed; a
larger level repeats them, which no chunk and no cache is large enough to notice.

The same rows can be had as a flat file, and as a .beton for ffcv.

    python benchmarks/feed_levels.py STORE [--data cifar10.tar.xz] [--bytes 300000000]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkout  # noqa: F401
from strata.stages.data.images import square
from strata.stages.data.opening import open_source
from strata.stages.data.values import plain
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Codec, Floats
from strata.stages.network.featurize import run_layer
from strata.stages.network.network import Layer, build
from strata.stages.network.spec import LayerSpec
from strata.store.errors import LevelAbsent
from strata.store.fingerprint import fingerprint, sha256
from strata.store.level.codec import channels_last
from strata.store.level.layout import LevelKey, geometry
from strata.store.level.level import Level
from strata.store.write.writer import LevelWriter

MAPS = {"2KB": (32, 8), "32KB": (32, 32), "128KB": (128, 32), "1.6MB": (128, 112)}
"""Channels and side of the uint8 map of a row; the last is the first layer's on ImageNet."""
PRECISIONS, PROFILES = ("uint8", "float16"), ("raw", "zstd", "lz4")
SIZE, IMAGES = 32, 50_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
COMPUTED = 256_000_000
"""Bytes of rows that are computed."""
SAMPLE, PERCENTILE = 256, 99.9
"""Rows that batch norm's statistics and the codes' scales are taken from, and how these are."""
BLOCK_PIXELS = 32 * 1024
"""Of all maps of a forward pass."""
SHARD_BYTES = 64 << 20


def load_images(data: Path | None, count: int = IMAGES, seed: int = 0) -> np.ndarray:
    """uint8 (n, 3, 32, 32): training images, shuffled.

    Args:
        data: CIFAR-10, a directory or tar of class folders; None draws smooth noise instead.
    """
    if data is None:
        return smooth_noise(min(count, 10_000), seed)
    with open_source(f"imagefolder:{data}", root=Path()) as source:
        order = np.random.default_rng(seed).permutation(source.count("train"))[:count]
        in_order = np.stack(
            [square(plain(source.image("train", int(i)))[0], SIZE, 3) for i in np.sort(order)]
        )
    return in_order[np.argsort(np.argsort(order))]


def smooth_noise(count: int, seed: int) -> np.ndarray:
    """Noise at four scales, the coarse ones strongest, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, SIZE, SIZE)
    for side in (4, 8, 16, 32):
        noise = torch.randn(count, 3, side, side, generator=generator) * 4 / side
        total += torch.nn.functional.interpolate(noise, SIZE, mode="bilinear")
    return (total * 64 + 128).clamp(0, 255).to(torch.uint8).numpy()


@dataclass(frozen=True, eq=False)
class Features:
    """Stored rows of one size and precision, to be repeated."""

    precision: str
    rows: np.ndarray
    """(n, channel, y, x) of stored elements."""

    def shard(self, begin: int, end: int) -> np.ndarray:
        """Rows begin … end-1 of any number."""
        return self.rows[np.arange(begin, end) % len(self.rows)]


def features(
    images: np.ndarray, row: str, precision: str, seed: int = 0, *, as_many_values: bool = False
) -> Features:
    """The first layer's features of these images.

    Args:
        row: size of a row, a key of ``MAPS``.
        precision: ``uint8`` or ``float16``.
        as_many_values: as a row of uint8 has, and not as many bytes.
    """
    channels, side = MAPS[row]
    width = channels if precision == "uint8" or as_many_values else channels // 2
    stem = max(0, int(math.log2(SIZE / side)))
    count = COMPUTED // (channels * side**2)
    blocks = range(0, count, max(1, BLOCK_PIXELS // side**2))

    def inputs(begin: int) -> Tensor:
        return _inputs(images, side, begin, min(begin + blocks.step, count))

    sample = [begin for begin in blocks if begin < SAMPLE]
    layer = _settled(LayerSpec(1, 3, width, stem, True, False), map(inputs, sample), seed)
    codec = _codec(precision, (_outputs(layer, inputs(begin)) for begin in sample))
    parts = [codec.encode(_outputs(layer, inputs(begin))).numpy() for begin in blocks]
    return Features(precision, np.concatenate(parts))


def _inputs(images: np.ndarray, side: int, begin: int, end: int) -> Tensor:
    """Normalised images, or mosaics of as many of them as a map of this side needs."""
    tiles = -(-side // SIZE)
    numbers = np.arange(begin * tiles**2, end * tiles**2) % len(images)
    grid = images[numbers].reshape(end - begin, tiles, tiles, 3, SIZE, SIZE)
    mosaic = grid.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, tiles * SIZE, tiles * SIZE)
    cut = max(SIZE, side)
    x = torch.from_numpy(mosaic[:, :, :cut, :cut].astype(np.float32)) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _settled(spec: LayerSpec, inputs: Iterator[Tensor], seed: int) -> Layer:
    """A layer of seeded weights whose batch norm has seen its inputs, in eval mode."""
    layer = build([spec], seed)[0]
    assert isinstance(layer, Layer)
    assert isinstance(layer.norm, torch.nn.BatchNorm2d)
    layer.norm.momentum = None  # the mean over the batches, not a moving one
    with torch.no_grad():
        for x in inputs:
            layer(x)
    return layer.eval()


@torch.no_grad()
def _outputs(layer: Layer, x: Tensor) -> Tensor:
    return run_layer(layer, x, torch.float32).contiguous()


def _codec(precision: str, sample: Iterator[Tensor]) -> Codec:
    if precision == "float16":
        return Floats(precision)
    return calibrate(sample, precision, PERCENTILE).quantiser


def make_level(root: Path, source: Features, profile: str, nbytes: int) -> Level:
    """A committed level of about ``nbytes`` before compression; one that is there is opened."""
    sample = source.rows.shape[1:]
    rows = max(1, nbytes // source.rows[0].nbytes)
    shape = geometry(rows, sample, source.precision, SHARD_BYTES, profile)
    content = sha256(source.rows.data.cast("B"))
    lineage = [
        {"depth": 1, "of": "a benchmark", "rows": rows, "profile": profile, "sha256": content}
    ]
    key = LevelKey(1, fingerprint(lineage[0]), "train", "v0")
    try:
        return Level.open(root, key)
    except LevelAbsent:
        return write_level(LevelWriter(root, key, shape, lineage), source.shard)


def write_level(writer: LevelWriter, rows: Callable[[int, int], np.ndarray]) -> Level:
    """A committed level of ``rows(begin, end)``, as stored."""
    with writer.locked():
        missing = writer.missing()
        writer.fill((shard, rows(*writer.geometry.shard_range(shard))) for shard in missing)
        return writer.commit(None, {"sample_id": np.arange(writer.geometry.rows)})


def compression(level: Level) -> float:
    """Bytes of the rows over bytes of the shards."""
    return level.geometry.rows * level.geometry.row_bytes / level.nbytes


# ---- the same rows for others -------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """A file of nothing but the rows of a level."""

    path: Path
    rows: int
    sample: tuple[int, ...]
    dtype: str
    """``uint8``, or ``int16`` for the bits of a float16, which numba does not know."""

    def map(self) -> np.memmap:
        return np.memmap(self.path, self.dtype, "r", shape=(self.rows, *self.sample))


def write_flat(level: Level, path: Path) -> Flat:
    """Copy the rows of a level, of any profile, into one file."""
    shape = level.geometry
    with path.open("wb") as file:
        for shard in range(shape.shards):
            file.write(channels_last(level.read(*shape.shard_range(shard))).data)
        os.fsync(file.fileno())
    return Flat(path, shape.rows, shape.lying, "uint8" if shape.dtype.itemsize == 1 else "int16")


def write_beton(flat: Flat, path: Path, page: int = 8 << 20, timeout: float = 900.0) -> None:
    """The same rows as a .beton, by a process of its own: ffcv's writer may hang."""
    writer = multiprocessing.get_context("spawn").Process(
        target=_write_beton, args=(flat, path, page)
    )
    writer.start()
    writer.join(timeout)
    if writer.exitcode != 0:
        os.killpg(writer.pid or 0, signal.SIGKILL)  # with the processes that it started
        raise SystemExit(f"ffcv's writer ended with {writer.exitcode} (None: it hung)")


class _Samples:
    """Rows as ffcv's writer wants them: indexed, a tuple of fields each."""

    def __init__(self, flat: Flat) -> None:
        self.rows = flat.map().view(np.ndarray)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[np.ndarray]:
        return (self.rows[row],)


def _write_beton(flat: Flat, path: Path, page: int) -> None:
    os.setsid()
    # A spawned process would spawn its own, too, and send each of them all rows.
    multiprocessing.set_start_method("fork", force=True)
    from ffcv import writer
    from ffcv.fields import NDArrayField

    writer.tqdm = partial(writer.tqdm, disable=True)
    fields = {"x": NDArrayField(np.dtype(flat.dtype), flat.sample)}
    workers = len(os.sched_getaffinity(0))
    writer.DatasetWriter(str(path), fields, page, workers).from_indexed_dataset(_Samples(flat))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("store", type=Path)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as class folders; default: noise")
    parser.add_argument("--bytes", type=int, default=300_000_000, help="of each level, unpacked")
    options = parser.parse_args()
    images = load_images(options.data)
    for row in MAPS:
        for precision in PRECISIONS:
            source = features(images, row, precision)
            zeros = 1 - np.count_nonzero(source.rows) / source.rows.size
            for profile in PROFILES:
                begun = time.monotonic()
                level = make_level(options.store, source, profile, options.bytes)
                facts = f"{len(level):,} rows, {zeros:.0%} zeros, ratio {compression(level):.2f}"
                seconds = time.monotonic() - begun
                print(f"{row} {precision} {profile}: {facts}, {seconds:.1f} s, {level.directory}")


if __name__ == "__main__":
    main()
