"""Publishing without the lock: duplicates, racers and strays agree on what lies on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from shard_files import shard_path
from small_levels import INTENT, KEY, SMALL, drawn

from strata.store.errors import LevelConflict, StoreRefused
from strata.store.feature_store import Store
from strata.store.files.files import Files
from strata.store.files.publish import TEMPORARY, unseal
from strata.store.level.level import Level, receipt_path
from strata.store.write.shard import Published, ShardWriter
from strata.store.write.unfinished import unsettled
from strata.store.write.writer import LevelWriter

PROFILES = pytest.mark.parametrize("profile", ["raw", "zstd"])


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LevelWriter]:
    writer = Store(tmp_path).writer(KEY, SMALL, [INTENT])
    with writer.locked():
        yield writer


def part(rows: np.ndarray, writer: LevelWriter, shard: int) -> np.ndarray:
    first, last = writer.geometry.shard_range(shard)
    return rows[first:last]


def finish(writer: LevelWriter, rows: np.ndarray) -> Level:
    """All shards by another process, and the commit."""
    for shard in range(writer.geometry.shards):
        other(writer).put(shard, part(rows, writer, shard))
    return writer.commit(None)


def other(writer: LevelWriter, files: Files | None = None, **changed: Any) -> ShardWriter:
    """A writer of shards of the same level, as another process has it."""
    facts = {"root": writer.root, "key": writer.key, "geometry": writer.geometry} | changed
    return ShardWriter(**facts, files=files or Files())


def agrees(writer: LevelWriter, shard: int) -> bool:
    """Does the receipt speak of the bytes that lie there?"""
    data = shard_path(writer.directory, shard).read_bytes()
    receipt = unseal(receipt_path(writer.directory, shard))
    return hashlib.sha256(data).hexdigest() == receipt["sha256"]


@PROFILES
def test_a_level_by_others_is_the_level_by_its_writer(tmp_path: Path, profile: str) -> None:
    shape, rows, found = replace(SMALL, profile=profile), drawn(SMALL), []
    for name in ("own", "others"):
        writer = Store(tmp_path / name).writer(KEY, shape, [INTENT])
        with writer.locked():
            if name == "own":
                writer.fill((s, part(rows, writer, s)) for s in range(shape.shards))
                writer.commit(None)
            else:
                finish(writer, rows)
        files = (p for p in writer.directory.rglob("*") if p.is_file())
        found.append({str(p.relative_to(writer.directory)): p.read_bytes() for p in files})
    assert found[0] == found[1]
    assert len(found[0]) == 2 * SMALL.shards + 3


def test_a_second_try_publishes_nothing(writer: LevelWriter) -> None:
    rows, second = drawn(SMALL), other(writer)
    assert second.done(0) is None
    first = second.put(0, part(rows, writer, 0))
    before = shard_path(writer.directory, 0).stat().st_ino
    assert second.done(0) == first
    assert second.put(0, part(rows + 1, writer, 0)) == first, "others' bytes came too late"
    assert shard_path(writer.directory, 0).stat().st_ino == before


@pytest.mark.parametrize("kinds", [1, 3])
def test_racers_with_other_bytes_agree_on_one_shard(writer: LevelWriter, kinds: int) -> None:
    """Two devices may round differently; whoever is first is right, and all say the same of it."""
    second, gate, rows = other(writer), Barrier(8), drawn(SMALL)

    def race(number: int) -> Published:
        gate.wait()
        return second.put(1, part(rows + number % kinds, writer, 1))

    with ThreadPoolExecutor(8) as pool:
        said = set(pool.map(race, range(8)))
    assert len(said) == 1
    assert agrees(writer, 1)
    assert not list(writer.directory.glob(f"{TEMPORARY}*"))


class Between(Files):
    """Does something once, right after a shard is linked and before its receipt is."""

    def __init__(self, then: object) -> None:
        self.then = then

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        if target.name.startswith("c.") and self.then is not None:
            then, self.then = self.then, None
            then()  # pyright: ignore[reportCallIssue]


def test_a_stray_whose_shard_was_removed_leaves_no_receipt_in_the_way(writer: LevelWriter) -> None:
    """A worker of a killed command goes on while the next one takes stock and begins anew."""
    rows, second = drawn(SMALL), other(writer)
    stray = Between(lambda: writer.missing())
    other(writer, stray).put(0, part(rows + 1, writer, 0))
    assert not shard_path(writer.directory, 0).exists(), "the stray's shard went with the stock"
    assert second.done(0) is None
    second.put(0, part(rows, writer, 0))
    assert agrees(writer, 0)
    level = finish(writer, rows)
    np.testing.assert_array_equal(level.read(0, len(level)), rows)


def test_a_stray_that_comes_late_does_not_unsettle_the_shard(writer: LevelWriter) -> None:
    rows, second = drawn(SMALL), other(writer)

    def meanwhile() -> None:
        writer.missing()
        second.put(0, part(rows, writer, 0))

    said = other(writer, Between(meanwhile)).put(0, part(rows + 1, writer, 0))
    assert agrees(writer, 0), "the stray says what lies there, not what it made"
    assert said == second.done(0)
    assert unsettled(writer, [said]) == []


@PROFILES
def test_half_a_shard_is_replaced(tmp_path: Path, profile: str) -> None:
    """As a file system without hard links may leave it."""
    writer = Store(tmp_path).writer(KEY, replace(SMALL, profile=profile), [INTENT])
    with writer.locked():
        shard_path(writer.directory, 0).write_bytes(b"half")
        level = finish(writer, drawn(SMALL))
    np.testing.assert_array_equal(level.read(0, len(level)), drawn(SMALL))


def test_what_is_not_to_be_seen_here_is_unsettled(writer: LevelWriter) -> None:
    rows, second = drawn(SMALL), other(writer)
    said = [second.put(s, part(rows, writer, s)) for s in range(SMALL.shards)]
    assert unsettled(writer, said) == []
    receipt_path(writer.directory, 0).unlink()
    shard_path(writer.directory, 1).write_bytes(b"other")
    wrong = replace(said[2], sha256="0" * 64)
    assert unsettled(writer, [*said[:2], wrong, *said[3:]]) == [0, 1, 2]


def test_a_store_that_is_not_shared_is_named(writer: LevelWriter, tmp_path: Path) -> None:
    other(writer).expect_begun()
    with pytest.raises(StoreRefused, match=r"elsewhere.*zarr\.json here.*all can see it"):
        other(writer, root=tmp_path / "elsewhere").expect_begun()
    with pytest.raises(LevelConflict, match="another level"):
        other(writer, geometry=replace(SMALL, profile="lz4")).expect_begun()


def test_rows_of_another_shape_are_refused(writer: LevelWriter) -> None:
    with pytest.raises(ValueError, match="shard 0 wants"):
        other(writer).put(0, drawn(SMALL)[:1])
