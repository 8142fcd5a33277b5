"""Rows in any order, by every way of reading them: what ``Level.take`` gives, or an error."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_of import geometries, kinds_of, numbered, opened, views, whole
from sizes import examples
from spoil import flip

from strata.store.errors import LevelDamaged, StoreRefused
from strata.store.level.layout import Geometry
from strata.store.level.level import COMMIT
from strata.store.read import descriptors
from strata.store.read.descriptors import Descriptors, ReadRows
from strata.store.read.mapped import MappedRows
from strata.store.read.rows import TakenRows

FEW = settings(max_examples=examples(25), deadline=None)
SHAPE = Geometry(60, (2, 8, 8), "float16", chunk_rows=2, shard_rows=16)
PROFILES = pytest.mark.parametrize("profile", ["raw", "zstd", "lz4"])
RAW_KINDS = pytest.mark.parametrize("kind", ["mapped", "read", "taken"])


@FEW
@given(shape=geometries(), count=st.integers(1, 3), data=st.data())
def test_any_rows_in_any_order_as_often_as_wanted(
    tmp_path_factory: pytest.TempPathFactory, shape: Geometry, count: int, data: st.DataObject
) -> None:
    levels = views(tmp_path_factory.mktemp("store"), shape, count)
    asked = data.draw(st.lists(st.integers(0, count * shape.rows - 1), min_size=1, max_size=40))
    numbers = np.array(asked, np.int64)
    for kind in kinds_of(shape):
        with opened(kind, levels) as rows:
            rows.ready()
            out = np.empty((len(numbers), shape.row_bytes), np.uint8)
            rows.take(numbered(shape, numbers), out)
            assert np.array_equal(out, whole(shape, count)[numbers]), kind


@PROFILES
def test_many_threads_take_at_once(tmp_path: Path, profile: str) -> None:
    shape = replace(SHAPE, profile=profile)
    levels, expected = views(tmp_path, shape, 2), whole(shape, 2)
    wrong: list[str] = []

    def take(kind: str, seed: int) -> None:
        for part in np.random.default_rng(seed).permutation(120).reshape(12, 10):
            out = np.empty((10, shape.row_bytes), np.uint8)
            rows.take(numbered(shape, part), out)
            if not np.array_equal(out, expected[part]):
                wrong.append(kind)

    for kind in kinds_of(shape):
        with opened(kind, levels) as rows:
            threads = [threading.Thread(target=take, args=(kind, seed)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []


@PROFILES
def test_a_flipped_bit_is_an_error_and_names_file_and_row(tmp_path: Path, profile: str) -> None:
    shape = replace(SHAPE, profile=profile)
    levels = views(tmp_path, shape, 2)
    flip(levels[1].directory / "x/c.1.0.0.0", 3)  # row 16 of the second view, or its chunk
    for kind in kinds_of(shape):
        named = r"v1/x/c\.1\.0\.0\.0: (row 16 is not|an inner chunk)"
        with pytest.raises(LevelDamaged, match=named), opened(kind, levels) as rows:
            rows.take(numbered(shape, [60 + 16]), np.empty((1, shape.row_bytes), np.uint8))


@RAW_KINDS
def test_a_row_is_checked_once(tmp_path: Path, kind: str) -> None:
    """Later reads trust the first: what happens to a page afterwards is not ours to find out."""
    levels = views(tmp_path, SHAPE, 1)
    out = np.empty((2, SHAPE.row_bytes), np.uint8)
    with opened(kind, levels) as rows:
        rows.take(numbered(SHAPE, [17, 3]), out)
        flip(levels[0].directory / "x/c.1.0.0.0", SHAPE.row_bytes + 3)
        rows.take(numbered(SHAPE, [17, 3]), out)
        flip(levels[0].directory / "x/c.1.0.0.0", 2 * SHAPE.row_bytes + 3)
        with pytest.raises(LevelDamaged, match="row 18 is not"):
            rows.take(numbered(SHAPE, [18]), out[:1])


@PROFILES
def test_a_shard_that_is_gone_or_cut_is_found_before_an_epoch(tmp_path: Path, profile: str) -> None:
    """A cut one would end the process if it were mapped and touched."""
    shape = replace(SHAPE, profile=profile)
    (level,) = views(tmp_path, shape, 1)
    path = level.directory / "x/c.2.0.0.0"
    data = path.read_bytes()
    for kind in set(kinds_of(shape)) - {"loaded", "taken"}:
        with opened(kind, [level]) as rows:
            rows.ready()
            path.unlink()
            with pytest.raises(LevelDamaged, match=r"c\.2\.0\.0\.0 is missing"):
                rows.ready()
            path.write_bytes(data[:-1])
            with pytest.raises(LevelDamaged, match=r"c\.2\.0\.0\.0 has"):
                rows.ready()
            path.write_bytes(data)


# --- mapped --------------------------------------------------------------------------------------


@FEW
@given(shape=geometries(["raw"]), count=st.integers(1, 3))
def test_all_rows_of_all_views_lie_at_one_distance(
    tmp_path_factory: pytest.TempPathFactory, shape: Geometry, count: int
) -> None:
    mapped = MappedRows(views(tmp_path_factory.mktemp("store"), shape, count))
    places = mapped.places(numbered(shape, range(count * shape.rows)))
    rows = mapped.memory.reshape(-1, shape.row_bytes)
    assert np.array_equal(rows[places], whole(shape, count))
    assert not mapped.memory.flags.writeable
    mapped.close()


def test_what_cannot_be_mapped_together_is_refused(tmp_path: Path) -> None:
    (one,) = views(tmp_path / "a", SHAPE, 1)
    (other,) = views(tmp_path / "b", replace(SHAPE, shard_rows=8), 1)
    (packed,) = views(tmp_path / "c", replace(SHAPE, profile="lz4"), 1)
    for kind in (MappedRows, ReadRows):
        with pytest.raises(ValueError, match="has not the geometry of"):
            kind([one, other])
    with pytest.raises(ValueError, match=r"x_1 train\.v0 is packed"):
        MappedRows([packed])


def test_views_of_two_geometries_are_read_one_after_another(tmp_path: Path) -> None:
    """Two runs may have written them, in shards of two sizes, and one packed."""
    one = views(tmp_path / "a", SHAPE, 1)
    other = views(tmp_path / "b", replace(SHAPE, shard_rows=8, profile="zstd"), 2)
    numbers = np.random.default_rng(0).permutation(120)
    out = np.empty((120, SHAPE.row_bytes), np.uint8)
    TakenRows([one[0], other[1]]).take(numbered(SHAPE, numbers), out)
    assert np.array_equal(out, whole(SHAPE, 2)[numbers])


# --- read by position ----------------------------------------------------------------------------


def test_more_shards_than_files_are_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "KEPT_OPEN", 2)
    with opened("read", views(tmp_path, SHAPE, 3)) as rows:
        out = np.empty((180, SHAPE.row_bytes), np.uint8)
        rows.take(numbered(SHAPE, range(180)[::-1]), out)
        assert np.array_equal(out[::-1], whole(SHAPE, 3))
        assert len(open_files(tmp_path)) == 2
    assert open_files(tmp_path) == []


def open_files(root: Path) -> list[Path]:
    """Shards that are open; a level holds its commit besides."""
    descriptors = (link.resolve() for link in Path("/proc/self/fd").iterdir())
    return [path for path in descriptors if path.is_relative_to(root) and path.name != COMMIT]


def test_a_read_that_comes_back_early_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may give less than was asked for at any time."""
    real = os.preadv

    def short(descriptor: int, parts: list, offset: int) -> int:
        first = memoryview(parts[0]).cast("B")
        return real(descriptor, [first[: max(1, len(first) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with opened("read", views(tmp_path, SHAPE, 1)) as rows:
        out = np.empty((60, SHAPE.row_bytes), np.uint8)
        rows.take(numbered(SHAPE, range(60)), out)
    assert np.array_equal(out, whole(SHAPE, 1))


def test_an_end_that_comes_early_and_a_disk_that_fails_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = views(tmp_path, SHAPE, 1)
    path = levels[0].directory / "x/c.1.0.0.0"
    os.truncate(path, 100)
    files, out = Descriptors(levels), np.empty(SHAPE.row_bytes, np.uint8)
    with pytest.raises(LevelDamaged, match=r"c\.1\.0\.0\.0 ends at byte 100; its commit says"):
        files.read(0, 1, 0, [out])

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StoreRefused, match=r"refuses .*c\.0\.0\.0\.0: input/output error"):
        files.read(0, 0, 0, [out])
