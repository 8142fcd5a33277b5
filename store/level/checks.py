"""Every row is held to the crc32c in its shard's receipt, once, when a process first reads it.

So a flipped bit, a hole, or a shard of another level is an error and never a feature. Later reads
of the row cost a look at a bitmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from strata.store.errors import LevelDamaged
from strata.store.level.codec import CHECKSUM, crc32c
from strata.store.level.layout import Geometry


class Checked(Protocol):
    """A committed level, as far as checking its rows asks."""

    @property
    def geometry(self) -> Geometry: ...

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        ...

    def checksums(self, shard: int) -> np.ndarray:
        """crc32c of every row of a shard, uint32 (rows,)."""
        ...


class Checks:
    """The checksums of some levels of equal geometry. Row r of level v has the number v · rows + r.

    Threads may share it: all that can happen is that two of them check the same row.
    """

    def __init__(self, levels: Sequence[Checked]) -> None:
        self.levels, self.geometry = tuple(levels), levels[0].geometry
        rows = len(levels) * self.geometry.rows
        self._expected = np.empty(rows, CHECKSUM)
        self._have = np.zeros(len(levels) * self.geometry.shards, bool)
        self._seen, self._looked_at = np.zeros(rows, bool), 0
        self._all_seen = False

    def check(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Look at the rows that were not looked at before.

        Args:
            numbers: int64 (n,), in any order.
            rows: the same rows as read, (n, …) of any dtype, each of them contiguous.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        if self._all_seen:
            return
        new = np.flatnonzero(~self._seen[numbers])
        if not len(new):
            return
        asked = numbers[new]
        self._have_receipts(asked)
        found = np.fromiter((crc32c(rows[i]) for i in new), CHECKSUM, len(new))
        wrong = asked[found != self._expected[asked]]
        if len(wrong):
            view, row = divmod(int(wrong.min()), self.geometry.rows)
            path = self.levels[view].path(row // self.geometry.shard_rows)
            raise LevelDamaged(f"{path}: row {row} is not the one that was written")
        self._seen[asked] = True
        self._looked_at += len(asked)  # perhaps too many, if two threads looked at one row
        self._all_seen = self._looked_at >= len(self._seen) and bool(self._seen.all())

    def _have_receipts(self, numbers: np.ndarray) -> None:
        geometry = self.geometry
        view, row = np.divmod(numbers, geometry.rows)
        wanted = np.unique(view * geometry.shards + row // geometry.shard_rows)
        absent: list[int] = wanted[~self._have[wanted]].tolist()
        for number in absent:
            of, shard = divmod(number, geometry.shards)
            first, last = (of * geometry.rows + edge for edge in geometry.shard_range(shard))
            self._expected[first:last] = self.levels[of].checksums(shard)
            self._have[number] = True
