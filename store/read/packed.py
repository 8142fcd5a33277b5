"""Inner chunks of packed levels, decoded where they are wanted, by many threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import local

import numpy as np

from strata.store.errors import LevelDamaged
from strata.store.level.codec import BadChunk, index_bytes, read_index, unpack
from strata.store.level.level import Checks, Level
from strata.store.memory import aligned
from strata.store.read.descriptors import Descriptors
from strata.store.read.rows import Rows, RowSource, same_geometry

INDICES_KEPT = 16_384
"""Indices of shards, which say where their chunks lie, that are kept in memory."""


class Chunks:
    """The chunks of packed levels (views) of equal geometry. Chunk c of a level holds its rows from
    c · chunk_rows on."""

    def __init__(self, levels: Sequence[Level], *, mapped: bool) -> None:
        """
        Args:
            mapped: read through maps, which saves a copy; for levels that stay in the page cache.
        """
        self.levels, self.geometry = tuple(levels), same_geometry(levels)
        self.count = -(-self.geometry.rows // self.geometry.chunk_rows)
        """Chunks of a level."""
        self._per_shard = self.geometry.shard_rows // self.geometry.chunk_rows
        files = levels[0].files
        self._index = lru_cache(INDICES_KEPT)(self._read_index)
        self._files, self._memory = Descriptors(levels), local()
        self._mapped = mapped and files.mapped
        self._fetched = np.zeros((len(levels), self.count), bool)
        self._map = lru_cache(files.maps_kept)(
            lambda view, shard: np.asarray(self.levels[view].mapped(shard))
        )
        self.close = self._files.close

    def decode(self, view: int, chunk: int, out: np.ndarray) -> None:
        """Decode a chunk; rows past the level's last are poison.

        Args:
            out: uint8 (chunk_rows, bytes of a row), C-contiguous.

        Raises:
            LevelDamaged: the shard is missing or cut, or the chunk fails its checksum.
        """
        shard, offset, nbytes = self._place(view, chunk)
        if self._mapped:
            packed = self._map(view, shard)[offset : offset + nbytes]
        else:
            packed = self._scratch("packed", nbytes)[:nbytes]
            self._files.read(view, shard, offset, [packed])
        try:
            unpack(self.geometry, packed, out)
        except BadChunk as error:
            raise LevelDamaged(f"{self.levels[view].path(shard)}: {error}") from None

    def decode_some(self, view: int, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode the chunk that some rows (ascending) are of, and keep these: uint8 (n, bytes of a
        row). Raises as :meth:`decode`."""
        chunk_rows = self.geometry.chunk_rows
        chunk = int(rows[0]) // chunk_rows
        first = chunk * chunk_rows
        if np.array_equal(rows, np.arange(first, first + chunk_rows)):
            self.decode(view, chunk, out)
            return
        nbytes = chunk_rows * self.geometry.row_bytes
        decoded = self._scratch("rows", nbytes)[:nbytes].reshape(chunk_rows, -1)
        self.decode(view, chunk, decoded)
        decoded.take(rows - first, axis=0, out=out, mode="clip")

    def fetch(self, view: int, chunk: int) -> None:
        """Let the kernel begin to read a chunk that is wanted soon; one that stays, only once."""
        if not self._fetched[view, chunk]:
            self._files.fetch(view, *self._place(view, chunk))
            self._fetched[view, chunk] = self._mapped

    def _scratch(self, name: str, nbytes: int) -> np.ndarray:
        """Memory of this thread's own, used again by its next chunk."""
        memory = getattr(self._memory, name, None)
        if memory is None or len(memory) < nbytes:
            memory = aligned(nbytes)
            setattr(self._memory, name, memory)
        return memory

    def _place(self, view: int, chunk: int) -> tuple[int, int, int]:
        """Shard, offset and bytes of a chunk."""
        shard, position = divmod(chunk, self._per_shard)
        offset, nbytes = self._index(view, shard)[position].tolist()
        return shard, offset, nbytes

    def _read_index(self, view: int, shard: int) -> np.ndarray:
        """Where a shard's chunks lie, which its last bytes say."""
        level = self.levels[view]
        nbytes = level.shards[shard]["nbytes"]
        end = np.zeros(min(nbytes, index_bytes(self.geometry)), np.uint8)
        self._files.read(view, shard, nbytes - len(end), [end])
        try:
            return read_index(self.geometry, end, self.geometry.rows_in(shard), nbytes)
        except BadChunk as error:
            raise LevelDamaged(f"{level.path(shard)}: {error}") from None


class LoadedRows(RowSource):
    """Packed levels decoded into memory, once: a row of theirs costs a whole chunk."""

    def __init__(
        self, levels: Sequence[Level], threads: int, tick: Callable[[int], None] = lambda rows: None
    ) -> None:
        """
        Args:
            tick: called with the rows that were decoded since the last call.

        Raises:
            LevelDamaged: as :meth:`take` of the others.
        """
        self.geometry, checks = same_geometry(levels), Checks(levels)
        row_bytes, each = self.geometry.row_bytes, self.geometry.chunk_rows
        self._rows = aligned(len(levels) * self.geometry.rows * row_bytes).reshape(-1, row_bytes)
        chunks = Chunks(levels, mapped=False)

        def load(view: int, chunk: int) -> int:
            last = min((chunk + 1) * each, self.geometry.rows)
            rows = Rows.of(np.arange(chunk * each, last), view)
            out = self._rows[self._places(rows)[0] :][: len(rows)]
            chunks.decode_some(view, rows.row, out)
            checks.check(rows.view, rows.row, out)
            return len(rows)

        every = [(view, chunk) for view in range(len(levels)) for chunk in range(chunks.count)]
        try:
            with ThreadPoolExecutor(threads) as pool:
                for rows in pool.map(load, *zip(*every, strict=True)):
                    tick(rows)
        finally:
            chunks.close()

    def ready(self) -> None:
        """The files are not needed any more."""

    def take(self, rows: Rows, out: np.ndarray) -> None:
        np.take(self._rows, self._places(rows), axis=0, out=out, mode="clip")

    def close(self) -> None:
        self._rows = np.empty((0, 0), np.uint8)

    def _places(self, rows: Rows) -> np.ndarray:
        """Where rows lie: one view after another."""
        return rows.view * self.geometry.rows + rows.row
