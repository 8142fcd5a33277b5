"""Levels for the tests of the optional ffcv, and when those are skipped."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from root import PYTHONPATH
from rows_of import written

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv.beton import ffcv
from strata.store.level.layout import Geometry
from strata.store.level.level import Level

NEEDS_FFCV = [
    pytest.mark.ffcv,
    pytest.mark.skipif(find_spec("ffcv") is None, reason="ffcv is not installed (make ffcv)"),
]


def skip_unless_it_imports() -> None:
    try:
        ffcv()
    except LoaderError as error:
        pytest.skip(f"ffcv is installed, but: {error}")


def smooth_images(rows: int, channels: int, size: int) -> np.ndarray:
    """uint8 (rows, channel, y, x) such as a JPEG is made for: slow waves, all different."""
    draws = np.random.default_rng(0).uniform(0.5, 2.0, (3, rows, channels, 1, 1))
    y, x = np.mgrid[:size, :size] / size * 2 * np.pi
    waves = np.sin(draws[0] * x + draws[1] * y + draws[2])
    return (127.5 + 120 * waves).astype(np.uint8)


def images(root: Path, rows: int, channels: int, size: int) -> Level:
    """x_0 of smooth images, in several shards."""
    shape = Geometry(rows, (channels, size, size), "uint8", chunk_rows=16, shard_rows=64)
    labels = np.arange(rows, dtype=np.int64) % 10
    arrays = {"label": labels, "sample_id": np.arange(rows)[::-1].copy()}
    pixels = smooth_images(rows, channels, size)
    return written(root, shape, pixels, depth=0, view="clean", arrays=arrays)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some code in a process of its own, with our modules."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": PYTHONPATH, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
