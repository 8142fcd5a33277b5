"""Rows in a given order, gathered ahead by threads of the reader's own into buffers of its own.

Batches are gathered in stripes of some megabytes: a small batch would cost more in handing over
than in copying. Which thread gathers what changes nothing: a stripe's rows and its place in the
sequence are fixed before the first thread begins.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np

from strata.pipeline.feed.buffers import Allocate, Ring, pageable
from strata.store.read.order import cut
from strata.store.read.pool import Pool
from strata.store.read.rows import Rows, RowSource

STRIPE_BYTES = 1 << 20
"""Aim for a stripe: much against the price of handing it over, little against a CPU's cache."""
PIECE_BYTES = 2 << 20
"""Bytes that one thread gathers at a time, at least: two of them finish a stripe together."""
RING_BYTES = 256 << 20
"""Most bytes of stripes read ahead, but for three stripes, fewer of which would not overlap."""

Tasks = SimpleQueue[Callable[[], None] | None]
"""What threads are to do, and never raises; None: end."""
Done = SimpleQueue[BaseException | None]
"""An entry of every part of a stripe that was gathered: what went wrong."""


class Reader(AbstractContextManager["Reader"]):
    """Batches of stored rows. Close it, or use it in a with statement."""

    def __init__(
        self,
        source: RowSource,
        threads: int,
        *,
        piece_bytes: int = PIECE_BYTES,
        allocate: Allocate = pageable,
    ) -> None:
        """
        Args:
            source: where they come from; closed with the reader.
            threads: of the reader's own; the one that asks for a batch takes part while it waits.
            piece_bytes: what one of them gathers at a time: little where it must wait for a disk,
                so that many wait at once.
            allocate: memory of the buffers; pinned where they are copied to a GPU.
        """
        self._source, self._threads = source, threads
        self._row_bytes, self._piece_bytes = source.geometry.row_bytes, piece_bytes
        self._allocate, self._ring = allocate, Ring(0, 0)
        self._tasks: Tasks = SimpleQueue()
        self._workers: list[Thread] = []
        self._epochs: weakref.WeakSet[_Epoch] = weakref.WeakSet()
        self._stop = weakref.finalize(self, _stop, self._tasks, self._workers)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the source. Batches that were handed out stay valid."""
        for epoch in list(self._epochs):
            epoch.leave()
        self._stop()
        self._source.close()

    def batches(self, rows: Rows, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        """The rows asked for, as batches of these lengths: arrays (length, y, x, channel) of stored
        elements, in the level's dtype. Each stays as it is while somebody holds it; then its memory
        is used again. Raises LevelDamaged: a row is not the one that was written; names file and
        row."""
        if not len(lengths):
            return iter(())
        self._source.ready()
        if not self._stop.alive:
            raise ValueError("this reader was closed")
        while len(self._workers) < self._threads:
            worker = Thread(target=_work, args=(self._tasks,), name="reader", daemon=True)
            self._workers.append(worker)
            worker.start()
        each = max(1, STRIPE_BYTES // max(1, max(lengths) * self._row_bytes))
        stripes = [lengths[at : at + each] for at in range(0, len(lengths), each)]
        stripe_bytes = max(map(sum, stripes)) * self._row_bytes
        if self._ring.nbytes < stripe_bytes:
            # Small ones are over soon: more of them, so that a thread seldom sleeps in between.
            ahead = self._threads + (4 if stripe_bytes <= STRIPE_BYTES else 2)
            slots = max(3, min(ahead, RING_BYTES // stripe_bytes))
            self._ring = Ring(stripe_bytes, slots, self._allocate)
        piece = max(1, self._piece_bytes // self._row_bytes), self._threads + 1
        epoch = _Epoch(self._source, rows, stripes, self._ring, self._tasks, piece)
        self._epochs.add(epoch)
        return self._run(epoch)

    def _run(self, epoch: _Epoch) -> Iterator[np.ndarray]:
        geometry, row_bytes = self._source.geometry, self._row_bytes
        dtype, row = geometry.dtype, geometry.lying
        try:
            for lengths in epoch.stripes:
                buffer, end = epoch.next_stripe(), 0
                whole = buffer[: sum(lengths) * row_bytes].view(dtype).reshape(-1, *row)
                for length in lengths:
                    begin, end = end, end + length
                    yield whole[begin:end]
                del buffer, whole
            epoch.check_open()
        finally:
            epoch.leave()


class _Epoch:
    """Stripes under way, in their order."""

    def __init__(
        self,
        source: RowSource,
        rows: Rows,
        stripes: Sequence[Sequence[int]],
        ring: Ring,
        tasks: Tasks,
        piece: tuple[int, int],
    ) -> None:
        """
        Args:
            stripes: lengths of the batches of each.
            piece: rows of a part of a stripe, at least; and parts, at most.
        """
        self._source, self._rows, self.stripes = source, rows, stripes
        self._row_bytes = source.geometry.row_bytes
        self._ring, self._tasks, self._piece = ring, tasks, piece
        counts = [sum(lengths) for lengths in stripes]
        self._decoding = source.begin(rows, counts) if isinstance(source, Pool) else None
        self._begun, self._end = 0, 0
        self._under_way = deque[tuple[np.ndarray, int, Done]]()
        """The buffer of each stripe, how many parts of it are gathered, and what came of them."""
        self._left = False

    def check_open(self) -> None:
        """Raises ValueError if the reader was closed meanwhile."""
        if self._left:
            raise ValueError("the reader of these batches was closed")

    def next_stripe(self) -> np.ndarray:
        """The buffer of the next one, gathered. Meanwhile do what a thread of the reader would:
        waking another one costs more than a stripe of small rows. Raises what the gathering raised.
        """
        self.check_open()
        # Begin as many stripes as there are free buffers, and one in any case.
        while self._begun < len(self.stripes):
            if (buffer := self._ring.free()) is None and self._under_way:
                break
            self._begin(self._ring.more() if buffer is None else buffer)
            del buffer
        buffer, parts, done = self._under_way.popleft()
        errors: list[BaseException | None] = []
        while len(errors) < parts:
            if not done.empty() or not _help(self._tasks):
                errors.append(done.get())
        for error in filter(None, errors):
            raise error
        return buffer

    def leave(self) -> None:
        """Nobody wants the rest: return when no thread works on it any more."""
        if not self._left:
            self._left = True
            if self._decoding is not None:
                self._decoding.close()
            for _, parts, done in self._under_way:
                for _ in range(parts):
                    done.get()
            self._under_way.clear()

    def _begin(self, buffer: np.ndarray) -> None:
        number, begin, done = self._begun, self._end, SimpleQueue()
        rows, (least, most) = sum(self.stripes[number]), self._piece
        self._begun, self._end = number + 1, begin + rows
        for task in self._decoding.tasks(number) if self._decoding else ():
            self._tasks.put(task)
        row_bytes = self._row_bytes
        lengths = cut(rows, max(1, -(-rows // min(most, max(1, rows // least)))))
        self._under_way.append((buffer, len(lengths), done))
        end = 0
        for length in lengths:
            at, end = end, end + length
            out = buffer[at * row_bytes : end * row_bytes].reshape(-1, row_bytes)
            part = slice(begin + at, begin + end)
            self._tasks.put(partial(self._gather, done, number, part, out))

    def _gather(self, done: Done, number: int, part: slice, out: np.ndarray) -> None:
        """Copy a part of a stripe to its place in the buffer, uint8 (n, bytes of a row)."""
        error = None
        try:
            if self._decoding is not None:
                self._decoding.take(number, part, out)
            elif not self._left:
                self._source.take(self._rows[part], out)
        except BaseException as caught:
            error = caught
        done.put(error)


def _help(tasks: Tasks) -> bool:
    """Do one task, if there is any that no thread has begun."""
    try:
        task = tasks.get_nowait()
    except Empty:
        return False
    if task is None:  # the end, which is for a thread
        tasks.put(None)
        return False
    task()
    return True


def _work(tasks: Tasks) -> None:
    """The loop of a thread. It knows the queue alone, so that a reader can be forgotten."""
    while (task := tasks.get()) is not None:
        task()
        del task


def _stop(tasks: Tasks, workers: list[Thread]) -> None:
    for _ in workers:
        tasks.put(None)
    for worker in workers:
        worker.join()
