"""Clocks that tell where the time of writing a level goes: reading, computing, or publishing.

The three work at the same time, so the thread in the middle says which of them limits: it waits for
what is slower than itself. Where all share the same cores, what waits longest is still what to
look at first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from strata.pipeline.materialize.cluster.tasks import Done
from strata.pipeline.progress import Tick, size

T = TypeVar("T")
NOTE_SECONDS = 0.5
"""Time between two looks at the rate."""
NAMED = 5
"""Workers, and shards that failed, that are named, of however many."""


class Timing:
    """The clock of one level that this process writes. Times are in seconds."""

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
        """Pass batches on; the time until each is there counts as reading."""
        coming = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(coming, None)
            self._waited["reading"] += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def publishing(self, shards: Iterable[T]) -> Iterator[T]:
        """Pass shards on; the time until the next is asked for counts as publishing."""
        for shard in shards:
            begun = time.perf_counter()
            yield shard
            self._waited["publishing"] += time.perf_counter() - begun

    def tick(self, rows: int) -> None:
        """Count rows that are computed."""
        self._rows += rows
        now = time.perf_counter()
        if now - self._noted > NOTE_SECONDS:
            self._noted = now
            rate = self._rows * self._row_bytes / (now - self._begun)
            self._note = f"{size(rate)}/s, {limit(self.shares)} limits"
        self._tick(rows, self._note)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time so far that each part kept the others waiting; they add up to 1."""
        whole = max(time.perf_counter() - self._begun, 1e-9)
        waited = {name: seconds / whole for name, seconds in self._waited.items()}
        return {self._work: 1 - sum(waited.values()), **waited}


class WorkersTiming:
    """The clock of one level that many workers write: where the time of all of them went, who did
    how much, and what people see of it."""

    def __init__(self, work: str, shards: int, tick: Tick) -> None:
        """
        Args:
            work: what is done between reading and publishing: ``forward pass``.
            shards: that are to be written.
            tick: of the task that people see.
        """
        self._shards, self._tick = shards, tick
        self._begun = self._noted = time.perf_counter()
        self._seconds = {work: 1e-9}
        self._rows: dict[str, int] = {}
        self._nbytes = self._count = 0
        self._note = ""
        self.peak_bytes = 0
        """Most bytes of tensors on the device of any worker."""

    def done(self, shard: Done) -> None:
        """Count a shard that a worker has published."""
        self._rows[shard.worker] = self._rows.get(shard.worker, 0) + shard.rows
        self.peak_bytes = max(self.peak_bytes, shard.peak_bytes)
        for part, taken in shard.seconds.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + taken
        self._nbytes, self._count = self._nbytes + shard.nbytes, self._count + 1
        now = time.perf_counter()
        if now - self._noted > NOTE_SECONDS:
            self._noted = now
            rate = size(self._nbytes / (now - self._begun))
            self._note = f"shard {self._count} of {self._shards}, {rate}/s, {self.workers()}"
        self._tick(shard.rows, self._note)

    def workers(self) -> str:
        """Images per second of every worker: ``"images/s by worker: 0 512, 1 498"``"""
        taken = max(time.perf_counter() - self._begun, 1e-9)
        rows = islice(sorted(self._rows.items()), NAMED)
        named = ", ".join(f"{worker} {count / taken:,.0f}" for worker, count in rows)
        return f"images/s by worker: {named}{' …' if len(self._rows) > NAMED else ''}"

    @property
    def shares(self) -> dict[str, float]:
        """Share of the workers' time that each part took; they add up to 1."""
        whole = sum(self._seconds.values())
        return {part: taken / whole for part, taken in self._seconds.items()}


def limit(shares: Mapping[str, float]) -> str:
    """The part that takes, or keeps waiting, the longest."""
    return max(shares, key=lambda name: shares[name])
