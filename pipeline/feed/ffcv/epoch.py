"""ffcv's epoch thread, given our memory and our order, and held by the hand.

Everything here is about what ffcv 1.0.2 does not do: it waits for ever for a thread that has
failed, leaves one behind when an epoch is not read to its end, reuses the memory of batches that it
handed out, copies arrays on one thread, and lets numba abort the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from math import prod
from queue import Empty
from typing import Any

import numpy as np

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv.beton import IMAGE, ffcv
from strata.store.errors import StoreError
from strata.store.memory import aligned

AHEAD = 3
"""Batches that ffcv reads ahead of the one in use."""
POLL = 0.1
"""Seconds of waiting for a batch after which we look whether ffcv's thread is alive."""
_WORKQUEUE = threading.Lock()
"""Held by the one epoch that may run on numba's workqueue threads."""

Finish = Callable[[int, np.ndarray], np.ndarray]
"""Makes of a batch's number in the epoch, and of what ffcv read, what is handed out. It runs in
ffcv's thread, and what it raises is raised by ``next_batch``."""


class Loader(AbstractContextManager["Loader"]):
    """A stand-in for ffcv's Loader and its parts, with all that ffcv's epoch thread asks of them.

    Loader itself opens a file by its name, keeps Python sets of all rows and pages, knows only
    its own orders, pins a ring for every epoch and sets torch's thread count.
    """

    batches_ahead = AHEAD
    traversal_order = None
    batch_size = 0

    def __init__(
        self,
        memory: np.ndarray,
        places: np.ndarray,
        sizes: np.ndarray,
        metadata: np.ndarray,
        row: tuple[int, ...],
        workers: int | None,
    ) -> None:
        """
        Args:
            memory: uint8, read-only: all that can be read.
            places: uint64 (rows,), where each row begins in memory.
            sizes: uint64 (rows,), how many bytes each has.
            metadata: ffcv's record of each row; its column ``f0`` is that of the field that is
                read: colour images, raw or JPEG as the metadata say, or plain bytes.
            row: shape of the uint8 that ffcv makes of a row: (y, x, 3), or (bytes,).
            workers: threads that copy or decode; no more than the cores we may use, the default.
        """
        self.metadata, self.row = metadata, row
        self.num_workers = max(1, cores() if workers is None else min(workers, cores()))
        order = np.argsort(places, kind="stable")  # ffcv looks a size up by its place
        self.state = memory, places[order], sizes[order]
        self.code, self._step = _compiled(len(row) == 3, self.num_workers > 1)

    def __exit__(self, *error: object) -> None:
        """Nothing to close after an epoch."""

    @property
    def reader(self) -> Loader:
        """All the parts that ffcv asks for."""
        return self

    graph = memory_manager = reader

    def schedule_epoch(self, batches: object) -> Loader:
        """What holds our memory, in the place of ffcv's map of a file."""
        return self

    def start_batch(self, batch: int) -> None:
        """Nothing is fetched ahead: the kernel reads."""

    def allocate_memory(self, batch: int, slots: int) -> dict[str, dict[int, Any]]:
        """Buffers by kind and step of the pipeline: new memory instead of a ring."""
        fresh = _Fresh((batch, *self.row))
        return {"operation": {self._step: fresh}, "shared": {self._step: None}}


class _Fresh:
    """Stands in for ffcv's ring of buffers: every batch gets memory that only it will have."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, slot: int) -> np.ndarray:
        return aligned(prod(self.shape)).reshape(self.shape)


@cache
def _compiled(rgb: bool, parallel: bool) -> tuple[Any, int]:
    """ffcv's code for one field, and the number of its one step. It holds no data, so all readers
    of the process share it: numba takes a second to compile it. The dtypes of what it is given must
    not vary (numba 0.68 fails to compile parallel code of ffcv a second time)."""
    parts = ffcv()
    parts.Compiler.num_threads = 2 if parallel else 1  # decides between prange and range
    fields, decoders, manager = parts.fields, parts.decoders, parts.OSCacheManager
    field = fields.RGBImageField() if rgb else fields.NDArrayField(np.dtype("u1"), (1,))
    decoder = decoders.SimpleRGBImageDecoder() if rgb else _parallel_arrays()()
    metadata = np.zeros(1, [("f0", field.metadata_type)])
    read = manager.compile_reader(manager.__new__(manager))
    pipelines = {IMAGE: parts.PipelineSpec(IMAGE, decoder=decoder)}
    graph = parts.Graph(pipelines, {IMAGE: field}, {IMAGE: 0}, metadata, read)
    needs, code = graph.collect_requirements()
    (step,) = needs["operation"]
    return graph.codegen_all(code), step


def _parallel_arrays() -> Any:
    """ffcv's decoder of arrays, on all of its threads: ffcv itself forgets to say so."""

    class ParallelArrays(ffcv().decoders.NDArrayDecoder):
        def generate_code(self) -> Any:
            code = super().generate_code()
            code.is_parallel = True
            return code

    return ParallelArrays


@cache
def epoch_class() -> Any:
    """The class of an epoch that is read: its loader, the order (int64 numbers of rows in memory),
    the rows of a batch, and a :data:`Finish`."""

    class Epoch(ffcv().EpochIterator):
        """ffcv's thread, which says why it has ended."""

        failure: BaseException | None = None

        def __init__(self, loader: Loader, order: np.ndarray, batch: int, finished: Finish) -> None:
            self.finished = finished
            loader.batch_size = batch
            super().__init__(loader, order)

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                self.failure = error

        def run_pipeline(self, number: int, rows: np.ndarray, *rest: Any) -> tuple[np.ndarray]:
            (batch,) = super().run_pipeline(number, rows, *rest)
            return (self.finished(number, batch),)

        def next_batch(self) -> np.ndarray:
            """The next batch. Raises what ended the thread, if it ends without one."""
            while True:
                alive = self.is_alive()  # asked first: when it has ended, what it put is there
                try:
                    found = self.output_queue.get(timeout=POLL)
                except Empty:
                    if alive:
                        continue
                    found = None
                if found is not None:
                    return found[1][0]
                why = self.failure
                if isinstance(why, StoreError | LoaderError):
                    raise why
                text = f"{type(why).__name__}: {why}" if why else "closed"
                raise LoaderError(f"ffcv's thread has ended ({text})") from why

        def stop(self) -> None:
            """End the thread. It may be waiting for room in its queue, and not look up, so make
            room."""
            self.close()
            while self.is_alive():
                with suppress(Empty):
                    self.output_queue.get(timeout=POLL)
            self.join()

    return Epoch


@contextmanager
def alone(workers: int) -> Iterator[None]:
    """numba aborts the process when two threads run in its workqueue; TBB and OpenMP are safe."""
    if workers == 1 or ffcv().numba.threading_layer() != "workqueue":
        yield
        return
    if not _WORKQUEUE.acquire(blocking=False):
        raise LoaderError(
            "numba's workqueue threads serve one ffcv epoch at a time, and one is under way. "
            "`pip install tbb`, or close the other"
        )
    try:
        yield
    finally:
        _WORKQUEUE.release()


def cores() -> int:
    """Threads that ffcv may use: the cores of this process, and no more than numba has started."""
    return min(len(os.sched_getaffinity(0)), ffcv().numba.config.NUMBA_NUM_THREADS)
