"""Shards of some levels, read by position: a file that was cut is an error and not a signal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from strata.store.errors import LevelDamaged
from strata.store.files.files import Opened
from strata.store.files.publish import present
from strata.store.level.level import Checks, Level
from strata.store.read.rows import Rows, RowSource, same_geometry

KEPT_OPEN = 512
"""Shards kept open; a process may usually have 1,024 files."""
BUFFERS = 1024
"""Most buffers that one call of the kernel fills."""


class Descriptors:
    """Open files of shards, by level (view) and number. Threads share it."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self._levels = tuple(levels)
        self._open = lru_cache(KEPT_OPEN)(self._opened)
        self._path = lru_cache(KEPT_OPEN)(lambda view, shard: self._levels[view].path(shard))

    def read(self, view: int, shard: int, offset: int, parts: Sequence[Any]) -> None:
        """Fill some buffers, one after another, from a shard.

        Args:
            parts: uint8 arrays, contiguous; at most 1,024 of them.

        Raises:
            LevelDamaged: the shard is missing or ends before.
            StoreRefused: the file system does not let us, for example for an I/O error.
        """
        wanted, path = sum(map(len, parts)), self._path(view, shard)
        while True:
            with present(path, "its commit lists it"):
                file = self._open(view, shard)  # held: if not kept, it closes when we forget it
                found = file.read(parts, offset)
            if found >= wanted:
                return
            if not found:
                raise LevelDamaged(f"{path} ends at byte {offset:,}; its commit says otherwise")
            # Read on where a read came back early, which the kernel may do at any time.
            wanted, offset, rest = wanted - found, offset + found, []
            for part in parts:
                rest += [part[found:]] if found < len(part) else []
                found = max(0, found - len(part))
            parts = rest

    def fetch(self, view: int, shard: int, offset: int, nbytes: int) -> None:
        """Let the kernel begin to read, and do not wait."""
        with present(self._path(view, shard), "its commit lists it"):
            file = self._open(view, shard)
            file.fetch(offset, nbytes)

    def close(self) -> None:
        self._open.cache_clear()

    def _opened(self, view: int, shard: int) -> Opened:
        level = self._levels[view]
        facts = level.shards[shard]
        return level.files.open(level.path(shard), facts["nbytes"], facts["sha256"])


class ReadRows(RowSource):
    """Raw levels by positional reads: for levels larger than memory, whose maps would thrash."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.geometry, self._checks = same_geometry(levels), Checks(levels)
        self.levels, self._files = tuple(levels), Descriptors(levels)

    def take(self, rows: Rows, out: np.ndarray) -> None:
        """Rows that lie one after another are read at once."""
        order = np.lexsort((rows.row, rows.view))
        view, row = rows.view[order], rows.row[order]
        shard, local = np.divmod(row, self.geometry.shard_rows)
        apart = (np.diff(row) != 1) | (local[1:] == 0) | (np.diff(view) != 0)
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(order)]
        offset = local * self.geometry.row_bytes
        begins = list(zip(view.tolist(), shard.tolist(), offset.tolist(), strict=True))
        places = order.tolist()
        for begin, end in pairwise(edges):
            for at in range(begin, end, BUFFERS):
                parts = [out[i] for i in places[at : min(end, at + BUFFERS)]]
                self._files.read(*begins[at], parts)
        self._checks.check(rows.view, rows.row, out)

    def close(self) -> None:
        self._files.close()
