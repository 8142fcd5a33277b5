"""Filling a level: shards are made while others are published, and what is finished is kept."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Lock

import numpy as np
import pytest
from small_levels import INTENT, KEY, SMALL, contents, drawn, written

from strata.store.errors import DiskFull
from strata.store.files.files import Files
from strata.store.files.publish import TEMPORARY
from strata.store.level.layout import Geometry
from strata.store.level.level import shard_name
from strata.store.parallel import NICENESS
from strata.store.write.shard import Published
from strata.store.write.writer import PUBLISHERS, LevelWriter

SHAPE = replace(SMALL, rows=40)  # ten shards
ROWS = drawn(SHAPE)


def begun(root: Path, files: Files | None = None) -> LevelWriter:
    writer = LevelWriter(root, KEY, SHAPE, [INTENT], files or Files())
    writer.begin()
    return writer


def produced(shape: Geometry = SHAPE, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    for shard in range(shape.shards):
        if shard == stop:
            raise KeyboardInterrupt
        yield shard, ROWS[slice(*shape.shard_range(shard))]


@pytest.mark.parametrize("profile", ["raw", "zstd"])
def test_a_filled_level_has_the_bytes_of_one_written_shard_by_shard(
    tmp_path: Path, profile: str
) -> None:
    shape = replace(SHAPE, profile=profile)
    writer = LevelWriter(tmp_path / "a", KEY, shape, [INTENT])
    writer.begin()
    nbytes = writer.fill(produced(shape))
    level = writer.commit(None, {"label": np.arange(shape.rows) % 3})
    assert nbytes == level.nbytes
    written(tmp_path / "b", shape, ROWS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_are_published_side_by_side(tmp_path: Path) -> None:
    """Each sync of a shard waits for another one, which comes only if they overlap."""
    together = Barrier(PUBLISHERS, timeout=30)

    class Meeting(Files):
        def link(self, source: Path, target: Path) -> None:
            if target.name.startswith("c."):
                together.wait()
            super().link(source, target)

    begun(tmp_path, Meeting()).fill(produced())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_those_who_publish_step_back_and_nobody_else(tmp_path: Path) -> None:
    found: set[int] = set()

    class Looking(LevelWriter):
        def put(self, shard: int, rows: np.ndarray, threads: int = 1) -> Published:
            found.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().put(shard, rows, threads)

    before = os.getpriority(os.PRIO_PROCESS, 0)
    writer = Looking(tmp_path, KEY, SHAPE, [INTENT])
    writer.begin()
    writer.fill(produced())
    assert found == {min(19, before + NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_what_is_made_waits_for_what_is_published(tmp_path: Path) -> None:
    """Memory is bounded: never more than the shards at work and the one being made."""
    alive, most, lock = 0, 0, Lock()

    class Counting(LevelWriter):
        def put(self, shard: int, rows: np.ndarray, threads: int = 1) -> Published:
            nonlocal alive
            published = super().put(shard, rows, threads)
            with lock:
                alive -= 1
            return published

    def counted() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal alive, most
        for shard, rows in produced():
            with lock:
                alive += 1
                most = max(most, alive)
            yield shard, rows

    writer = Counting(tmp_path, KEY, SHAPE, [INTENT])
    writer.begin()
    writer.fill(counted())
    assert most <= PUBLISHERS + 1


def test_all_who_publish_are_at_work_while_the_next_shard_is_made(tmp_path: Path) -> None:
    together = Barrier(PUBLISHERS + 1, timeout=30)

    class Meeting(LevelWriter):
        def put(self, shard: int, rows: np.ndarray, threads: int = 1) -> Published:
            if shard < PUBLISHERS:
                together.wait()
            return super().put(shard, rows, threads)

    def meeting() -> Iterator[tuple[int, np.ndarray]]:
        for shard, rows in produced():
            if shard == PUBLISHERS:
                together.wait()
            yield shard, rows

    writer = Meeting(tmp_path, KEY, SHAPE, [INTENT])
    writer.begin()
    writer.fill(meeting())
    assert not writer.missing()


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_stopping_keeps_every_shard_that_was_made(tmp_path: Path, stop: int) -> None:
    writer = begun(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        writer.fill(produced(stop=stop))
    assert writer.missing() == list(range(stop, SHAPE.shards))


def test_a_refused_shard_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    class Full(Files):
        def link(self, source: Path, target: Path) -> None:
            if target.name == shard_name(4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().link(source, target)

    with pytest.raises(DiskFull, match=r"c\.4\.0\.0\.0"):
        begun(tmp_path, Full()).fill(produced())
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(TEMPORARY)]
    writer = begun(tmp_path)
    left = writer.missing()
    assert left[0] == 4
    assert left[1:] == list(range(left[1], SHAPE.shards)), "in order, from about where it stopped"
    assert 4 < left[1] <= 4 + PUBLISHERS + 1, "those that were at work beside it, and one made"
