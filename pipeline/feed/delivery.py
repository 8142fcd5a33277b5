"""Rows of some levels as batches on the device: which tier, which loader, and one way to read.

The one seam where stored arrays become tensors. What comes out is what is stored, on the device;
``stages/features/quantise.py`` makes values of it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.prefetch import Reader
from strata.pipeline.feed.resident import Resident
from strata.pipeline.feed.transfer import CudaStreams, Transfer, host_memory
from strata.pipeline.plan.tiers import CACHE_SHARE, TierChoice, choose_tier
from strata.pipeline.run.device import ReadOptions, available_memory
from strata.store.level.level import Level
from strata.store.read.pool import Pool
from strata.store.read.rows import LoadedRows, MappedRows, ReadRows, Rows, TakenRows

if TYPE_CHECKING:
    from strata.pipeline.feed.ffcv.rows import FfcvRows

WAITERS = 16
"""Threads that wait for a disk."""
WAIT_BYTES = 256 << 10
"""What one of them reads at a time."""
LOADERS = ("native", "ffcv")

_Tick = Callable[[int], None]


class Delivery:
    """Rows of levels of one x_j (views), by number: view · rows + row. Close it, or use it in a
    with statement."""

    choice: TierChoice
    """The tier, and why."""

    def __init__(
        self,
        levels: Sequence[Level],
        machine: ReadOptions,
        *,
        once: bool = False,
        beton: Path | None = None,
        tick: _Tick = lambda rows: None,
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
        self._levels, self._machine = tuple(levels), machine
        self.geometry = levels[0].geometry
        self.choice = self._choose(once)
        transfer = None
        if machine.device.type == "cuda":
            transfer = Transfer(machine.device, CudaStreams(machine.device))
        self._to_device = transfer or _as_tensors
        self._reader = _ffcv(levels, beton, machine) or self._native(tick)
        self._resident: Resident | None = None
        if self.choice.tier == "device":
            self._resident = Resident(
                self.geometry, len(levels), machine.device, self._streamed, tick
            )
            self._reader.close()

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and unmap. Batches on the CPU stay valid."""
        self._reader.close()
        self._resident = None

    def batches(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """The rows of each part, in the order asked for.

        Args:
            parts: int64 row numbers, one array per batch.

        Returns:
            Stored elements (len(part), channel, y, x) on the device. On a GPU each is valid until
            the next is asked for; on a CPU as long as it is held.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        if self._resident is not None:
            return self._resident.batches(parts)
        return self._streamed(parts)

    def _streamed(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        return self._to_device(self._reader.batches(parts))

    def _choose(self, once: bool) -> TierChoice:
        views, machine = len(self._levels), self._machine
        if machine.loader == "ffcv":
            if machine.tier != "auto":
                raise LoaderError(
                    f"--tier {machine.tier} is for --loader native: ffcv has no tiers"
                )
            return TierChoice("ffcv", "--loader ffcv")
        packed = self.geometry.profile != "raw"
        if once and packed:
            return TierChoice("disk", "every chunk is decoded once")
        # What is read once gains nothing from being held, whatever the problems are told to do.
        asked = "auto" if once and machine.tier == "device" else machine.tier
        on_device, on_host = machine.free()
        what = f"x_{self._levels[0].key.depth}" + (f" in {views} views" if views > 1 else "")
        return choose_tier(
            asked,
            what,
            views * self.geometry.rows * self.geometry.row_bytes,
            packed=packed,
            device_free=0 if once else on_device,
            memory_free=on_host,
        )

    def _native(self, tick: _Tick) -> Reader:
        rows = self._rows(tick)
        allocate = host_memory(self._machine.device)
        if isinstance(rows, ReadRows):
            return Reader(rows, WAITERS, piece_bytes=WAIT_BYTES, allocate=allocate)
        return Reader(rows, self._machine.threads, allocate=allocate)

    def _rows(self, tick: _Tick) -> Rows:
        levels, packed = self._levels, self.geometry.profile != "raw"
        if any(level.geometry != self.geometry for level in levels):
            return TakenRows(levels)  # two runs have written these views, in shards of two sizes
        if self.choice.tier == "memory" and packed:
            return LoadedRows(levels, self._machine.threads, tick)
        if packed:
            stays = sum(level.nbytes for level in levels) <= CACHE_SHARE * available_memory()
            return Pool(levels, mapped=stays)
        by_position = self.choice.tier == "disk" or not levels[0].files.mapped
        return ReadRows(levels) if by_position else MappedRows(levels)


def _as_tensors(batches: Iterator[np.ndarray]) -> Iterator[Tensor]:
    return map(torch.from_numpy, batches)


def _ffcv(levels: Sequence[Level], beton: Path | None, machine: ReadOptions) -> FfcvRows | None:
    if machine.loader != "ffcv":
        return None
    from strata.pipeline.feed.ffcv.rows import FfcvRows

    if beton is not None:
        return FfcvRows.of_beton(beton, levels[0], machine.threads)
    return FfcvRows.of_levels(levels, machine.threads)
