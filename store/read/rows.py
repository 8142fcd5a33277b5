"""Which rows are to be read, and what every way of reading them has in common.

The levels are views of one x_j and have one geometry. Every row is held to its checksum when it is
first read. ``Level.take`` is the readable twin of all ways, and what they are tested against.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from strata.store.level.layout import Geometry
from strata.store.level.level import Level
from strata.store.memory import aligned


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of some levels (views), in the order in which they are wanted."""

    view: np.ndarray
    """int64 (n,): which of the levels each is in."""
    row: np.ndarray
    """int64 (n,): its number there."""

    @classmethod
    def of(cls, row: np.ndarray, view: int = 0) -> Rows:
        """Rows that are all in one level."""
        return cls(np.broadcast_to(np.int64(view), len(row)), row)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: slice | np.ndarray) -> Rows:
        return Rows(self.view[which], self.row[which])


class RowSource(ABC):
    """Where rows come from. Threads may share it."""

    levels: tuple[Level, ...]
    geometry: Geometry

    def ready(self) -> None:
        """Look at the files before an epoch. Raises LevelDamaged if one is not what was opened."""
        for level in self.levels:
            level.check_sizes()

    @abstractmethod
    def take(self, rows: Rows, out: np.ndarray) -> None:
        """Copy rows.

        Args:
            rows: in any order.
            out: uint8 (n, bytes of a row), C-contiguous.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """

    def close(self) -> None:  # noqa: B027  # not all have something to let go
        """Let files and memory go, if any are held. Nobody may be reading."""


class TakenRows(RowSource):
    """``Level.take``, one view after another: for levels that have nothing better in common, or
    packed ones in an order for which nothing can be kept."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels, self.geometry = tuple(levels), levels[0].geometry
        self._lock = Lock()

    def ready(self) -> None:
        """Level.take looks for itself."""

    def take(self, rows: Rows, out: np.ndarray) -> None:
        order = np.lexsort((rows.row, rows.view))
        for view, level in enumerate(self.levels):
            here = order[rows.view[order] == view]
            found = aligned(len(here) * self.geometry.row_bytes)
            whole = found.view(self.geometry.dtype).reshape(-1, *self.geometry.lying)
            with self._lock:  # what Level keeps of decoded chunks is for one reader
                level.take(rows.row[here], whole)
            out[here] = found.reshape(len(here), self.geometry.row_bytes)


def same_geometry(levels: Sequence[Level]) -> Any:
    """The geometry that all of these levels have. Raises ValueError if one has another."""
    for level in levels:
        if level.geometry != levels[0].geometry:
            raise ValueError(f"{level.key.label} has not the geometry of {levels[0].key.label}")
    return levels[0].geometry
