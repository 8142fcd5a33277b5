"""Several writers on a real S3 server: workers and strays agree on what is in the bucket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import (
    INTENT,
    KEY,
    ROWS,
    TOOL,
    VALUES,
    Road,
    connect,
    contents,
    new_bucket,
    road,
    serving,
    shape,
    use,
    write,
)
from shard_files import shard_path

from strata.store.feature_store import Store
from strata.store.files.publish import unseal
from strata.store.fingerprint import sha256
from strata.store.level.level import Level, receipt_path
from strata.store.write.shard import Published, ShardWriter
from strata.store.write.unfinished import unsettled
from strata.store.write.verify import check_level
from strata.store.write.writer import LevelWriter

SHARDS = shape().shards


@pytest.fixture(scope="module")
def open_way() -> Iterator[Road]:
    with serving() as url, road(url) as way:
        yield way


@pytest.fixture
def way(open_way: Road) -> Iterator[Road]:
    yield open_way
    open_way.stripped = ()
    open_way.lost.clear()
    open_way.seen.clear()


@pytest.fixture
def bucket(way: Road, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, way.url)
    return new_bucket(way.url)


def begun(bucket: str, **how: Any) -> LevelWriter:
    """A level of a client of its own, begun."""
    writer = connect(bucket, **how).writer(KEY, shape(), [INTENT])
    writer.begin()
    return writer


def other(store: Store) -> ShardWriter:
    """A writer of shards of that level, as a worker with a client of its own has it."""
    return ShardWriter(store.root, KEY, shape(), store.files)


def part(shard: int, more: int = 0) -> np.ndarray:
    """Rows of a shard, as a device with other low bits would have them."""
    return VALUES[slice(*shape().shard_range(shard))] + np.float32(more)


def committed(writer: LevelWriter) -> Level:
    return writer.commit(None, {"label": np.arange(ROWS)}, TOOL)


def agrees(store: Store, shard: int) -> bool:
    """Does the receipt speak of the bytes that are there?"""
    directory = KEY.directory(store.root)
    data = store.files.read(shard_path(directory, shard))
    return sha256(data) == unseal(receipt_path(directory, shard), store.files)["sha256"]


def damage(store: Store) -> list[Any]:
    return check_level(store.root, KEY.directory(store.root), deep=True, files=store.files)


def test_a_level_by_others_is_that_of_a_disk(bucket: str, tmp_path: Path) -> None:
    writer = begun(bucket)
    worker = other(connect(bucket))
    worker.expect_begun()
    said = [worker.put(k, part(k)) for k in range(SHARDS)]
    assert said == [worker.done(k) for k in range(SHARDS)]
    assert unsettled(writer, said) == []
    committed(writer)
    write(Store(tmp_path / "store"))
    files = (p for p in (tmp_path / "store").rglob("*") if p.is_file())
    local = {str(p.relative_to(tmp_path / "store")): p.read_bytes() for p in files}
    assert contents(connect(bucket)) == {
        n: b for n, b in local.items() if not n.startswith("locks/")
    }


def test_workers_with_other_low_bits_say_the_same_of_one_shard(bucket: str) -> None:
    begun(bucket)
    gate, clients = threading.Barrier(6), [connect(bucket) for _ in range(6)]

    def race(i: int) -> Published:
        gate.wait()
        return other(clients[i]).put(1, part(1, i % 3))

    with ThreadPoolExecutor(6) as pool:
        said = set(pool.map(race, range(6)))
    assert len(said) == 1
    assert agrees(clients[0], 1)


def test_a_command_with_workers_and_one_without_end_with_one_level(bucket: str) -> None:
    """Neither waits for the other."""
    gate = threading.Barrier(2)

    def with_workers() -> Level:
        writer = begun(bucket)
        others = [other(connect(bucket)) for _ in range(2)]
        gate.wait()
        with ThreadPoolExecutor(2) as workers:
            said = workers.map(lambda k: others[k % 2].put(k, part(k, k % 2)), range(SHARDS))
            assert unsettled(writer, said) == []
        return committed(writer)

    def without() -> Level:
        writer = begun(bucket)
        gate.wait()
        writer.fill((k, part(k, 5)) for k in reversed(range(SHARDS)))
        return committed(writer)

    with ThreadPoolExecutor(2) as pool:
        levels = [future.result() for future in [pool.submit(with_workers), pool.submit(without)]]
    assert levels[0].content_root == levels[1].content_root
    assert damage(connect(bucket)) == []


def test_a_lost_answer_to_the_second_worker_leaves_the_first_ones_shard(
    bucket: str, way: Road
) -> None:
    writer = begun(bucket)
    first = other(connect(bucket)).put(0, part(0))
    writer.files.unlink(receipt_path(writer.directory, 0))  # as if it were not written yet
    way.lost += [r"PUT .*/c\.0"]
    assert other(connect(bucket)).put(0, part(0, 1)) == first
    assert not way.lost
    assert agrees(connect(bucket), 0)


# ---- a worker that is slow and was believed dead ------------------------------------------------


@contextmanager
def slow(store: Store, what: str) -> Iterator[Future[Published]]:
    """A worker with other low bits. An object of its shard 0 is on its way to the server for the
    whole block, and then arrives."""
    files: Any = store.files
    under_way, go_on, put = threading.Event(), threading.Event(), files._put

    def late(path: Path, data: bytes, mode: Any) -> str:
        if what in str(path) and not under_way.is_set():
            under_way.set()
            assert go_on.wait(60)
        return put(path, data, mode)

    files._put = late
    with ThreadPoolExecutor(1) as pool:
        stray = pool.submit(other(store).put, 0, part(0, 1))
        try:
            assert under_way.wait(60)
            yield stray
        finally:
            go_on.set()
        stray.result()


def test_a_shard_without_a_receipt_yet_is_vouched_for_as_it_is(bucket: str) -> None:
    writer = begun(bucket)
    with slow(connect(bucket), "/receipts/") as stray:
        said = other(connect(bucket)).put(0, part(0))
        assert agrees(connect(bucket), 0)
    assert stray.result() == said
    assert agrees(connect(bucket), 0)
    assert unsettled(writer, [said]) == []


def test_a_slow_worker_changes_nothing_of_a_committed_level(bucket: str) -> None:
    writer = begun(bucket)
    worker = other(connect(bucket))
    with slow(connect(bucket), "/c.0."):
        assert unsettled(writer, [worker.put(k, part(k)) for k in range(SHARDS)]) == []
        committed(writer)
        before = contents(connect(bucket))
    assert contents(connect(bucket)) == before
    assert damage(connect(bucket)) == []


def test_where_a_server_overwrites_it_would(bucket: str, way: Road) -> None:
    """So a store that is said to have one writer is not given to workers."""
    way.stripped = ("if-none-match", "if-match")
    writer = begun(bucket, conditional=False)
    worker = other(connect(bucket, conditional=False))
    with slow(connect(bucket, conditional=False), "/c.0."):
        for k in range(SHARDS):
            worker.put(k, part(k))
        committed(writer)
    path = shard_path(writer.directory, 0)
    assert path in {found.path for found in damage(connect(bucket))}
