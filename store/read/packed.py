"""Inner chunks of packed levels, decoded where they are wanted, by many threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import local

import numpy as np

from strata.store.errors import LevelDamaged
from strata.store.level.codec import BadChunk, index_bytes, read_index, unpack
from strata.store.level.level import Level
from strata.store.memory import aligned
from strata.store.read.descriptors import Descriptors
from strata.store.read.mapped import same_geometry

INDICES_KEPT = 16_384
"""Indices of shards, which say where their chunks lie, that are kept in memory."""


class Chunks:
    """The chunks of packed levels of equal geometry. Chunk c of view v has the number
    v · chunks + c, and holds the rows from v · rows + c · chunk_rows on."""

    def __init__(self, levels: Sequence[Level], *, mapped: bool) -> None:
        """
        Args:
            mapped: read through maps, which saves a copy; for levels that stay in the page cache.
        """
        self.levels, self.geometry = tuple(levels), same_geometry(levels)
        self.per_level = -(-self.geometry.rows // self.geometry.chunk_rows)
        self._per_shard = self.geometry.shard_rows // self.geometry.chunk_rows
        files = levels[0].files
        self._index = lru_cache(INDICES_KEPT)(self._read_index)
        self._files, self._memory = Descriptors(levels), local()
        self._mapped, self._by_map = mapped and files.mapped, files.mapped
        self._fetched = np.zeros(len(self), bool)
        self._map = lru_cache(files.maps_kept)(self._mapped_shard)
        self.close = self._files.close

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
        if self._mapped:
            packed = self._map(shard)[offset : offset + nbytes]
        else:
            packed = self._scratch("packed", nbytes)[:nbytes]
            self._files.read(shard, offset, [packed])
        try:
            unpack(self.geometry, packed, out)
        except BadChunk as error:
            raise LevelDamaged(f"{self._files.path(shard)}: {error}") from None

    def decode_some(self, chunk: int, numbers: np.ndarray, out: np.ndarray) -> None:
        """Decode a chunk, and keep these of its rows: uint8 (n, bytes of a row). Raises as
        :meth:`decode`."""
        nbytes = self.geometry.chunk_rows * self.geometry.row_bytes
        rows = self._scratch("rows", nbytes)[:nbytes].reshape(self.geometry.chunk_rows, -1)
        self.decode(chunk, rows)
        rows.take(numbers - self.rows(chunk)[0], axis=0, out=out, mode="clip")

    def _scratch(self, name: str, nbytes: int) -> np.ndarray:
        """Memory of this thread's own, used again by its next chunk."""
        memory = getattr(self._memory, name, None)
        if memory is None or len(memory) < nbytes:
            memory = aligned(nbytes)
            setattr(self._memory, name, memory)
        return memory

    def fetch(self, chunk: int) -> None:
        """Let the kernel begin to read a chunk that is wanted soon; one that stays, only once."""
        if not self._fetched[chunk]:
            self._files.fetch(*self._place(chunk))
            self._fetched[chunk] = self._mapped

    def _place(self, chunk: int) -> tuple[int, int, int]:
        """Shard, offset and bytes of a chunk."""
        view, local = divmod(chunk, self.per_level)
        shard, position = divmod(local, self._per_shard)
        number = view * self.geometry.shards + shard
        offset, nbytes = self._index(number)[position].tolist()
        return number, offset, nbytes

    def _mapped_shard(self, number: int) -> np.ndarray:
        level, shard = self._files.of(number)
        return np.asarray(level.mapped(shard))

    def _read_index(self, number: int) -> np.ndarray:
        """Where a shard's chunks lie; read from its end alone where a map costs more than pages."""
        level, shard = self._files.of(number)
        nbytes = level.shards[shard]["nbytes"]
        if self._by_map:
            end = self._mapped_shard(number)
        else:
            end = np.zeros(min(nbytes, index_bytes(self.geometry)), np.uint8)
            self._files.read(number, nbytes - len(end), [end])
        try:
            return read_index(self.geometry, end, self.geometry.rows_in(shard), nbytes)
        except BadChunk as error:
            raise LevelDamaged(f"{level.path(shard)}: {error}") from None
