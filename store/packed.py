"""Inner chunks of packed levels, decoded where they are wanted, by many threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from store.codec import BadChunk, read_index, unpack
from store.descriptors import Descriptors
from store.errors import LevelDamaged
from store.level import SHARDS_OPEN, Level
from store.mapped import same_geometry
from store.memory import aligned


class Chunks:
    """The chunks of packed levels of equal geometry. Chunk c of view v has the number
    v · chunks + c, and holds the rows from v · rows + c · chunk_rows on."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels, self.geometry = tuple(levels), same_geometry(levels)
        self.per_level = -(-self.geometry.rows // self.geometry.chunk_rows)
        self._per_shard = self.geometry.shard_rows // self.geometry.chunk_rows
        self._index = lru_cache(SHARDS_OPEN)(self._read_index)
        files = Descriptors(levels)
        self._read, self._fetch = files.read, files.fetch
        self.check_sizes, self.close = files.check_sizes, files.close

    def __len__(self) -> int:
        return len(self.levels) * self.per_level

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The chunk of every row: int64 (n,)."""
        view, row = np.divmod(numbers, self.geometry.rows)
        return view * self.per_level + row // self.geometry.chunk_rows

    def rows(self, chunk: int) -> tuple[int, int]:
        """Number of the first row, and one past the last."""
        view, local = divmod(chunk, self.per_level)
        first = local * self.geometry.chunk_rows
        last = min(first + self.geometry.chunk_rows, self.geometry.rows)
        return view * self.geometry.rows + first, view * self.geometry.rows + last

    def empty(self) -> np.ndarray:
        """Room for one decoded chunk: uint8 (chunk_rows, bytes of a row)."""
        row_bytes = self.geometry.row_bytes
        return aligned(self.geometry.chunk_rows * row_bytes).reshape(-1, row_bytes)

    def decode(self, chunk: int, out: np.ndarray) -> None:
        """Decode a chunk; rows past the level's last are poison.

        Args:
            out: as :meth:`empty`, C-contiguous.

        Raises:
            LevelDamaged: the shard is missing or cut, or the chunk fails its checksum.
        """
        shard, offset, nbytes = self._place(chunk)
        packed = aligned(nbytes)
        self._read(shard, offset, [packed])
        try:
            unpack(self.geometry, packed, out)
        except BadChunk as error:
            raise self._damaged(shard, error) from None

    def fetch(self, chunk: int) -> None:
        """Let the kernel begin to read a chunk that is wanted soon."""
        self._fetch(*self._place(chunk))

    def _place(self, chunk: int) -> tuple[int, int, int]:
        """Shard, offset and bytes of a chunk."""
        view, local = divmod(chunk, self.per_level)
        shard, position = divmod(local, self._per_shard)
        number = view * self.geometry.shards + shard
        offset, nbytes = self._index(number)[position].tolist()
        return number, offset, nbytes

    def _read_index(self, number: int) -> np.ndarray:
        view, shard = divmod(number, self.geometry.shards)
        level = self.levels[view]
        first, last = self.geometry.shard_range(shard)
        try:
            return read_index(self.geometry, level.mapped(shard), last - first)
        except BadChunk as error:
            raise self._damaged(number, error) from None

    def _damaged(self, number: int, error: BadChunk) -> LevelDamaged:
        view, shard = divmod(number, self.geometry.shards)
        return LevelDamaged(f"{self.levels[view].path(shard)}: {error}")
