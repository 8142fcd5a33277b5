"""Levels for the tests of everything that reads rows, and what those rows are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from small_levels import drawn, samples

from strata.store.fingerprint import fingerprint
from strata.store.level.codec import channels_last
from strata.store.level.layout import PRECISIONS, Geometry, LevelKey
from strata.store.level.level import Level
from strata.store.read.descriptors import ReadRows
from strata.store.read.mapped import MappedRows
from strata.store.read.packed import LoadedRows
from strata.store.read.pool import Pool
from strata.store.read.rows import Rows, RowSource, TakenRows
from strata.store.write.writer import LevelWriter

RAW = {"mapped": MappedRows, "read": ReadRows, "taken": TakenRows}
PACKED = {
    "pool": Pool,
    "pool through maps": lambda levels: Pool(levels, mapped=True),
    "loaded": lambda levels: LoadedRows(levels, 2),
    "taken": TakenRows,
}


def written(
    root: Path,
    shape: Geometry,
    rows: np.ndarray,
    *,
    depth: int = 1,
    view: str = "v0",
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Level:
    """A committed level of these rows."""
    intent = {"depth": depth}
    writer = LevelWriter(root, LevelKey(depth, fingerprint(intent), "train", view), shape, [intent])
    writer.begin()
    for shard in range(shape.shards):
        writer.put(shard, rows[slice(*shape.shard_range(shard))])
    return writer.commit(None, arrays or {})


def views(root: Path, shape: Geometry, count: int = 2) -> list[Level]:
    """Levels of random rows: views of one x_1."""
    return [written(root, shape, drawn(shape, v), view=f"v{v}") for v in range(count)]


@st.composite
def geometries(draw: st.DrawFn, profiles: Sequence[str] = ("raw", "zstd", "lz4")) -> Geometry:
    """Small ones, with ragged ends and rows of an odd number of bytes among them."""
    rows, chunk, chunks = (draw(st.integers(1, most)) for most in (40, 5, 3))
    sample, last = draw(samples())
    name, profile = draw(st.sampled_from(sorted(PRECISIONS))), draw(st.sampled_from(profiles))
    return Geometry(rows, sample, name, chunk, chunk * chunks, profile, last)


def numbered(shape: Geometry, numbers: np.ndarray | Sequence[int]) -> Rows:
    """Rows of some views by their number in :func:`whole`."""
    return Rows(*np.divmod(np.asarray(numbers, np.int64), shape.rows))


def divided(shape: Geometry, parts: Sequence[np.ndarray]) -> tuple[Rows, list[int]]:
    """Parts of such numbers as rows, one part after another, and their lengths."""
    flat = np.concatenate([*parts, np.empty(0, np.int64)])
    return numbered(shape, flat), [len(part) for part in parts]


def whole(shape: Geometry, count: int) -> np.ndarray:
    """Every row of every view by its number, as bytes: uint8 (count · rows, bytes of a row)."""
    rows = np.concatenate([drawn(shape, view) for view in range(count)])
    return channels_last(rows, shape.axis).reshape(count * shape.rows, -1).view(np.uint8)


@contextmanager
def opened(kind: str, levels: Sequence[Level]) -> Iterator[RowSource]:
    kinds = RAW if levels[0].geometry.profile == "raw" else PACKED
    rows = kinds[kind](levels)
    try:
        yield rows
    finally:
        rows.close()


def kinds_of(shape: Geometry) -> list[str]:
    return sorted(RAW if shape.profile == "raw" else PACKED)


def stored(levels: list[Level], numbers: np.ndarray) -> np.ndarray:
    """Rows by global number as they lie, (n, …, feature), by Level.take."""
    whole = np.concatenate([level.read(0, len(level)) for level in levels])
    return channels_last(whole[numbers], levels[0].geometry.axis)


def equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """To the bit: a NaN is equal to itself."""
    same_form = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same_form and ours.tobytes() == theirs.tobytes()
