"""Shards of raw levels as one array: mapped one after another in place, not copied.

    view 0:  shard 0 | shard 1 | …   view 1:  shard 0 | …

Every shard begins at a multiple of one stride, which is a whole number of pages and of rows. So all
rows of all views lie at one constant distance, and any of them are gathered by one ``np.take``,
whatever shards they are in. Only address space is spent on what lies between two shards.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from strata.store.errors import refusals
from strata.store.level.level import Checks, Level
from strata.store.read.rows import Rows, RowSource, same_geometry

PROT_NONE, MAP_FIXED = 0, 0x10
"""Numbers of Linux, for which Python's mmap has no names."""


class MappedRows(RowSource):
    """Raw levels through the page cache: a row is an address. For levels that fit in memory.

    A shard that is cut short while it is mapped ends the process with SIGBUS, as any map of a file
    does, so :meth:`ready` looks before every epoch.
    """

    memory: np.ndarray
    """uint8, read-only. Gone after :meth:`close`: whoever touches it then crashes."""

    def __init__(self, levels: Sequence[Level]) -> None:
        """
        Raises:
            ValueError: a level is packed or no file, or their geometries differ.
            LevelDamaged: a shard is missing, or has not the size that its commit says.
            StoreRefused: the kernel refuses the maps; a process may have about 65,000, one a shard.
        """
        self.levels, self.geometry = tuple(levels), same_geometry(levels)
        if not levels[0].files.mapped:
            raise ValueError(f"{levels[0].directory} is in an object store, which cannot be mapped")
        if self.geometry.profile != "raw":
            raise ValueError(
                f"{levels[0].key.label} is packed: its rows have no place of their own"
            )
        self.checks = Checks(levels)
        unit = math.lcm(mmap.PAGESIZE, self.geometry.row_bytes)
        stride = -(-self.geometry.shard_rows * self.geometry.row_bytes // unit) * unit
        total = len(levels) * self.geometry.shards * stride
        with refusals(levels[0].directory):
            base = _map(None, total, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        address = base
        self._unmap = weakref.finalize(self, _libc().munmap, base, total)
        self._unmap.atexit = False  # a thread may still read then, and the kernel unmaps anyway
        for level in levels:
            level.check_sizes()
            for shard in range(self.geometry.shards):
                length = self.geometry.rows_in(shard) * self.geometry.row_bytes
                path = level.path(shard)
                with refusals(path), path.open("rb") as file:
                    flags = mmap.MAP_SHARED | MAP_FIXED
                    _map(address, length, mmap.PROT_READ, flags, file.fileno())
                address += stride
        self.memory = np.ctypeslib.as_array((ctypes.c_uint8 * total).from_address(base))
        self.memory.flags.writeable = False
        self._per_shard = stride // self.geometry.row_bytes
        self._rows = self.memory.reshape(-1, self.geometry.row_bytes)

    def places(self, rows: Rows) -> np.ndarray:
        """Where rows begin in :attr:`memory`, in lengths of a row: int64 (n,)."""
        shape, per_shard = self.geometry, self._per_shard
        if per_shard == shape.shard_rows:  # nothing lies between two shards
            if len(self.levels) == 1:
                return rows.row
            return rows.row + rows.view * (shape.shards * per_shard)
        shard, local = np.divmod(rows.row, shape.shard_rows)
        return (rows.view * shape.shards + shard) * per_shard + local

    def take(self, rows: Rows, out: np.ndarray) -> None:
        # mode="clip" lets take write straight into out, without the interpreter's lock.
        self._rows.take(self.places(rows), axis=0, out=out, mode="clip")
        self.checks.check(rows.view, rows.row, out)

    def close(self) -> None:
        self._rows = np.empty((0, 0), np.uint8)
        self._unmap()


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
