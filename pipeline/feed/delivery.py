"""Rows of some levels as batches on the device: which tier, which loader, and one way to read.

The one seam where stored arrays become tensors. What comes out is what is stored, on the device;
``stages/features/quantise.py`` makes values of it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.buffers import host_memory
from strata.pipeline.feed.ffcv.rows import FfcvBeton, FfcvLevels
from strata.pipeline.feed.prefetch import Reader
from strata.pipeline.feed.transfer import CudaStreams, Transfer
from strata.pipeline.plan.memory import CACHE_SHARE, TierChoice, choose_tier
from strata.pipeline.run.device import ReadOptions, available_memory
from strata.store.level.layout import Geometry
from strata.store.level.level import Level
from strata.store.read.descriptors import ReadRows
from strata.store.read.mapped import MappedRows
from strata.store.read.order import cut
from strata.store.read.packed import LoadedRows
from strata.store.read.pool import Pool
from strata.store.read.rows import Rows, TakenRows

WAITERS = 16
"""Threads that wait for a disk."""
WAIT_BYTES = 256 << 10
"""Bytes that one of them reads at a time."""
LOAD_BYTES = 32 << 20
"""Bytes of rows that are copied to the device tier at a time."""
LOADERS = ("native", "ffcv")


def stored_dtype(geometry: Geometry) -> torch.dtype:
    """torch's name of the dtype that a level's elements are stored in."""
    return torch.from_numpy(np.empty(0, geometry.dtype)).dtype


class Delivery(AbstractContextManager["Delivery"]):
    """Rows of levels of one x_j (views). Close it, or use it in a with statement."""

    choice: TierChoice
    """The tier, and why."""

    def __init__(
        self,
        levels: Sequence[Level],
        options: ReadOptions,
        *,
        once: bool = False,
        beton: Path | None = None,
        tick: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """
        Args:
            once: every row is read once, in order: nothing is gained by keeping what was read.
            beton: for the ffcv loader, where x_0 lies as a .beton; None: raw levels in place.
            tick: called with rows while a tier is filled.

        Raises:
            BudgetError: the tier asked for has no room.
            LoaderError: ffcv cannot be had, or cannot read these.
            LevelDamaged: a file is not what was committed.
        """
        self._held = [level.held for level in levels]
        self._levels, self._options = tuple(level.let_go() for level in levels), options
        self.geometry, self.device = levels[0].geometry, options.device
        self._packed = self.geometry.profile != "raw"
        self.choice = self._choose(once)
        on_gpu = self.device.type == "cuda"
        self._transfer = Transfer(self.device, CudaStreams(self.device)) if on_gpu else None
        self._reader = self._opened(beton, tick)
        self._on_device: Tensor | None = None
        if self.choice.tier == "device":
            self._on_device = self._loaded(tick)
            self._reader.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and unmap. Batches on the CPU stay valid. The levels may be removed."""
        self._reader.close()
        self._held.clear()
        self._on_device = None

    def batches(self, rows: Rows, lengths: Sequence[int]) -> Iterator[Tensor]:
        """The rows asked for, as batches of these lengths.

        Returns:
            Stored elements, for example (length, channel, y, x), on the device, in memory as they
            lie on disk. On a GPU each is valid until the next is asked for; on a CPU as long as it
            is held.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        logical = partial(torch.movedim, source=-1, destination=self.geometry.axis)
        return map(logical, self._as_they_lie(rows, lengths))  # map holds none of them

    def _as_they_lie(self, rows: Rows, lengths: Sequence[int]) -> Iterator[Tensor]:
        """Stored elements (length, …, feature) of the rows."""
        if self._on_device is not None:
            return self._gathered(self._on_device, rows, lengths)
        batches = self._reader.batches(rows, lengths)
        return self._transfer(batches) if self._transfer else map(torch.from_numpy, batches)

    def _gathered(self, stored: Tensor, rows: Rows, lengths: Sequence[int]) -> Iterator[Tensor]:
        """The device tier: batches in memory of their own."""
        index = torch.from_numpy(rows.view * self.geometry.rows + rows.row).to(stored.device)
        for places in index.split(lengths):
            yield stored.index_select(0, places).view(stored_dtype(self.geometry))

    def _loaded(self, tick: Callable[[int], None]) -> Tensor:
        """All rows as stored, one view after another, in the memory of the device."""
        shape, views = self.geometry, len(self._levels)
        dtype = stored_dtype(shape)
        dtype = torch.int16 if dtype == torch.uint16 else dtype  # no GPU gathers uint16
        count, end = views * shape.rows, 0
        stored = torch.empty((count, *shape.lying), dtype=dtype, device=self.device)
        rows = Rows(*np.divmod(np.arange(count), shape.rows))
        lengths = cut(count, max(1, LOAD_BYTES // shape.row_bytes))
        for found in self._as_they_lie(rows, lengths):
            begin, end = end, end + len(found)
            stored[begin:end] = found.view(dtype)
            tick(len(found))
        return stored

    def _choose(self, once: bool) -> TierChoice:
        views, asked = len(self._levels), self._options.tier
        if self._options.loader == "ffcv":
            if asked != "auto":
                raise LoaderError(f"--tier {asked} is for --loader native: ffcv has no tiers")
            return TierChoice("ffcv", "--loader ffcv")
        if once and self._packed:
            return TierChoice("disk", "every chunk is decoded once")
        on_device, on_host = self._options.free()
        # What is read once gains nothing from being held, whatever the problems are told to do.
        return choose_tier(
            "auto" if once and asked == "device" else asked,
            f"x_{self._levels[0].key.depth}" + (f" in {views} views" if views > 1 else ""),
            views * self.geometry.rows * self.geometry.row_bytes,
            packed=self._packed,
            device_free=0 if once else on_device,
            memory_free=on_host,
        )

    def _opened(self, beton: Path | None, tick: Callable[[int], None]) -> Reader:
        levels, tier, threads = self._levels, self.choice.tier, self._options.threads
        allocate = host_memory(self.device)
        if tier == "ffcv":
            rows = FfcvLevels(levels) if beton is None else FfcvBeton(beton, levels[0])
        elif any(level.geometry != self.geometry for level in levels):
            rows = TakenRows(levels)  # two runs have written these views, in shards of two sizes
        elif self._packed and tier == "memory":
            rows = LoadedRows(levels, threads, tick)
        elif self._packed:
            cached = sum(level.nbytes for level in levels) <= CACHE_SHARE * available_memory()
            rows = Pool(levels, mapped=cached)
        elif tier == "disk" or not levels[0].files.mapped:
            return Reader(ReadRows(levels), WAITERS, piece_bytes=WAIT_BYTES, allocate=allocate)
        else:
            rows = MappedRows(levels)
        return Reader(rows, threads, allocate=allocate)
