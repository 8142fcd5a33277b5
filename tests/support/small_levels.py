"""A level of eleven rows on disk, written, read as files, and damaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey
from strata.store.level.level import Level
from strata.store.write.writer import LevelWriter

INTENT = {"recipe": "a lineage", "depth": 3}


KEY = LevelKey(3, fingerprint(INTENT), "train", "v0")


SMALL = Geometry(11, (2, 3, 2), "float32", chunk_rows=2, shard_rows=4)  # the last shard is short


SHAPES = {
    "map": SMALL,
    "vector": replace(SMALL, sample=(5,)),
    "series": replace(SMALL, sample=(3, 5)),
    "tokens": replace(SMALL, sample=(5, 3), features_last=True),
    "grid of tokens": replace(SMALL, sample=(3, 2, 5), features_last=True),
    "volume": replace(SMALL, sample=(3, 2, 1, 4)),
    "volume of tokens": replace(SMALL, sample=(2, 1, 4, 3), features_last=True),
}
"""The same level of samples of every number of axes, with their features first and last."""


@st.composite
def samples(draw: st.DrawFn) -> tuple[tuple[int, ...], bool]:
    """Lengths of one to four axes, and whether features are the last of them."""
    sample = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    return sample, len(sample) > 1 and draw(st.booleans())


def drawn(shape: Geometry, seed: int = 0) -> np.ndarray:
    """Rows of random bits, so that infinities, -0.0 and NaNs with payloads are among them."""
    bits = np.random.default_rng(seed).bytes(shape.rows * shape.row_bytes)
    rows = np.frombuffer(bits, shape.dtype).reshape(-1, *shape.lying)
    return np.moveaxis(rows, -1, shape.axis)


def begin(
    root: Path, shape: Geometry, rows: np.ndarray, shards: Iterable[int] | None = None
) -> LevelWriter:
    """A writer that has put some shards, or all of them."""
    writer = LevelWriter(root, KEY, shape, [INTENT])
    writer.begin()
    for shard in range(shape.shards) if shards is None else shards:
        writer.put(shard, rows[slice(*shape.shard_range(shard))])
    return writer


def written(root: Path, shape: Geometry = SMALL, rows: np.ndarray | None = None) -> Level:
    labels = np.arange(shape.rows) % 3
    return begin(root, shape, drawn(shape) if rows is None else rows).commit(
        None, {"label": labels}
    )


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def flip(path: Path, offset: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def chop(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])
