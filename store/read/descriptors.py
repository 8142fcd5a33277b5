"""Shards of some levels, read by position: a file that was cut is an error and not a signal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

from strata.store.errors import LevelDamaged
from strata.store.files.files import Opened
from strata.store.level.level import Level, present

KEPT_OPEN = 512
"""Shards kept open; a process may usually have 1,024 files."""


class Descriptors:
    """Open files of shards. Shard s of level v has the number v · shards + s. Threads share it."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self._levels, self._shards = tuple(levels), levels[0].geometry.shards
        self._open = lru_cache(KEPT_OPEN)(self._opened)

    def read(self, number: int, offset: int, parts: Sequence[Any]) -> None:
        """Fill some buffers, one after another, from a shard.

        Args:
            parts: uint8 arrays, contiguous; at most 1,024 of them.

        Raises:
            LevelDamaged: the shard is missing or ends before.
            StoreRefused: the file system does not let us, for example for an I/O error.
        """
        wanted = sum(map(len, parts))
        while True:
            with self._naming(number):
                file = self._open(number)  # held: if it is not kept, it closes when we forget it
                found = file.read(parts, offset)
            if found >= wanted:
                return
            if not found:
                path = self.path(number)
                raise LevelDamaged(f"{path} ends at byte {offset:,}; its commit says otherwise")
            # Read on where a read came back early, which the kernel may do at any time.
            wanted, offset, rest = wanted - found, offset + found, []
            for part in parts:
                rest += [part[found:]] if found < len(part) else []
                found = max(0, found - len(part))
            parts = rest

    def fetch(self, number: int, offset: int, nbytes: int) -> None:
        """Let the kernel begin to read, and do not wait."""
        with self._naming(number):
            file = self._open(number)
            file.fetch(offset, nbytes)

    def close(self) -> None:
        self._open.cache_clear()

    def _naming(self, number: int) -> AbstractContextManager[None]:
        return present(self.path(number), "its commit lists it")

    def of(self, number: int) -> tuple[Level, int]:
        """The level of a shard, and the shard's number there."""
        return self._levels[number // self._shards], number % self._shards

    def path(self, number: int) -> Path:
        """The file of a shard."""
        level, shard = self.of(number)
        return level.path(shard)

    def _opened(self, number: int) -> Opened:
        level, shard = self.of(number)
        facts = level.shards[shard]
        return level.files.open(level.path(shard), facts["nbytes"], facts["sha256"])
