"""Every row is held to the crc32c in its shard's receipt, once, when a process first reads it.

So a flipped bit, a hole, or a shard of another level is an error and never a feature. Later reads
of the row cost a look at a bitmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from strata.store.errors import LevelDamaged
from strata.store.level.codec import CHECKSUM, crc32c


class Checks:
    """The checksums of some levels of equal geometry.

    Threads may share it: all that can happen is that two of them check the same row.
    """

    def __init__(self, levels: Sequence[Any]) -> None:
        """
        Args:
            levels: committed ones; level.py imports this file, so that it cannot be named here.
        """
        self.levels, self.geometry = tuple(levels), levels[0].geometry
        rows = len(levels), self.geometry.rows
        self._expected = np.empty(rows, CHECKSUM)
        self._have = np.zeros((len(levels), self.geometry.shards), bool)
        self._seen, self._looked_at = np.zeros(rows, bool), 0
        self._all_seen = False

    def check(self, view: np.ndarray, row: np.ndarray, stored: np.ndarray) -> None:
        """Look at the rows that were not looked at before.

        Args:
            view: int64 (n,), which of the levels each is in.
            row: int64 (n,), its number there; in any order.
            stored: the same rows as read, (n, …) of any dtype, each of them contiguous.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        if self._all_seen:
            return
        new = np.flatnonzero(~self._seen[view, row])
        if not len(new):
            return
        asked = view[new], row[new]
        self._have_receipts(*asked)
        found = np.fromiter((crc32c(stored[i]) for i in new), CHECKSUM, len(new))
        if len(wrong := np.flatnonzero(found != self._expected[asked])):
            first, number = min((int(asked[0][i]), int(asked[1][i])) for i in wrong)
            path = self.levels[first].path(number // self.geometry.shard_rows)
            raise LevelDamaged(f"{path}: row {number} is not the one that was written")
        self._seen[asked] = True
        self._looked_at += len(new)  # perhaps too many, if two threads looked at one row
        self._all_seen = self._looked_at >= self._seen.size and bool(self._seen.all())

    def _have_receipts(self, view: np.ndarray, row: np.ndarray) -> None:
        shard = row // self.geometry.shard_rows
        absent = np.flatnonzero(~self._have[view, shard])
        for of, number in sorted({(int(view[i]), int(shard[i])) for i in absent}):
            first, last = self.geometry.shard_range(number)
            self._expected[of, first:last] = self.levels[of].checksums(number)
            self._have[of, number] = True
