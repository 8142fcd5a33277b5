"""Levels for the tests of everything that reads rows, and what those rows are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ffcv_levels import drawn, written
from hypothesis import strategies as st

from strata.store.level.layout import Geometry
from strata.store.level.level import Level
from strata.store.precision import PRECISIONS
from strata.store.read.pool import Pool
from strata.store.read.rows import LoadedRows, MappedRows, ReadRows, Rows, TakenRows

RAW = {"mapped": MappedRows, "read": ReadRows, "taken": TakenRows}
PACKED = {
    "pool": Pool,
    "pool through maps": lambda levels: Pool(levels, mapped=True),
    "loaded": lambda levels: LoadedRows(levels, 2),
    "taken": TakenRows,
}


@st.composite
def geometries(draw: st.DrawFn, profiles: Sequence[str] = ("raw", "zstd", "lz4")) -> Geometry:
    """Small ones, with ragged ends and rows of an odd number of bytes among them."""
    rows, chunk, chunks = (draw(st.integers(1, most)) for most in (40, 5, 3))
    sample = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
    name, profile = draw(st.sampled_from(sorted(PRECISIONS))), draw(st.sampled_from(profiles))
    return Geometry(rows, sample, name, chunk, chunk * chunks, profile)


def views(root: Path, shape: Geometry, count: int) -> list[Level]:
    return [written(root, shape, drawn(shape, v), view=f"v{v}") for v in range(count)]


def whole(shape: Geometry, count: int) -> np.ndarray:
    """Every row of every view by its number, as bytes: uint8 (count · rows, bytes of a row)."""
    rows = np.concatenate([drawn(shape, view) for view in range(count)])
    return rows.reshape(count * shape.rows, -1).view(np.uint8)


@contextmanager
def opened(kind: str, levels: Sequence[Level]) -> Iterator[Rows]:
    kinds = RAW if levels[0].geometry.profile == "raw" else PACKED
    rows = kinds[kind](levels)
    try:
        yield rows
    finally:
        rows.close()


def kinds_of(shape: Geometry) -> list[str]:
    return sorted(RAW if shape.profile == "raw" else PACKED)
