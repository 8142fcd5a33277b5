"""What the native feed is compared with, each at the best setting found for it.

    Take          the limit: np.take from a map of one flat file, in exact random order
    Ffcv          its Loader on a .beton of the same bytes
    DataLoader    torch's, over a zarr-python array
    zarr_python   slices of a level in file order
    zarrs         the same through zarrs' codec pipeline
    Tensorstore   the same by its zarr3 driver

A rival is built once; ``epoch`` then delivers every row once and touches nothing that it delivers.
Each lives in a process of its own (feed_worker.py), because using some of them sets the threads of
the whole process, and two epochs of ffcv may abort it. No batch is kept, so wherever a library
allows it the next is written over it: memory that is new to a process costs more than the copy.
zarr-python, zarrs and tensorstore have no fast random rows, so they are let off with file order.
"""

from __future__ import annotations

import json
import mmap
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from feed_levels import Flat
from feed_limits import aligned

Look = Callable[[Any], object]
"""Called with every batch; only to check a rival, as it touches the bytes."""


class Delivered(NamedTuple):
    rows: int
    nbytes: int


class Rival:
    """What all have in common."""

    def prepare(self, seed: int) -> None:
        """Before the clock starts."""

    def epoch(self, seed: int, look: Look | None = None) -> Delivered:
        """Every row once, in batches or slices."""
        raise NotImplementedError

    def forget(self) -> None:
        """Unmap what was read: a page that is mapped cannot be dropped from the page cache."""


class Counter:
    """Adds up what is delivered."""

    def __init__(self, look: Look | None) -> None:
        self.look, self.rows, self.nbytes = look, 0, 0

    def add(self, batch: Any) -> None:
        self.rows += len(batch)
        self.nbytes += batch.nbytes
        if self.look:
            self.look(batch)

    @property
    def total(self) -> Delivered:
        return Delivered(self.rows, self.nbytes)


class Threaded(Rival):
    """Threads that share an epoch, each with buffers of its own that it reuses."""

    def __init__(self, threads: int, shape: tuple[int, ...], dtype: Any, each: int = 1) -> None:
        """``each``: buffers that a thread fills in turn."""
        self.buffers = [[aligned(shape, dtype) for _ in range(each)] for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads)
        self.parts: list[Any] = []

    def read(self, part: Any, buffer: np.ndarray) -> np.ndarray:
        """Read a part into the buffer; the rows that it took of it."""
        raise NotImplementedError

    def epoch(self, seed: int, look: Look | None = None) -> Delivered:
        threads = range(len(self.buffers))
        found = list(self.pool.map(lambda thread: self._work(thread, look), threads))
        return Delivered(sum(f.rows for f in found), sum(f.nbytes for f in found))

    def _work(self, thread: int, look: Look | None) -> Delivered:
        counter = Counter(look)
        buffers = cycle(self.buffers[thread])
        for part in self.parts[thread :: len(self.buffers)]:
            counter.add(self.read(part, next(buffers)))
        return counter.total


# ---- the same bytes in files of their own -------------------------------------------------------


class Take(Threaded):
    """The rows of each batch sorted, the order itself random and drawn before the clock starts."""

    def __init__(self, flat: Flat, batch: int, threads: int) -> None:
        self.map, self.batch = flat.map(), batch
        self.rows = self.map.reshape(flat.rows, -1).view(np.uint8).view(np.ndarray)
        super().__init__(threads, (batch, self.rows.shape[1]), np.uint8)

    def prepare(self, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(self.rows))
        begins = range(0, len(order), self.batch)
        self.parts = [np.sort(order[at : at + self.batch]) for at in begins]

    def read(self, part: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        out = buffer[: len(part)]
        np.take(self.rows, part, axis=0, out=out, mode="clip")  # "raise" would take a copy
        return out

    def forget(self) -> None:
        _forget_map(self.map)


def _forget_map(mapped: Any) -> None:
    mapped._mmap.madvise(mmap.MADV_DONTNEED)


class Ffcv(Rival):
    """ffcv's Loader: RANDOM order through the page cache, or QUASI_RANDOM by reads of its own.

    Two lines can be added to what is shipped: the decoder of arrays is marked ``parallel``, as
    those of images are, and the ring of batches, allocated anew for every epoch, is ``kept``.
    """

    def __init__(
        self,
        beton: Path,
        batch: int,
        workers: int,
        *,
        parallel: bool = False,
        kept: bool = False,
        os_cache: bool = True,
    ) -> None:
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor

        order: Any = OrderOption.RANDOM if os_cache else OrderOption.QUASI_RANDOM
        self.loader = Loader(
            str(beton),
            batch_size=batch,
            num_workers=workers,
            os_cache=os_cache,
            order=order,
            seed=0,
            drop_last=False,
            pipelines={"x": [_decoder(parallel=parallel), ToTensor()]},
        )
        if kept:
            self.loader.graph.allocate_memory = cache(self.loader.graph.allocate_memory)

    def epoch(self, seed: int, look: Look | None = None) -> Delivered:
        self.loader.next_epoch = seed  # which, with the loader's seed, makes its order
        counter, epoch = Counter(look), iter(self.loader)
        for (batch,) in epoch:
            counter.add(batch)
        epoch.close()
        epoch.join()
        return counter.total

    def forget(self) -> None:
        context = getattr(self.loader.memory_manager, "context", None)
        if context is not None and context.mmap is not None:
            _forget_map(context.mmap)


def _decoder(*, parallel: bool) -> Any:
    from ffcv.fields.decoders import NDArrayDecoder

    class Parallel(NDArrayDecoder):
        def generate_code(self) -> Any:
            code = super().generate_code()
            code.is_parallel = True
            return code

    return Parallel() if parallel else NDArrayDecoder()


# ---- readers of the level itself ----------------------------------------------------------------


class ZarrRows:
    """A torch data set of the rows of a level, as one would write it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = json.loads((directory / "x/zarr.json").read_text("utf-8"))["shape"][0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.array[row]

    @cached_property
    def array(self) -> Any:
        """Opened by the process that reads: zarr's thread does not survive a fork."""
        import zarr

        return zarr.open_array(self.directory / "x", mode="r")


class DataLoader(Rival):
    """Shuffled batches by worker processes, which stay; no more than ``batches`` of an epoch."""

    def __init__(self, directory: Path, batch: int, workers: int, batches: int) -> None:
        from torch import Generator
        from torch.utils import data

        rows: Any = ZarrRows(directory)
        self.generator, count = Generator(), min(len(rows), batches * batch)
        order = data.RandomSampler(rows, num_samples=count, generator=self.generator)
        self.loader = data.DataLoader(
            rows,
            batch,
            sampler=order,
            num_workers=workers,
            persistent_workers=True,
            multiprocessing_context="fork",  # as it is for whoever does not spawn this process
        )

    def epoch(self, seed: int, look: Look | None = None) -> Delivered:
        self.generator.manual_seed(seed)
        counter = Counter(look)
        for batch in self.loader:
            counter.add(batch)
        return counter.total


def slices(rows: int, shard_rows: int, step: int) -> list[slice]:
    """Slices of at most ``step`` rows, in file order, none of them over two shards."""

    def found() -> Iterator[slice]:
        for shard in range(0, rows, shard_rows):
            end = min(rows, shard + shard_rows)
            yield from (slice(at, min(at + step, end)) for at in range(shard, end, step))

    return list(found())


class Zarr(Threaded):
    """zarr-python, with one codec pipeline or another."""

    def __init__(
        self, directory: Path, chunks: int, threads: int, settings: dict[str, Any]
    ) -> None:
        """``chunks``: as many in a slice, but no more than half a shard."""
        import zarr
        from zarr.core.buffer import default_buffer_prototype

        zarr.config.set(settings)
        self.array: Any = zarr.open_array(directory / "x", mode="r")
        self.wrap: Any = default_buffer_prototype().nd_buffer.from_ndarray_like
        shard, chunk = self.array.shards[0], self.array.chunks[0]
        step = max(1, min(chunks, shard // chunk // 2)) * chunk
        super().__init__(threads, (step, *self.array.shape[1:]), self.array.dtype)
        self.parts = slices(self.array.shape[0], shard, step)

    def read(self, part: slice, buffer: np.ndarray) -> np.ndarray:
        out = buffer[: part.stop - part.start]
        self.array.get_basic_selection(part, out=self.wrap(out))
        return out


def zarr_python(directory: Path) -> Rival:
    """16 chunks at a time by 2 threads: fewer, more, or other concurrency is no faster."""
    return Zarr(directory, 16, 2, {})


def zarrs(directory: Path, threads: int) -> Rival:
    """Half a shard at a time: a whole raw one is several times slower."""
    pipeline = {"path": "zarrs.ZarrsCodecPipeline", "strict": True}
    settings = {"codec_pipeline": pipeline, "threading.max_workers": threads}
    return Zarr(directory, 32, 2, settings)


class Tensorstore(Rival):
    """tensorstore, with slices of 4 chunks on their way into buffers that are reused."""

    def __init__(self, directory: Path, threads: int, *, mapped: bool = True) -> None:
        """``mapped``: shards are mapped, which is faster unless they must come from the disk."""
        import tensorstore as ts

        limit = {"limit": threads}
        mode = {"file_io_mode": {"mode": "memmap"}} if mapped else {}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{directory}/x/", **mode},
            "context": {"file_io_concurrency": limit, "data_copy_concurrency": limit},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        self.array: Any = ts.open(spec, read=True).result()
        layout = self.array.chunk_layout
        shard, chunk = layout.write_chunk.shape[0], layout.read_chunk.shape[0]
        step = min(4 * chunk, shard)
        self.slices = slices(self.array.shape[0], shard, step)
        shape, dtype = (step, *self.array.shape[1:]), self.array.dtype.numpy_dtype
        self.buffers = [aligned(shape, dtype) for _ in range(2 * threads)]
        self.wrapped: list[Any] = [ts.array(buffer) for buffer in self.buffers]

    def epoch(self, seed: int, look: Look | None = None) -> Delivered:
        counter, under_way = Counter(look), deque[tuple[Any, np.ndarray]]()
        for number, part in enumerate(self.slices):
            if len(under_way) == len(self.buffers):
                _arrived(under_way, counter)
            slot, rows = number % len(self.buffers), part.stop - part.start
            reading = self.wrapped[slot][:rows].write(self.array[part])
            under_way.append((reading, self.buffers[slot][:rows]))
        while under_way:
            _arrived(under_way, counter)
        return counter.total


def _arrived(under_way: deque[tuple[Any, np.ndarray]], counter: Counter) -> None:
    reading, batch = under_way.popleft()
    reading.result()
    counter.add(batch)
