"""What ffcv does not guard against by itself: hanging, leaking, aborting, stale and torn files."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv_levels import NEEDS_FFCV, images, python, skip_unless_it_imports
from rows_of import equal, numbered, stored, views
from small_levels import drawn
from spoil import flip

from strata.pipeline.errors import LoaderError, exit_code
from strata.pipeline.feed import prefetch
from strata.pipeline.feed.ffcv import beton, write
from strata.pipeline.feed.ffcv.rows import FfcvLevels
from strata.pipeline.feed.prefetch import Reader
from strata.store.errors import DiskFull, LevelBusy, LevelDamaged
from strata.store.files.files import Files
from strata.store.files.lock import hold
from strata.store.level.codec import channels_last
from strata.store.level.layout import Geometry
from strata.store.level.level import Level

SHAPE = Geometry(60, (2, 8, 8), "float16", chunk_rows=2, shard_rows=16)
PARTS = numbered(SHAPE, range(120)), [4] * 30
SOON = 5.0
"""Seconds in which a failure must be heard."""


def needs_ffcv(test: Callable[..., None]) -> Callable[..., None]:
    for mark in NEEDS_FFCV:
        test = mark(test)
    return test


@pytest.fixture
def levels(tmp_path: Path) -> list[Level]:
    return views(tmp_path, SHAPE)


@pytest.fixture
def rows(levels: list[Level]) -> Iterator[Reader]:
    skip_unless_it_imports()
    before = set(threading.enumerate())
    with Reader(FfcvLevels(levels), 2) as found:
        yield found
    assert set(threading.enumerate()) <= before


# ---- without ffcv -------------------------------------------------------------------------------


def test_without_ffcv_everything_imports_and_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, levels: list[Level]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    beton.ffcv.cache_clear()
    try:
        for attempt in (
            beton.ffcv,
            lambda: FfcvLevels(levels),
            lambda: write.write_images(tmp_path / "x.beton", levels[0]),
        ):
            with pytest.raises(LoaderError, match=r"^ffcv cannot be imported \(.*make ffcv") as at:
                attempt()
            assert exit_code(at.value) == 7
    finally:
        beton.ffcv.cache_clear()


def test_importing_ours_does_not_import_ffcv() -> None:
    code = (
        "import sys, strata.pipeline.feed.ffcv.rows as _; print({'ffcv', 'numba'} & {*sys.modules})"
    )
    assert python(code).stdout.strip() == "set()"


# ---- an epoch -----------------------------------------------------------------------------------


@needs_ffcv
def test_a_failure_of_ffcv_is_raised_soon(rows: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise NotImplementedError("float16")

    monkeypatch.setattr(rows._source, "_decode", fails)
    begun = time.monotonic()
    with pytest.raises(LoaderError, match=r"ffcv failed \(NotImplementedError: float16\)"):
        list(rows.batches(*PARTS))
    assert time.monotonic() - begun < SOON


@needs_ffcv
def test_batches_before_a_failure_are_handed_out(
    rows: Reader, levels: list[Level], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(levels[1].directory / "x/c.1.0.0.0", 3)  # row 16 of the second view
    found = []
    monkeypatch.setattr(prefetch, "STRIPE_BYTES", 4 * SHAPE.row_bytes)
    with pytest.raises(LevelDamaged, match="row 16 "):
        found.extend(rows.batches(*PARTS))
    whole = np.concatenate([drawn(SHAPE, 0), drawn(SHAPE, 1)[:16]])
    assert equal(np.concatenate(found), channels_last(whole))


@needs_ffcv
def test_a_shard_that_is_gone_or_cut_is_an_error_before_the_epoch(
    rows: Reader, levels: list[Level]
) -> None:
    """A cut one would end the process if it were touched."""
    assert len(list(rows.batches(*PARTS))) == len(PARTS[1])
    shard = levels[0].directory / "x/c.2.0.0.0"
    whole = shard.read_bytes()
    shard.rename(shard.with_name("aside"))
    with pytest.raises(LevelDamaged, match=r"c\.2\.0\.0\.0 is missing"):
        rows.batches(*PARTS)
    shard.write_bytes(whole[:-1])
    with pytest.raises(LevelDamaged, match=r"c\.2\.0\.0\.0 has"):
        FfcvLevels(levels)


@needs_ffcv
@pytest.mark.parametrize("taken", [0, 1, len(PARTS[1]) - 2])
def test_leaving_early_leaves_no_thread(rows: Reader, taken: int) -> None:
    """But the reader's own two, which end with it."""
    before = set(threading.enumerate())
    for _ in range(3):
        for number, _batch in enumerate(rows.batches(*PARTS)):
            time.sleep(0.02)  # until what may be read ahead is
            if number == taken:
                break
        assert len(set(threading.enumerate()) - before) <= 2
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _batch in rows.batches(*PARTS)]
    assert len(set(threading.enumerate()) - before) <= 2
    assert len(list(rows.batches(*PARTS))) == len(PARTS[1])


@needs_ffcv
def test_closing_ends_epochs_and_keeps_batches(levels: list[Level]) -> None:
    skip_unless_it_imports()
    before = set(threading.enumerate())
    rows = Reader(FfcvLevels(levels), 2)
    epochs = [rows.batches(*PARTS) for _ in range(2)]
    firsts = [next(epoch) for epoch in epochs]
    not_begun = rows.batches(*PARTS)
    rows.close()
    rows.close()
    assert set(threading.enumerate()) <= before
    for epoch, first in zip(epochs, firsts, strict=True):
        assert equal(first, stored(levels, np.arange(4)))
        with pytest.raises(ValueError, match="closed"):
            list(epoch)
    for late in (lambda: list(not_begun), lambda: rows.batches(*PARTS)):
        with pytest.raises(ValueError, match="closed"):
            late()


# ---- threads ------------------------------------------------------------------------------------


@needs_ffcv
def test_torchs_threads_stay_as_they_are(levels: list[Level]) -> None:
    """In this thread and in those that begin later."""
    skip_unless_it_imports()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = []
        with Reader(FfcvLevels(levels), 2) as rows:
            for _batch in rows.batches(*PARTS):
                seen.append(torch.get_num_threads())
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert set(seen) == {3}
    finally:
        torch.set_num_threads(before)


TWO_AT_ONCE = """
import sys, pathlib
from rows_of import Geometry, numbered, views
from strata.pipeline.feed.ffcv.rows import FfcvLevels
from strata.pipeline.feed.prefetch import Reader
import torch
threads = torch.get_num_threads()
levels = views(pathlib.Path(sys.argv[1]), Geometry(400, (1, 8, 8), "uint8", 2, 16))
parts = numbered(levels[0].geometry, range(800)), [4] * 200
with Reader(FfcvLevels(levels), 3) as one, Reader(FfcvLevels(levels), 3) as other:
    print(len([*zip(one.batches(*parts), other.batches(*parts), strict=True)]))
assert torch.get_num_threads() == threads
"""


@needs_ffcv
@pytest.mark.slow
def test_two_epochs_at_once_are_fine_with_any_threads_of_numba(tmp_path: Path) -> None:
    """Two on its workqueue abort the process, so that none of its threads is used."""
    skip_unless_it_imports()
    found = python(TWO_AT_ONCE, str(tmp_path), NUMBA_THREADING_LAYER="workqueue")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "200"


# ---- writing a .beton ---------------------------------------------------------------------------


@pytest.fixture
def grey(tmp_path: Path) -> Level:
    skip_unless_it_imports()
    return images(tmp_path / "store", 150, 1, 9)


def shared_memory() -> set[Path]:
    """Blocks of 32 bytes a row, ffcv's metadata. What nobody frees is lost until a restart."""
    return {p for p in Path("/dev/shm").glob("psm_*") if p.stat().st_size == 150 * 32}


def left_over(place: Path) -> list[str]:
    return [p.name for p in place.iterdir() if p.is_file() and not p.name.endswith(".lock")]


@needs_ffcv
@pytest.mark.slow
def test_a_worker_that_fails_ends_the_writing_and_the_old_file_stays(
    grey: Level, tmp_path: Path
) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(b"old")
    before = shared_memory()
    (tmp_path / ".tmp-x.beton-left-by-a-killed-writer").write_bytes(b"")
    flip(grey.directory / "x/c.1.0.0.0", 100)
    with pytest.raises(LoaderError, match=r"writer failed: .*c\.1\.0\.0\.0: row 65 is not"):
        write.write_images(path, grey)
    assert left_over(tmp_path) == ["x.beton"]
    assert shared_memory() <= before
    assert path.read_bytes() == b"old"


@needs_ffcv
def test_a_writer_that_says_nothing_is_stopped(
    grey: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "PATIENCE", 0.3)
    with pytest.raises(LoaderError, match="has written nothing for"):
        write.write_images(tmp_path / "x.beton", grey)
    assert left_over(tmp_path) == []


@needs_ffcv
def test_what_tick_raises_stops_the_writing(grey: Level, tmp_path: Path) -> None:
    def tick(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write.write_images(tmp_path / "x.beton", grey, tick=tick)
    assert left_over(tmp_path) == []


@needs_ffcv
def test_what_cannot_be_written_is_refused_in_one_line(
    grey: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.beton"
    with pytest.raises(LoaderError, match="3 channels, not the 1 of x_0 train: write it raw"):
        write.write_images(path, grey, 90)
    with hold(tmp_path / ".x.beton.lock", "x.beton"), pytest.raises(LevelBusy, match=r"x\.beton"):
        write.write_images(path, grey)
    monkeypatch.setattr(Files, "free", lambda self, path: 1000)
    with pytest.raises(DiskFull, match="needs 12,150 bytes, 1,000 are free"):
        write.write_images(path, grey)
    assert left_over(tmp_path) == []
