"""Batches read ahead: the rows asked for, whatever the threads do, in memory that goes round."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_of import divided, geometries, kinds_of, opened, views, whole
from sizes import examples
from spoil import flip

from strata.pipeline.feed import prefetch as readers
from strata.pipeline.feed.buffers import MapBuffers, Ring
from strata.pipeline.feed.prefetch import Reader
from strata.store.errors import LevelDamaged
from strata.store.level.layout import Geometry
from strata.store.memory import PAGE
from strata.store.read.mapped import MappedRows
from strata.store.read.rows import Rows, RowSource

SHAPE = Geometry(60, (2, 8, 8), "float16", chunk_rows=2, shard_rows=16)
PACKED = Geometry(60, (2, 8, 8), "float16", chunk_rows=2, shard_rows=16, profile="lz4")


def parts_of(rows: int, batch: int, seed: int = 0) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(rows)
    return [order[at : at + batch] for at in range(0, rows, batch)]


def expected(shape: Geometry, count: int, part: np.ndarray) -> bytes:
    return whole(shape, count)[part].tobytes()


@settings(max_examples=examples(25), deadline=None)
@given(shape=geometries(), count=st.integers(1, 2), data=st.data())
def test_batches_of_any_size_by_any_number_of_threads(
    tmp_path_factory: pytest.TempPathFactory, shape: Geometry, count: int, data: st.DataObject
) -> None:
    levels = views(tmp_path_factory.mktemp("store"), shape, count)
    parts = parts_of(count * shape.rows, data.draw(st.integers(1, 20)))
    threads, stripe = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 500, 4 << 20]))
    for kind in kinds_of(shape):
        with pytest.MonkeyPatch.context() as patch, opened(kind, levels) as rows:
            patch.setattr(readers, "STRIPE_BYTES", stripe)
            with Reader(rows, threads, piece_bytes=data.draw(st.sampled_from([1, 4096]))) as reader:
                for _ in range(2):
                    made = reader.batches(*divided(shape, parts))
                    found = [batch.tobytes() for batch in made]
                    assert found == [expected(shape, count, part) for part in parts]


@pytest.fixture(params=[SHAPE, PACKED], ids=["raw", "packed"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RowSource]:
    kind = "mapped" if request.param.profile == "raw" else "pool"
    with opened(kind, views(tmp_path, request.param, 2)) as found:
        yield found


def test_a_batch_stays_as_it_is_while_it_is_held(
    rows: RowSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an array, as a part of one, or as a part of a tensor made of it."""
    monkeypatch.setattr(readers, "STRIPE_BYTES", 1)
    parts = parts_of(120, 4)
    with Reader(rows, 2) as reader:
        kept = []
        for number, batch in enumerate(reader.batches(*divided(SHAPE, parts))):
            bits = batch.view(np.int16)  # a NaN is not equal to itself
            tensor = torch.from_numpy(bits)
            held = [tensor, torch.from_numpy(bits[1:]), tensor[:, 0]][number % 3]
            kept.append((held, held.clone()))
            del batch, bits, tensor, held
        assert all(torch.equal(held, copy) for held, copy in kept)


def test_what_is_let_go_is_used_again(rows: RowSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of a hundred batches allocates no more buffers than are in use at once."""
    monkeypatch.setattr(readers, "STRIPE_BYTES", 1)
    made: list[int] = []

    def allocate(nbytes: int) -> np.ndarray:
        made.append(nbytes)
        return np.empty(nbytes, np.uint8)

    with Reader(rows, 2, allocate=allocate) as reader:
        for seed in range(3):
            for batch in reader.batches(*divided(SHAPE, parts_of(120, 3, seed))):
                assert batch.shape[0] == 3
                assert batch.ctypes.data % PAGE == 0
    assert len(made) <= 4


def test_leaving_early_leaves_nothing_behind(rows: RowSource) -> None:
    before = set(threading.enumerate())
    with Reader(rows, 3) as reader:
        for _ in range(5):
            for _batch in reader.batches(*divided(SHAPE, parts_of(120, 4))):
                break
        with pytest.raises(ZeroDivisionError):
            [1 / 0 for _batch in reader.batches(*divided(SHAPE, parts_of(120, 4)))]
        assert len(list(reader.batches(*divided(SHAPE, parts_of(120, 4))))) == 30
        assert len(set(threading.enumerate()) - before) == 3
    assert set(threading.enumerate()) <= before


def test_two_epochs_at_once(rows: RowSource) -> None:
    one, other = parts_of(120, 4, 1), parts_of(120, 4, 2)
    with Reader(rows, 2) as reader:
        pairs = zip(
            reader.batches(*divided(SHAPE, one)),
            reader.batches(*divided(SHAPE, other)),
            strict=True,
        )
        for number, (a, b) in enumerate(pairs):
            assert a.tobytes() == expected(rows.geometry, 2, one[number])
            assert b.tobytes() == expected(rows.geometry, 2, other[number])


def test_closing_in_the_middle_of_an_epoch(rows: RowSource) -> None:
    before = set(threading.enumerate())
    reader = Reader(rows, 2)
    parts = parts_of(120, 4)
    epoch = reader.batches(*divided(SHAPE, parts))
    first, not_begun = next(epoch), reader.batches(*divided(SHAPE, parts))
    reader.close()
    reader.close()
    assert set(threading.enumerate()) <= before
    assert first.tobytes() == expected(rows.geometry, 2, parts[0])
    for late in (epoch, not_begun):
        with pytest.raises(ValueError, match="closed"):
            list(late)
    with pytest.raises(ValueError, match="closed"):
        reader.batches(*divided(SHAPE, parts))


def test_a_reader_that_is_forgotten_ends_its_threads(rows: RowSource) -> None:
    before = set(threading.enumerate())
    reader = Reader(rows, 2)
    next(reader.batches(*divided(SHAPE, parts_of(120, 4))))
    del reader
    gc.collect()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("shape", [SHAPE, PACKED], ids=["raw", "packed"])
def test_an_error_of_a_thread_reaches_the_caller(tmp_path: Path, shape: Geometry) -> None:
    levels = views(tmp_path, shape, 2)
    flip(levels[1].directory / "x/c.1.0.0.0", 3)
    before = set(threading.enumerate())
    kind = "mapped" if shape.profile == "raw" else "pool"
    with opened(kind, levels) as rows, Reader(rows, 2) as reader:
        for _ in range(2):
            with pytest.raises(LevelDamaged, match=r"v1/x/c\.1\.0\.0\.0"):
                list(reader.batches(*divided(SHAPE, parts_of(120, 4))))
        # The rows that are whole can still be had.
        part = np.arange(60)
        (found,) = reader.batches(*divided(shape, [part]))
        assert found.tobytes() == expected(shape, 2, part)
    assert set(threading.enumerate()) <= before


def test_reading_goes_on_while_a_batch_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batches are gathered although nobody asks for them yet."""
    monkeypatch.setattr(readers, "STRIPE_BYTES", 1)
    taken = SimpleQueue[int]()

    class Telling(MappedRows):
        def take(self, rows: Rows, out: np.ndarray) -> None:
            super().take(rows, out)
            taken.put(int(rows.row[0]))

    parts = parts_of(60, 3)
    with Reader(Telling(views(tmp_path, SHAPE, 1)), 1) as reader:
        batches = reader.batches(*divided(SHAPE, parts))
        next(batches)
        assert {taken.get(timeout=10) for _ in range(3)} == {part[0] for part in parts[:3]}


# --- buffers -------------------------------------------------------------------------------------


def test_a_ring_gives_out_what_nobody_holds() -> None:
    ring = Ring(100, 2)
    one, other = ring.free(), ring.free()
    assert one is not None
    assert other is not None
    assert one.ctypes.data % PAGE == other.ctypes.data % PAGE == 0
    assert not np.shares_memory(one, other)
    assert ring.free() is None
    part = one[10:20].view(np.int16)
    address = one.ctypes.data
    del one
    assert ring.free() is None
    tensor = torch.from_numpy(part)[1:]
    del part
    assert ring.free() is None
    del tensor
    again = ring.free()
    assert again is not None
    assert again.ctypes.data == address
    assert ring.take().ctypes.data not in (address, other.ctypes.data)


def test_maps_are_channels_last_and_used_again() -> None:
    maps = MapBuffers()
    one = maps.take((4, 3, 5, 6))
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert one.shape == (4, 3, 5, 6)
    address = one.data_ptr()
    other = maps.take((2, 3, 5, 6))
    assert other.data_ptr() != address
    del one
    assert maps.take((4, 3, 5, 6)).data_ptr() == address
    assert maps.take((40, 3, 5, 6)).shape[0] == 40


def test_counting_holders_is_what_this_python_does() -> None:
    """The ring rests on it."""
    memory = np.empty(10, np.uint8)
    before = sys.getrefcount(memory)
    view = memory[2:].view(np.uint16)[1:]
    assert view.base is memory
    assert sys.getrefcount(memory) == before + 1
