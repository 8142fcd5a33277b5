"""Rows of some levels in any order, for many threads: mapped, read by position, or held in memory.

The levels are views of one x_j and have one geometry. Row r of view v has the number v · rows + r.
Every row is held to its checksum when it is first read. ``Level.take`` is the readable twin of all
of these, and what they are tested against.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Lock

import numpy as np

from strata.store.level.checks import Checks
from strata.store.level.layout import Geometry
from strata.store.level.level import Level
from strata.store.memory import aligned
from strata.store.read.descriptors import Descriptors
from strata.store.read.mapped import Mapped, same_geometry
from strata.store.read.packed import Chunks

ReadTask = Callable[[], None]
BUFFERS = 1024
"""Most buffers that one call of the kernel fills."""


class Reading:
    """One epoch: stripes of rows, taken one after another, each perhaps in parts.

    Tasks are begun in the order of their stripes and never raise; several may run at a time. This
    one needs none: its rows can be taken at any time.
    """

    def __init__(self, rows: Rows, stripes: Sequence[np.ndarray]) -> None:
        self._rows, self._stripes = rows, stripes

    def before(self, stripe: int) -> list[ReadTask]:
        """Tasks that must be begun before a stripe is taken."""
        return []

    def take(self, stripe: int, part: slice, out: np.ndarray) -> None:
        """Copy a part of a stripe to ``out``, uint8 (n, bytes of a row). Raises LevelDamaged."""
        self._rows.take(self._stripes[stripe][part], out)

    def after(self, stripe: int) -> list[ReadTask]:
        """Tasks that may be begun once a stripe was taken."""
        return []

    def end(self) -> None:
        """Nothing will be taken any more: whatever waits must go."""

    def close(self) -> None:
        """No task is running any more."""


class Rows(ABC):
    """Where rows come from. Threads may share it."""

    levels: tuple[Level, ...]
    geometry: Geometry

    def ready(self) -> None:
        """Look at the files before an epoch. Raises LevelDamaged if one is not what was opened."""
        for level in self.levels:
            level.check_sizes()

    def begin(self, stripes: Sequence[np.ndarray]) -> Reading:
        """Begin an epoch.

        Args:
            stripes: int64 row numbers, in the order in which they will be taken.
        """
        return Reading(self, stripes)

    @abstractmethod
    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Copy rows.

        Args:
            numbers: int64 (n,), in any order.
            out: uint8 (n, bytes of a row), C-contiguous.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """

    @abstractmethod
    def close(self) -> None:
        """Nobody may be reading."""


class MappedRows(Rows):
    """Raw levels through the page cache: a row is an address. For levels that fit in memory."""

    def __init__(self, levels: Sequence[Level]) -> None:
        """Raises as :class:`strata.store.read.mapped.Mapped` does."""
        self._mapped, self._checks, self.levels = Mapped(levels), Checks(levels), tuple(levels)
        self.geometry, self._rows = self._mapped.geometry, self._mapped.rows

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        # mode="clip" lets take write straight into out, without the interpreter's lock.
        self._rows.take(self._mapped.places(numbers), axis=0, out=out, mode="clip")
        self._checks.check(numbers, out)

    def close(self) -> None:
        self._rows = np.empty((0, 0), np.uint8)
        self._mapped.close()


class ReadRows(Rows):
    """Raw levels by positional reads: for levels larger than memory, whose maps would thrash."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.geometry, self._checks = same_geometry(levels), Checks(levels)
        self.levels, self._files = tuple(levels), Descriptors(levels)

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Rows that lie one after another are read at once."""
        order = np.argsort(numbers, kind="stable")
        view, row = np.divmod(numbers[order], self.geometry.rows)
        shard, local = np.divmod(row, self.geometry.shard_rows)
        files, offsets = view * self.geometry.shards + shard, local * self.geometry.row_bytes
        apart = (np.diff(files) != 0) | (np.diff(local) != 1)
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(order)]
        for begin, end in pairwise(edges):
            for at in range(begin, end, BUFFERS):
                parts = [out[i] for i in order[at : min(end, at + BUFFERS)].tolist()]
                self._files.read(int(files[at]), int(offsets[at]), parts)
        self._checks.check(numbers, out)

    def close(self) -> None:
        self._files.close()


class LoadedRows(Rows):
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
        self.geometry, self._checks = same_geometry(levels), Checks(levels)
        row_bytes = self.geometry.row_bytes
        self._rows = aligned(len(levels) * self.geometry.rows * row_bytes).reshape(-1, row_bytes)
        chunks = Chunks(levels, mapped=False)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for rows in pool.map(lambda c: self._load(chunks, c), range(len(chunks))):
                    tick(rows)
        finally:
            chunks.close()

    def _load(self, chunks: Chunks, chunk: int) -> int:
        first, last = chunks.rows(chunk)
        out = self._rows[first:last]
        if len(out) == self.geometry.chunk_rows:
            chunks.decode(chunk, out)
        else:  # the last chunk is filled up
            chunks.decode_some(chunk, np.arange(first, last), out)
        self._checks.check(np.arange(first, last), out)
        return len(out)

    def ready(self) -> None:
        """The files are not needed any more."""

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        np.take(self._rows, numbers, axis=0, out=out, mode="clip")

    def close(self) -> None:
        self._rows = np.empty((0, 0), np.uint8)


class TakenRows(Rows):
    """``Level.take``, one view after another: for levels that have nothing better in common, or
    packed ones in an order for which nothing can be kept."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels, self.geometry = tuple(levels), levels[0].geometry
        self._lock = Lock()

    def ready(self) -> None:
        """Level.take looks for itself."""

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        order = np.argsort(numbers, kind="stable")
        view, row = np.divmod(numbers[order], self.geometry.rows)
        edges = np.searchsorted(view, np.arange(len(self.levels) + 1))
        for level, (begin, end) in zip(self.levels, pairwise(edges.tolist()), strict=True):
            found = aligned((end - begin) * self.geometry.row_bytes)
            whole = found.view(self.geometry.dtype).reshape(-1, *self.geometry.stored)
            with self._lock:  # what Level keeps of decoded chunks is for one reader
                level.take(row[begin:end], whole)
            out[order[begin:end]] = found.reshape(end - begin, self.geometry.row_bytes)

    def close(self) -> None:
        """A level holds nothing that must be closed."""
