"""What there is of a level that is not committed: which shards a writer need not make again.

A receipt is published once its shard is durable. So names say enough, and a million of them are
listed in seconds; no file is opened. The last shards, which a crash or a failing disk may have met,
are hashed as well, up to ``RECHECKED`` bytes of them, which is all of a level of usual size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from strata.store.ahead import several
from strata.store.files.files import Files
from strata.store.level.layout import Geometry, shard_name
from strata.store.level.level import RECEIPTS, receipt_name

HASH_THREADS = 2
RECHECKED = 4 << 30
"""Bytes of finished shards that are hashed before a writer goes on."""


class Unfinished:
    """A listing of a level's directory, and of its receipts."""

    def __init__(self, directory: Path, geometry: Geometry, files: Files) -> None:
        self._directory, self._files, self._shards = directory, files, geometry.shards
        self._names = set(files.names(directory))
        self._receipts = set(files.names(directory / RECEIPTS))

    def missing(self, is_whole: Callable[[int], bool]) -> list[int]:
        """Shards without a receipt, or that are not what it says.

        Args:
            is_whole: does a shard lie there as its receipt says? Asked of the last ones.
        """
        sound = np.fromiter(map(self._is_vouched, range(self._shards)), bool, self._shards)
        last = self._last(sound)
        for shard, whole in zip(last, several(is_whole, last, HASH_THREADS), strict=True):
            sound[shard] = whole
        return np.flatnonzero(~sound).tolist()

    def has_any(self, shard: int) -> bool:
        """Is there anything of a shard?"""
        return shard_name(shard) in self._names or receipt_name(shard) in self._receipts

    def _is_vouched(self, shard: int) -> bool:
        return receipt_name(shard) in self._receipts and shard_name(shard) in self._names

    def _last(self, sound: np.ndarray) -> list[int]:
        """The last of the vouched shards; one at least."""
        found, left = [], RECHECKED
        for shard in np.flatnonzero(sound)[::-1].tolist():
            left -= self._files.size(self._directory / shard_name(shard))
            if found and left < 0:
                break
            found.append(shard)
        return found[::-1]
