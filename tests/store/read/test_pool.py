"""The pool of packed levels: what is decoded, when, and into which place, for any order."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_of import divided, geometries, views, whole
from sizes import examples
from spoil import flip

from strata.store.errors import LevelDamaged
from strata.store.level.layout import Geometry
from strata.store.read import pool as pools
from strata.store.read.order import Mixing, cut, mixing
from strata.store.read.pool import DecodePlan, Decoding, Pool
from strata.store.read.rows import Rows

FEW = settings(max_examples=examples(40), deadline=None)
SHAPE = Geometry(60, (2, 8, 8), "float16", chunk_rows=4, shard_rows=16, profile="zstd")


@st.composite
def stripes(draw: st.DrawFn, rows: int) -> list[np.ndarray]:
    """Some rows, each at most once, cut into stripes."""
    order = np.array(draw(st.permutations(range(rows)))[: draw(st.integers(1, rows))], np.int64)
    edges = draw(st.lists(st.integers(1, len(order)), max_size=6).map(sorted))
    return [part for part in np.split(order, edges) if len(part)]


def run(pool: Pool, parts: Sequence[np.ndarray], threads: int) -> list[np.ndarray]:
    """What a reader does: tasks in their order, by some threads."""
    decoding = pool.begin(*divided(pool.geometry, parts))
    assert decoding is not None
    tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    found = [np.empty((len(part), pool.geometry.row_bytes), np.uint8) for part in parts]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    errors: list[BaseException] = []

    def take(stripe: int) -> None:
        try:
            end = ends[stripe]
            decoding.take(stripe, slice(end - len(parts[stripe]), end), found[stripe])
        except BaseException as error:
            errors.append(error)

    for stripe in range(len(parts)):
        for task in decoding.tasks(stripe):
            tasks.put(task)
        tasks.put(lambda stripe=stripe: take(stripe))

    def work() -> None:
        while (task := tasks.get()) is not None:
            task()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
        tasks.put(None)
    for worker in workers:
        worker.join()
    decoding.close()
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
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pools, "ROOM_BYTES", shape.row_bytes * data.draw(st.integers(1, 40)))
            found = run(pool, parts, data.draw(st.integers(1, 3)))
        for rows, part in zip(found, parts, strict=True):
            assert np.array_equal(rows, whole(shape, count)[part])
    pool.close()


@FEW
@given(
    data=st.data(),
    chunk=st.integers(1, 7),
    rows=st.integers(1, 60),
    room=st.integers(0, 9),
    again=st.booleans(),
)
def test_a_schedule_against_playing_it(
    data: st.DataObject, chunk: int, rows: int, room: int, again: bool
) -> None:
    """Every chunk once, before its first row is wanted, into places whose rows have been taken."""
    parts = data.draw(stripes(rows))
    parts = [*parts, parts[0]] if again else parts  # a row may be wanted twice
    flat = np.concatenate(parts)
    plan = DecodePlan(Rows.of(flat), [len(part) for part in parts], chunk, room)
    assert sorted(plan.chunks[:, 1].tolist()) == sorted(set((flat // chunk).tolist()))
    holds: dict[int, int] = {}  # place → number of its row
    left = [*flat.tolist()]
    handed_out = 0
    for stripe, part in enumerate(parts):
        for k in range(handed_out, int(plan.wanted[stripe])):
            assert plan.after[k] <= stripe
            members = plan.rows[k].row.tolist()
            assert members == sorted(n for n in flat.tolist() if n // chunk == plan.chunks[k, 1])
            places = range(plan.begins[k], plan.begins[k] + len(members))
            assert 0 <= places[0] <= places[-1] < plan.places
            assert not any(holds.get(place) in left for place in places)
            holds |= dict(zip(places, members, strict=True))
        handed_out = max(handed_out, int(plan.wanted[stripe]))
        begin = sum(map(len, parts[:stripe]))
        for position in range(begin, begin + len(part)):
            assert holds[int(plan.place[position])] == flat[position]
            left.remove(flat[position])
    assert handed_out == len(plan.chunks)
    assert len(set(plan.place.tolist())) <= plan.places


def test_every_chunk_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(views(tmp_path, SHAPE, 2))
    decoded: list[tuple[int, int]] = []
    real = pool.chunks.decode
    monkeypatch.setattr(
        pool.chunks, "decode", lambda v, c, out: decoded.append((v, c)) or real(v, c, out)
    )
    order = Mixing(120, block=4, pool=24).order(0, 1, 0)
    parts = np.split(order, range(7, 120, 7))
    run(pool, parts, 3)
    assert sorted(decoded) == [(view, chunk) for view in range(2) for chunk in range(15)]


def test_the_disk_is_asked_for_chunks_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, in the order of decoding, and never many more than are being decoded."""
    pool = Pool(views(tmp_path, SHAPE, 1))
    parts = np.split(Mixing(60, block=4, pool=12).order(0, 1, 0), range(5, 60, 5))
    asked: list[int] = []
    monkeypatch.setattr(pools, "FETCHED_AHEAD", 3)
    monkeypatch.setattr(pools, "ROOM_BYTES", SHAPE.row_bytes)
    monkeypatch.setattr(pool.chunks, "fetch", lambda view, chunk: asked.append(chunk))
    decoding, decoded, ahead = pool.begin(*divided(SHAPE, parts)), 0, []
    assert decoding is not None
    for stripe in range(len(parts)):
        for task in decoding.tasks(stripe):
            task()
            decoded += 1
        ahead.append(len(asked) - decoded)
        part, out = slice(5 * stripe, 5 * stripe + 5), np.empty((5, SHAPE.row_bytes), np.uint8)
        decoding.take(stripe, part, out)
    decoding.close()
    assert sorted(asked) == list(range(15))
    first_wanted = list(dict.fromkeys((np.concatenate(parts) // 4).tolist()))
    assert asked == first_wanted
    assert max(ahead) == 2


def test_there_are_places_for_two_windows_whatever_the_number_of_rows() -> None:
    """Memory does not grow with the level."""
    for rows in (240, 2400, 24_000):
        order = Mixing(rows, block=4, pool=40).order(0, 1, 0)
        plan = DecodePlan(Rows.of(order), cut(rows, 8), 4, 1)
        assert plan.places <= 2 * 44 + 8 + 2 * 4


def test_views_of_which_a_part_is_wanted_take_no_more_places() -> None:
    """Rows of a chunk that are not wanted have none: half of each of two views, here."""
    rows = 4800
    order = Mixing(rows, block=8, pool=80).order(0, 1, 0)
    view = np.random.default_rng(0).integers(0, 2, rows)
    plan = DecodePlan(Rows(view, order), cut(rows, 16), 8, 1)
    assert len(plan.chunks) > 1.9 * rows // 8
    assert plan.places <= 2 * 88 + 16 + 2 * 8


def test_an_order_that_nothing_can_be_kept_for_costs_a_chunk_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from a recipe that says raw, and a level that is packed: slow, and right."""
    monkeypatch.setattr(pools, "MOST_BYTES", 26 * SHAPE.row_bytes)
    monkeypatch.setattr(pools, "ROOM_BYTES", SHAPE.row_bytes)
    pool = Pool(views(tmp_path, SHAPE, 1))
    order = np.random.default_rng(0).permutation(60)
    parts = np.split(order, range(5, 60, 5))
    assert pool.begin(*divided(SHAPE, parts)) is None
    found = np.empty((60, SHAPE.row_bytes), np.uint8)
    pool.take(Rows.of(order), found)
    assert np.array_equal(found, whole(SHAPE, 1)[order])
    assert isinstance(pool.begin(Rows.of(np.arange(60)), cut(60, 5)), Decoding)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("at", "what"), [(9, "an inner chunk"), (-9, "its index")])
def test_a_damaged_chunk_ends_the_epoch_with_its_name(
    tmp_path: Path, threads: int, at: int, what: str
) -> None:
    """Whoever waits for the chunk is told, and nobody waits for ever."""
    levels = views(tmp_path, SHAPE, 2)
    flip(levels[1].directory / "x/c.2.0.0.0", at)
    pool = Pool(levels)
    order = np.random.default_rng(0).permutation(120)
    parts = np.split(order, range(10, 120, 10))
    with pytest.raises(LevelDamaged, match=rf"v1/x/c\.2\.0\.0\.0: {what} fails"):
        run(pool, parts, threads)


def test_leaving_lets_everybody_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that wait for a stripe that will never be taken end, too."""
    monkeypatch.setattr(pools, "ROOM_BYTES", SHAPE.row_bytes)
    pool = Pool(views(tmp_path, SHAPE, 1))
    order = Mixing(60, block=4, pool=8).order(0, 1, 0)
    parts = np.split(order, range(4, 60, 4))
    decoding = pool.begin(*divided(SHAPE, parts))
    assert decoding is not None
    tasks = [task for stripe in range(8) for task in decoding.tasks(stripe)]  # nobody takes 0
    assert max(decoding._plan.after[: len(tasks)]) > 0
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    decoding.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    found = run(pool, parts, 2)
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
    assert mixing(big) == Mixing(100_000, 128, 14_336)
    assert mixing(big).windows == 6
    assert 0 < mixing(big).same_block < 0.01
