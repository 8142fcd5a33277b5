"""Shards of raw levels as one piece of memory: mapped one after another in place, not copied.

    view 0:  shard 0 | shard 1 | …   view 1:  shard 0 | …

Every shard begins at a multiple of the same stride, a whole number of pages, so where a row lies is
arithmetic. Only the rows of a shard are mapped; its index and what rounds it up are not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import LoaderError
from store.errors import refusals
from store.level import Level, check_size

PROT_NONE, MAP_FIXED = 0, 0x10
"""Of Linux; Python's mmap has no names for them."""


class Mapped:
    """The rows of some raw levels of equal geometry, by global number: view · rows + row.

    A shard that is cut short while it is mapped ends the process with SIGBUS, as any map of a file
    does, so :meth:`check_sizes` looks before every epoch.
    """

    memory: np.ndarray
    """uint8, read-only. Gone after :meth:`close`: whoever touches it then crashes."""

    def __init__(self, levels: Sequence[Level]) -> None:
        """
        Raises:
            LoaderError: a level is packed.
            LevelDamaged: a shard is missing, or has not the size that its commit says.
            StoreRefused: the kernel refuses the maps; a process may have about 65,000, one a shard.
        """
        self.levels = tuple(levels)
        self.geometry = levels[0].geometry
        for level in levels:
            if level.geometry.profile != "raw":
                raise LoaderError(
                    f"ffcv reads raw levels in place; {level.key.label} is packed with "
                    f"{level.geometry.profile}. Use the native loader, or 'cache.profile' raw"
                )
            if level.geometry != self.geometry:
                raise ValueError(f"{level.key.label} has not the geometry of the other levels")
        page = mmap.PAGESIZE
        self._stride = -(-self.geometry.shard_rows * self.geometry.row_bytes // page) * page
        total = len(levels) * self.geometry.shards * self._stride
        with refusals(levels[0].directory):
            base = _map(None, total, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.close = weakref.finalize(self, _libc().munmap, base, total)
        """Unmap. Nobody may be reading."""
        self.close.atexit = False  # a thread may still read then, and the kernel unmaps anyway
        for number, (path, nbytes, rows) in enumerate(self._shards()):
            length = rows * self.geometry.row_bytes
            _map_file(path, nbytes, base + number * self._stride, length)
        self.memory = np.ctypeslib.as_array((ctypes.c_uint8 * total).from_address(base))
        self.memory.flags.writeable = False

    def __len__(self) -> int:
        return len(self.levels) * self.geometry.rows

    def offsets(self) -> np.ndarray:
        """Where every row begins in :attr:`memory`: uint64 (rows of all levels,), ascending."""
        view, row = np.divmod(np.arange(len(self)), self.geometry.rows)
        shard, local = np.divmod(row, self.geometry.shard_rows)
        at = (view * self.geometry.shards + shard) * self._stride + local * self.geometry.row_bytes
        return at.astype(np.uint64)

    def check_sizes(self) -> None:
        """Raises LevelDamaged if a shard is gone or was cut since it was mapped."""
        for path, nbytes, _ in self._shards():
            check_size(path, nbytes)

    def check_rows(self, rows: np.ndarray, stored: np.ndarray) -> None:
        """Hold rows to the checksums of their levels. Arguments and errors of Level.check."""
        edges = np.searchsorted(rows, np.arange(len(self.levels) + 1) * self.geometry.rows)
        for view, level in enumerate(self.levels):
            part = slice(edges[view], edges[view + 1])
            level.check(rows[part] - view * self.geometry.rows, stored[part])

    def _shards(self) -> Iterator[tuple[Path, int, int]]:
        """Path, bytes and rows of every shard, in the order of the maps."""
        for level in self.levels:
            for number, shard in enumerate(level.shards):
                first, last = self.geometry.shard_range(number)
                yield level.directory / shard["key"], shard["nbytes"], last - first


def _map_file(path: Path, nbytes: int, address: int, length: int) -> None:
    """Put the first ``length`` bytes of a shard of ``nbytes`` at an address that is reserved."""
    check_size(path, nbytes)
    with refusals(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _map(address, length, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, descriptor)
        finally:
            os.close(descriptor)


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
    """mmap(2) from the start of a file. Raises OSError."""
    found = _libc().mmap(address, length, protection, flags, descriptor, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return found


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    size, number, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_longlong]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    return libc
