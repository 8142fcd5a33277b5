"""Writing a level takes the memory of a few shards, whatever the number of images."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import open_run, tiny

from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.progress import Reporter, Tick
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm

PROC = Path("/proc/self/status")
SHARD = 4 << 20


class Watching(Reporter):
    """Notes the anonymous memory of the process at every tick."""

    def __init__(self) -> None:
        self.peak = 0

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Tick]:
        def tick(done: int, note: str = "") -> None:
            self.peak = max(self.peak, anonymous_bytes())

        yield tick


def anonymous_bytes() -> int:
    line = next(ln for ln in PROC.read_text().splitlines() if ln.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def session_on(place: Path, images: int) -> Session:
    rng = np.random.default_rng(0)
    place.mkdir()
    data = place / "data.npz"
    arrays = {
        f"{name}_{split}": values
        for split, n in (("train", images), ("test", 100))
        for name, values in (
            ("x", rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)),
            ("y", np.arange(n) % 10),
        )
    }
    np.savez(data, allow_pickle=False, **arrays)
    text = tiny(epochs=1, layers=1, downsample="[]").replace('"digits"', f'"npz:{data}"')
    text = text.replace("train = 1437", f"train = {images}").replace("test = 360", "test = 100")
    text = text.replace("width = 8", "width = 32").replace("shard_mb = 1", "shard_mb = 4")
    return open_run(place, text)


@pytest.mark.skipif(not PROC.exists(), reason="needs /proc")
@pytest.mark.slow
def test_writing_eight_times_the_images_takes_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for images in (2_000, 16_000):
        session = session_on(tmp_path / str(images), images)
        algorithm.make(session, solve=1)
        gc.collect()
        before, watching = anonymous_bytes(), Watching()
        materialize(replace(session, report=watching), 1)
        level = session.store.open(session.key(1, "train", "plain"))
        assert level.geometry.shards > 3
        peaks.append(watching.peak - before)
    written = level.geometry.nbytes
    assert written > 120e6
    assert peaks[1] < peaks[0] + 6 * SHARD
    assert peaks[1] < written / 2
