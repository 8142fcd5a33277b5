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
from typing import Any

import numpy as np

from strata.pipeline.feed.buffers import Allocate, Ring, pageable
from strata.store.read.rows import ReadTask, Rows

STRIPE_BYTES = 4 << 20
"""Aim for a stripe: much against the price of handing it over, little against a CPU's cache."""
PIECE_BYTES = 2 << 20
"""Bytes that one thread gathers at a time, at least: two of them finish a stripe together."""
RING_BYTES = 256 << 20
"""Most bytes of stripes read ahead, but for three stripes, fewer of which would not overlap."""


_Stripe = Sequence[np.ndarray]
"""Row numbers of consecutive batches that are gathered together."""


class Reader(AbstractContextManager["Reader"]):
    """Batches of stored rows. Close it, or use it in a with statement."""

    def __init__(
        self,
        rows: Rows,
        threads: int,
        *,
        piece_bytes: int = PIECE_BYTES,
        allocate: Allocate = pageable,
    ) -> None:
        """
        Args:
            rows: where they come from; closed with the reader.
            threads: of the reader's own; the one that asks for a batch takes part while it waits.
            piece_bytes: what one of them gathers at a time: little where it must wait for a disk,
                so that many wait at once.
            allocate: memory of the buffers; pinned where they are copied to a GPU.
        """
        self.rows, self.geometry = rows, rows.geometry
        self._row_bytes = rows.geometry.row_bytes
        self._threads, self._piece_bytes, self._allocate = threads, piece_bytes, allocate
        self._tasks: SimpleQueue[ReadTask | None] = SimpleQueue()
        self._workers: list[Thread] = []
        self._ring: Ring | None = None
        self._epochs: set[_Epoch] = set()
        self._stop = weakref.finalize(self, _stop, self._tasks, self._workers)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the rows. Batches that were handed out stay valid."""
        for epoch in list(self._epochs):
            epoch.leave()
        self._stop()
        self.rows.close()

    def batches(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The rows of each part (int64 row numbers), in the order asked for: arrays (len(part),
        channel, y, x) of stored elements, in the level's dtype. Each stays as it is while somebody
        holds it; then its memory is used again. Raises LevelDamaged: a row is not the one that was
        written; names file and row."""
        if not len(parts):
            return iter(())
        self.rows.ready()
        if not self._stop.alive:
            raise ValueError("this reader was closed")
        while len(self._workers) < self._threads:
            worker = Thread(target=_work, args=(self._tasks,), name="reader", daemon=True)
            self._workers.append(worker)
            worker.start()
        longest = max(map(len, parts)) * self._row_bytes
        each = max(1, STRIPE_BYTES // max(1, longest))
        stripes = [parts[at : at + each] for at in range(0, len(parts), each)]
        stripe_bytes = max(sum(map(len, some)) for some in stripes) * self._row_bytes
        if self._ring is None or self._ring.nbytes < stripe_bytes:
            slots = max(3, min(self._threads + 2, RING_BYTES // stripe_bytes))
            self._ring = Ring(stripe_bytes, slots, self._allocate)
        return self._run(_Epoch(self.rows, stripes, self._ring, self._tasks, self._pieces))

    def _run(self, epoch: _Epoch) -> Iterator[np.ndarray]:
        dtype, row, row_bytes = self.geometry.dtype, self.geometry.stored, self._row_bytes
        self._epochs.add(epoch)
        try:
            while (job := epoch.next_stripe()) is not None:
                begin = 0
                for part in job.stripe:
                    end = begin + len(part) * row_bytes
                    yield job.buffer[begin:end].view(dtype).reshape(len(part), *row)
                    begin = end
                del job
        finally:
            epoch.leave()
            self._epochs.discard(epoch)

    def _pieces(self, rows: int) -> list[slice]:
        """A stripe of so many rows, in parts for the threads."""
        most = max(1, rows * self._row_bytes // self._piece_bytes)
        each = -(-rows // min(self._threads + 1, most))  # the one that waits takes part
        return [slice(begin, min(begin + each, rows)) for begin in range(0, rows, each)]


class _Epoch:
    """Stripes under way, in their order."""

    def __init__(
        self,
        rows: Rows,
        stripes: Sequence[_Stripe],
        ring: Ring,
        tasks: SimpleQueue[Any],
        pieces: Callable[[int], list[slice]],
    ) -> None:
        self._reading = rows.begin(
            [some[0] if len(some) == 1 else np.concatenate(some) for some in stripes]
        )
        self._row_bytes, self._ring = rows.geometry.row_bytes, ring
        self._coming, self._jobs = iter(enumerate(stripes)), deque[_Job]()
        self._tasks, self._pieces, self._left = tasks, pieces, False

    def next_stripe(self) -> _Job | None:
        """The next one, gathered; None after the last. Raises what the gathering raised."""
        if self._left:
            raise ValueError("the reader of these batches was closed")
        # Begin as many stripes as there are free buffers, and one in any case.
        while (buffer := self._ring.free()) is not None or not self._jobs:
            following = next(self._coming, None)
            if following is None:
                break
            self._begin(*following, self._ring.more() if buffer is None else buffer)
        del buffer
        if not self._jobs:
            return None
        self._jobs[0].wait(self._tasks)
        return self._jobs.popleft()

    def leave(self) -> None:
        """Nobody wants the rest: return when no thread works on it any more."""
        if not self._left:
            self._left = True
            self._reading.end()
            while self._jobs:
                self._jobs.popleft().leave()
            self._reading.close()

    def _begin(self, number: int, stripe: _Stripe, buffer: np.ndarray) -> None:
        for task in self._reading.before(number):
            self._tasks.put(task)
        job = _Job(stripe, buffer)
        self._jobs.append(job)
        for part in self._pieces(sum(map(len, stripe))):
            out = buffer[part.start * self._row_bytes : part.stop * self._row_bytes]
            take = partial(self._reading.take, number, part, out.reshape(-1, self._row_bytes))
            self._tasks.put(job.piece(take))
        for task in self._reading.after(number):
            self._tasks.put(task)


class _Job:
    """A stripe on its way into a buffer."""

    def __init__(self, stripe: _Stripe, buffer: np.ndarray) -> None:
        self.stripe, self.buffer = stripe, buffer
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._pieces, self._left = 0, False

    def piece(self, take: ReadTask) -> ReadTask:
        """A task around ``take`` that says when it is done, and never raises."""
        self._pieces += 1

        def gather() -> None:
            error = None
            try:
                if not self._left:
                    take()
            except BaseException as caught:
                error = caught
            self._done.put(error)

        return gather

    def wait(self, tasks: SimpleQueue[Any]) -> None:
        """Until the stripe is in its buffer, and meanwhile do what a thread of the reader would:
        waking another one costs more than a stripe of small rows. Raises what its gathering raised.
        """
        while self._pieces:
            if self._done.empty() and _help(tasks):
                continue
            error = self._done.get()
            self._pieces -= 1
            if error is not None:
                raise error

    def leave(self) -> None:
        """Return when no thread writes to the buffer any more."""
        self._left = True
        while self._pieces:
            self._done.get()
            self._pieces -= 1


def _help(tasks: SimpleQueue[Any]) -> bool:
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


def _work(tasks: SimpleQueue[Any]) -> None:
    """The loop of a thread. It knows the queue alone, so that a reader can be forgotten."""
    while (task := tasks.get()) is not None:
        task()
        del task


def _stop(tasks: SimpleQueue[Any], workers: list[Thread]) -> None:
    for _ in workers:
        tasks.put(None)
    for worker in workers:
        worker.join()
