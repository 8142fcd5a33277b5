"""Where the time of writing a level goes: reading, computing, or publishing.

The three work at the same time, so the thread in the middle says which of them limits: it waits for
what is slower than itself. Where all share the same cores, what waits longest is still what to
look at first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np

from strata.pipeline.progress import Tick, size

T = TypeVar("T")
ShardRows = Iterator[tuple[int, np.ndarray]]
"""Number and stored elements, (rows, channel, y, x), of some shards."""
Turn = AbstractContextManager[Any]
ALONE: Turn = nullcontext()
"""Nobody else computes."""
NOTE_SECONDS = 0.5
"""Between two looks at the rate."""


class Line:
    """One level being written. Times are in seconds."""

    def __init__(self, work: str, row_bytes: int, tick: Tick) -> None:
        """
        Args:
            work: what the thread in the middle does: ``forward pass``.
            row_bytes: of one row, uncompressed.
            tick: of the task that people see.
        """
        self._work, self._row_bytes, self._tick = work, row_bytes, tick
        self._begun = self._noted = time.perf_counter()
        self._waited = {"reading": 0.0, "publishing": 0.0}
        self._rows, self._note = 0, ""
        self.peak_bytes = 0
        """Most bytes of tensors on the device, where they were counted."""

    def reading(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as reading."""
        coming = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(coming, None)
            self._waited["reading"] += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def publishing(self, shards: Iterable[T]) -> Iterator[T]:
        """The same shards; the time until the next is asked for counts as publishing."""
        for shard in shards:
            begun = time.perf_counter()
            yield shard
            self._waited["publishing"] += time.perf_counter() - begun

    def tick(self, rows: int) -> None:
        """Some rows are computed."""
        self._rows += rows
        now = time.perf_counter()
        if now - self._noted > NOTE_SECONDS:
            self._noted = now
            rate = self._rows * self._row_bytes / (now - self._begun)
            self._note = f"{size(rate)}/s, {self.limit} limits"
        self._tick(rows, self._note)

    @property
    def shares(self) -> dict[str, float]:
        """What share of the time so far each part kept the others waiting; they add up to 1."""
        whole = max(time.perf_counter() - self._begun, 1e-9)
        waited = {name: seconds / whole for name, seconds in self._waited.items()}
        return {self._work: 1 - sum(waited.values()), **waited}

    @property
    def limit(self) -> str:
        """The part that limits."""
        shares = self.shares
        return max(shares, key=lambda name: shares[name])


class Together:
    """The same of many workers: where the time of all of them went, and who did how much."""

    def __init__(self, work: str) -> None:
        self._seconds = {work: 1e-9}
        self._rows: dict[str, int] = {}
        self._begun = time.perf_counter()
        self.peak_bytes = 0
        """Of the worker that took most."""

    def add(self, worker: str, rows: int, seconds: Mapping[str, float], peak_bytes: int) -> None:
        """A shard that a worker has done."""
        self._rows[worker] = self._rows.get(worker, 0) + rows
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        for part, taken in seconds.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + taken

    @property
    def shares(self) -> dict[str, float]:
        """As of one line."""
        whole = sum(self._seconds.values())
        return {part: taken / whole for part, taken in self._seconds.items()}

    @property
    def limit(self) -> str:
        """The part that takes most of the time."""
        return max(self._seconds, key=lambda part: self._seconds[part])

    @property
    def rates(self) -> dict[str, float]:
        """Rows per second of every worker that did any."""
        taken = max(time.perf_counter() - self._begun, 1e-9)
        return {worker: rows / taken for worker, rows in sorted(self._rows.items())}
