"""The pool of packed levels: what is decoded, when, and into which place, for any order."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_of import geometries, views, whole
from spoil import flip

from store import pool as pools
from store.errors import LevelDamaged
from store.layout import Geometry
from store.order import Mixing, mixing
from store.pool import Decoding, Pool, Schedule
from store.rows import Reading, Task

FEW = settings(max_examples=40, deadline=None)
SHAPE = Geometry(60, (2, 8, 8), "float16", chunk_rows=4, shard_rows=16, profile="zstd")


@st.composite
def stripes(draw: st.DrawFn, rows: int) -> list[np.ndarray]:
    """Some rows, each at most once, cut into stripes."""
    order = np.array(draw(st.permutations(range(rows)))[: draw(st.integers(1, rows))], np.int64)
    edges = draw(st.lists(st.integers(1, len(order)), max_size=6).map(sorted))
    return [part for part in np.split(order, edges) if len(part)]


def run(reading: Reading, parts: Sequence[np.ndarray], shape: Geometry, threads: int) -> list:
    """What a reader does: tasks in their order, by some threads."""
    tasks: SimpleQueue[Task | None] = SimpleQueue()
    found = [np.empty((len(part), shape.row_bytes), np.uint8) for part in parts]
    errors: list[BaseException] = []

    def take(stripe: int) -> None:
        try:
            reading.take(stripe, slice(None), found[stripe])
        except BaseException as error:
            errors.append(error)

    for stripe in range(len(parts)):
        for task in reading.before(stripe):
            tasks.put(task)
        tasks.put(lambda stripe=stripe: take(stripe))
        for task in reading.after(stripe):
            tasks.put(task)

    def work() -> None:
        while (task := tasks.get()) is not None:
            task()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
        tasks.put(None)
    for worker in workers:
        worker.join()
    reading.end()
    reading.close()
    if errors:
        raise errors[0]
    return found


@FEW
@given(shape=geometries(["zstd", "lz4"]), count=st.integers(1, 3), data=st.data())
def test_any_order_gives_the_rows_asked_for(
    tmp_path_factory: pytest.TempPathFactory, shape: Geometry, count: int, data: st.DataObject
) -> None:
    pool = Pool(views(tmp_path_factory.mktemp("store"), shape, count))
    for _ in range(2):  # the second epoch uses the memory of the first
        parts = data.draw(stripes(count * shape.rows))
        reading = pool.begin(parts)
        assert isinstance(reading, Decoding)
        found = run(reading, parts, shape, data.draw(st.integers(1, 3)))
        for rows, part in zip(found, parts, strict=True):
            assert np.array_equal(rows, whole(shape, count)[part])
    pool.close()


@FEW
@given(data=st.data(), chunk=st.integers(1, 7), rows=st.integers(1, 60))
def test_a_schedule_against_counting(data: st.DataObject, chunk: int, rows: int) -> None:
    """Every chunk once, before its first row is wanted, and never more places than it says."""
    parts = data.draw(stripes(rows))
    flat = np.concatenate(parts)
    schedule = Schedule(parts, flat // chunk)
    assert sorted(schedule.chunks.tolist()) == sorted(set((flat // chunk).tolist()))
    decoded: set[int] = set()
    handed_out, live, most = 0, 0, 0
    for stripe, part in enumerate(parts):
        while handed_out < schedule.wanted[stripe]:
            members = schedule.members[handed_out]
            assert {int(n) // chunk for n in flat[members]} == {int(schedule.chunks[handed_out])}
            live += len(members)
            decoded.update(members.tolist())
            handed_out += 1
        begin = sum(map(len, parts[:stripe]))
        assert decoded.issuperset(range(begin, begin + len(part)))
        most = max(most, live)
        live -= len(part)
    assert (handed_out, live) == (len(schedule.chunks), 0)
    assert schedule.places == most


def test_every_chunk_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(views(tmp_path, SHAPE, 2))
    decoded: list[int] = []
    real = pool.chunks.decode
    monkeypatch.setattr(
        pool.chunks, "decode", lambda chunk, out: decoded.append(chunk) or real(chunk, out)
    )
    order = Mixing(120, block=4, pool=24).order(0, 1, 0)
    parts = np.split(order, range(7, 120, 7))
    run(pool.begin(parts), parts, SHAPE, 3)
    assert sorted(decoded) == list(range(30))


def test_a_window_has_places_for_itself_and_little_more(tmp_path: Path) -> None:
    """Memory does not grow with the level."""
    for rows in (240, 2400):
        shape = replace(SHAPE, rows=rows)
        pool = Pool(views(tmp_path / str(rows), shape, 1))
        order = Mixing(rows, block=4, pool=40).order(0, 1, 0)
        parts = np.split(order, range(8, rows, 8))
        schedule = Schedule(parts, pool.chunks.of(order))
        assert schedule.places <= 40 + 8 + 8 * 4


def test_an_order_that_nothing_can_be_kept_for_costs_a_chunk_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from a recipe that says raw, and a level that is packed: slow, and right."""
    monkeypatch.setattr(pools, "MOST_BYTES", 20 * SHAPE.row_bytes)
    pool = Pool(views(tmp_path, SHAPE, 1))
    order = np.random.default_rng(0).permutation(60)
    parts = np.split(order, range(5, 60, 5))
    reading = pool.begin(parts)
    assert not isinstance(reading, Decoding)
    found = run(reading, parts, SHAPE, 2)
    assert np.array_equal(np.concatenate(found), whole(SHAPE, 1)[order])
    assert isinstance(pool.begin(np.split(np.arange(60), range(5, 60, 5))), Decoding)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_chunk_ends_the_epoch_with_its_name(tmp_path: Path, threads: int) -> None:
    """Whoever waits for the chunk is told, and nobody waits for ever."""
    levels = views(tmp_path, SHAPE, 2)
    flip(levels[1].directory / "c.2.0.0.0", 9)
    pool = Pool(levels)
    order = np.random.default_rng(0).permutation(120)
    parts = np.split(order, range(10, 120, 10))
    with pytest.raises(LevelDamaged, match=r"v1/c\.2\.0\.0\.0: an inner chunk fails"):
        run(pool.begin(parts), parts, SHAPE, threads)


def test_leaving_lets_everybody_go(tmp_path: Path) -> None:
    """Tasks that wait for a stripe that will never be taken end, too."""
    pool = Pool(views(tmp_path, SHAPE, 1))
    order = Mixing(60, block=4, pool=8).order(0, 1, 0)
    parts = np.split(order, range(4, 60, 4))
    reading = pool.begin(parts)
    tasks = [*reading.before(0), *reading.after(0), *reading.before(1)]  # nobody takes stripe 0
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    reading.end()
    reading.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    found = run(pool.begin(parts), parts, SHAPE, 2)
    assert np.array_equal(np.concatenate(found), whole(SHAPE, 1)[order])


# --- orders in blocks ----------------------------------------------------------------------------


@FEW
@given(
    rows=st.integers(0, 300),
    block=st.integers(1, 9),
    pool=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_every_row_once_and_those_of_a_block_in_one_window(
    rows: int, block: int, pool: int, seed: int
) -> None:
    mix = Mixing(rows, block, pool)
    order = mix.order(seed, 1, 2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(rows))
    assert np.array_equal(order, mix.order(seed, 1, 2))
    position = np.argsort(order)
    blocks = math.ceil(rows / block)
    window = math.ceil(blocks / mix.windows) * block
    for first in range(0, rows, block):
        assert np.ptp(position[first : first + block]) < window


def test_a_level_that_fits_in_a_window_is_shuffled_exactly() -> None:
    for mix in (Mixing(100), Mixing(100, 10, 60), Mixing(100, 1, 5)):
        assert mix.windows == 1
        assert mix.same_block == 0
        assert np.array_equal(mix.order(0, 1, 2), Mixing(100).order(0, 1, 2))


def test_the_share_of_pairs_is_what_is_counted() -> None:
    """(block - 1) / (window - 1), in a simulation of batches of 128."""
    mix = Mixing(32_768, block=16, pool=4096)
    order = np.concatenate([mix.order(seed, 1, 0) for seed in range(4)])
    batches = order.reshape(-1, 128) // 16
    counts = [np.bincount(batch) for batch in batches]
    same = [(count * (count - 1)).sum() / (128 * 127) for count in counts]
    assert np.mean(same) == pytest.approx(mix.same_block, rel=0.05)


def test_the_order_of_a_level_is_a_function_of_its_geometry() -> None:
    assert mixing(replace(SHAPE, profile="raw")) == Mixing(60)
    big = Geometry(100_000, (8, 32, 32), "uint8", 128, 8192, "zstd")  # 8 KiB a row, 800 MB
    assert mixing(big) == Mixing(100_000, 128, 16_384)
    assert mixing(big).windows == 6
    assert 0 < mixing(big).same_block < 0.01
