"""Names on disk. A level is named by what made it, so runs that agree up to a depth share it.

STORE/x_3-9f3c1a72be04/intent.json
                       train.v0/  zarr.json  x/c.0.0.0.0 …  receipts/000000.json …  COMMIT.json
                       test/      …
      locks/x_3-9f3c1a72be04.lock
      runs/       who refers to what
      quarantine/ what verify --repair set aside
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

ZARR = "zarr.json"
VALUES = "x"
"""The array of a level's group that holds its rows, and the directory of its shards."""
BEGUN = f"{VALUES}/{ZARR}"
"""The metadata of that array, with which a level is begun."""
CHUNK_BYTES = 1 << 20
"""Aim for an inner chunk: below about 1 MiB, readers pay more per chunk than per byte."""
AXES = (
    ("feature",),
    ("channel", "time"),
    ("channel", "height", "width"),
    ("channel", "depth", "height", "width"),
)
"""Names of the axes of a sample of one to four. None is ``x``: xarray takes an array named like a
dimension for its coordinate."""
FEATURES_LAST = (
    ("feature",),
    ("token", "feature"),
    ("height", "width", "channel"),
    ("depth", "height", "width", "channel"),
)
"""The same where the features of a place are the last axis, as transformers have them."""


@dataclass(frozen=True)
class Precision:
    """How values lie on disk. The store keeps codes and knows nothing of what they mean;
    ``stages/features/quantise.py`` makes and undoes them."""

    name: str
    """What recipes and commits call it."""
    dtype: np.dtype
    """The stored dtype, little-endian."""
    poison: float
    """Fill value: what a missing shard reads as, never what a whole written row holds."""
    packed: int = 1
    """Neighbouring features that share one stored element, the first in its lowest bits."""


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32", np.dtype("<f4"), float("nan")),
        Precision("float16", np.dtype("<f2"), float("nan")),
        # The bits of a bfloat16, which Zarr has no name for; the poison is a NaN of its own.
        Precision("bfloat16", np.dtype("<u2"), 0xFFC1),
        # Features use the codes 0 … 254. Images use all 256, so 255 is loud (a white row) but not
        # impossible; our own reader never meets a hole, because it opens levels by their commit.
        Precision("uint8", np.dtype("u1"), 255),
        # Two codes of 0 … 14 in a byte.
        Precision("uint4", np.dtype("u1"), 255, packed=2),
        # Of x_0 alone: what is counted, such as tokens of a text. It has no codes.
        Precision("int32", np.dtype("<i4"), -(2**31)),
        # Of x_0 alone, too: all 65,536 values, as images use all 256.
        Precision("uint16", np.dtype("<u2"), 65535),
    )
}


def precision(name: str) -> Precision:
    """Look a precision up by name; ``KeyError`` lists the known ones."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise KeyError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}") from None


@dataclass(frozen=True)
class LevelKey:
    """Which level: (x_depth, split, view) of one lineage."""

    depth: int
    fingerprint: str
    """sha256 hex of everything that made x_depth; the directory carries its first 12 digits."""
    split: str
    """``train`` or ``test``."""
    view: str
    """``clean``, ``v0`` …, or in canvas mode ``plain`` and ``flipped``."""

    @property
    def name(self) -> str:
        return self.split if self.view == "clean" else f"{self.split}.{self.view}"

    @property
    def label(self) -> str:
        """What people read: ``x_3 train.v0``."""
        return f"x_{self.depth} {self.name}"

    def directory(self, root: Path) -> Path:
        return depth_directory(root, self.depth, self.fingerprint) / self.name


def axes(sample: Sequence[int], features_last: bool) -> tuple[str, ...]:
    """The names of the axes of a sample. Raises ValueError: it has none, or more than four."""
    if not 1 <= len(sample) <= len(AXES):
        raise ValueError(f"a sample is {tuple(sample)}; it may have 1 to {len(AXES)} axes")
    return (FEATURES_LAST if features_last else AXES)[len(sample) - 1]


def shard_name(shard: int, axes: int = 3) -> str:
    """Zarr's key of a shard of samples with so many axes, with flat keys: one directory to sync,
    not four."""
    return f"c.{shard}{'.0' * axes}"


def depth_directory(root: Path, depth: int, fingerprint: str) -> Path:
    return root / f"x_{depth}-{fingerprint[:12]}"


def lock_path(root: Path, depth: int, fingerprint: str) -> Path:
    """The lock of every level of one x_depth; outside of what it locks, so that can be removed."""
    return root / "locks" / f"{depth_directory(root, depth, fingerprint).name}.lock"


@dataclass(frozen=True)
class Geometry:
    """Shape of a level and of its files. Rows are samples of one to four axes. Readers see maps as
    (row, channel, y, x); on disk and in memory the features of a place lie side by side, which is
    what convolutions read fastest."""

    rows: int
    sample: tuple[int, ...]
    """Lengths of the axes of the values, for example (channel, y, x)."""
    precision: str
    chunk_rows: int
    """Rows in one inner chunk, the unit of decode."""
    shard_rows: int
    """Rows in one shard file, the unit of write and resume; a multiple of ``chunk_rows``."""
    profile: str = "raw"
    """``raw``: uncompressed, rows at a constant stride. ``zstd`` or ``lz4``: packed, every inner
    chunk compressed without shuffle, crc32c last."""
    features_last: bool = False
    """The features of a place are the last axis of a sample, and not its channels, the first."""

    @property
    def dtype(self) -> np.dtype:
        return precision(self.precision).dtype

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of a sample."""
        return axes(self.sample, self.features_last)

    @property
    def axis(self) -> int:
        """Which axis of a batch has the features: 1, or the last, -1."""
        return -1 if self.features_last else 1

    @property
    def feature(self) -> str:
        """Name of the axis of the features."""
        return ("sample", *self.axes)[self.axis]

    @property
    def features(self) -> int:
        """How many channels, or features of a token, there are."""
        return (self.rows, *self.sample)[self.axis]

    @property
    def is_map(self) -> bool:
        """Are samples (channel, y, x)?"""
        return len(self.sample) == 3 and not self.features_last

    @property
    def stored(self) -> tuple[int, ...]:
        """Lengths of the axes of the stored elements: fewer features where several share one."""
        found = [self.rows, *self.sample]
        found[self.axis] = -(-self.features // precision(self.precision).packed)
        return tuple(found[1:])

    @property
    def lying(self) -> tuple[int, ...]:
        """Lengths of these axes in the order in which they lie, for example (y, x, channel)."""
        return self.stored if self.features_last else (*self.stored[1:], self.stored[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before any compression."""
        return prod(self.stored) * self.dtype.itemsize

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard_key(self, shard: int) -> str:
        """Where a shard lies in its level: its file, from the level's directory."""
        return f"{VALUES}/{shard_name(shard, len(self.sample))}"

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row, and one past the last, of a shard."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def rows_in(self, shard: int) -> int:
        """Rows of a shard; the last one may have fewer than the others."""
        first, last = self.shard_range(shard)
        return last - first

    def as_json(self) -> dict[str, Any]:
        """What a commit says: of ``features_last`` only that it is so."""
        return {k: v for k, v in asdict(self).items() if k != "features_last" or v}

    @property
    def nbytes(self) -> int:
        """Bytes of a raw level's shards: whole inner chunks, their index, its checksum. A packed
        level has fewer, but how many is known only once it is written."""
        full, rest = divmod(self.rows, self.shard_rows)
        per_shard = self.shard_rows // self.chunk_rows
        chunks = full * per_shard + -(-rest // self.chunk_rows)
        index = self.shards * (16 * per_shard + 4)
        return chunks * self.chunk_rows * self.row_bytes + index


def geometry(
    rows: int,
    sample: tuple[int, ...],
    precision_name: str,
    shard_bytes: int,
    profile: str = "raw",
    *,
    features_last: bool = False,
) -> Geometry:
    """Choose chunk and shard rows: chunks of about 1 MiB, shards of about ``shard_bytes``."""
    features_last &= len(sample) > 1  # of a vector it would say nothing
    row = Geometry(rows, sample, precision_name, 1, 1, features_last=features_last).row_bytes
    chunk = max(1, min(CHUNK_BYTES // row, shard_bytes // row, rows))
    chunks = max(1, min(shard_bytes // (chunk * row), -(-rows // chunk)))
    return Geometry(rows, sample, precision_name, chunk, chunk * chunks, profile, features_last)
