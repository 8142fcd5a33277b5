"""A clock that tells where the time of writing a level goes: reading, computing, or publishing.

In one process the three work at the same time, so the thread in the middle says which of them
limits: it waits for what is slower than itself. Where all share the same cores, what waits longest
is still what to look at first. Of workers the time of all of them is added up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from strata.pipeline.progress import Tick, size
from strata.store.write.shard import Published

T = TypeVar("T")
NOTE_SECONDS = 0.5
"""Time between two looks at the rate."""
NAMED = 5
"""Workers, and shards that failed, that are named, of however many."""


@dataclass(frozen=True)
class Done:
    """A shard that a worker has published, and what that took."""

    worker: str
    rows: int
    published: Published
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by part of the work: reading, forward pass, publishing."""
    peak_bytes: int = 0
    """Most bytes of tensors on the device, where they were counted."""


class Timing:
    """The clock of one level. Times are in seconds."""

    def __init__(
        self,
        work: str,
        row_bytes: int,
        tick: Tick = lambda done, note="": None,
        *,
        shards: int = 0,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        """
        Args:
            work: what is done between reading and publishing: ``forward pass``.
            row_bytes: of one row, uncompressed.
            tick: of the task that people see.
            shards: that workers are to publish.
            lock: held while a shard is computed: of several threads one computes at a time.
        """
        self._work, self._row_bytes, self._tick = work, row_bytes, tick
        self._shards, self._lock = shards, lock or nullcontext()
        self._begun = self._noted = time.perf_counter()
        self._waited = {"reading": 0.0, "publishing": 0.0}
        self._of_workers, self._rows = Counter[str](), Counter[str]()
        self._count, self._note = 0, ""
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

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute one shard, once it is our turn; the wait for that counts as nothing."""
        asked = time.perf_counter()
        with self._lock:
            self._begun += time.perf_counter() - asked
            yield

    def publishing(self, shards: Iterable[T]) -> Iterator[T]:
        """Pass shards on; the time until the next is asked for counts as publishing."""
        for shard in shards:
            begun = time.perf_counter()
            yield shard
            self._waited["publishing"] += time.perf_counter() - begun

    def tick(self, rows: int) -> None:
        """Count rows that are computed here."""
        self._advance("", rows, lambda rate: f"{rate}, {limit(self.shares)} limits")

    def done(self, shard: Done) -> None:
        """Count a shard that a worker has published."""
        self.peak_bytes = max(self.peak_bytes, shard.peak_bytes)
        self._of_workers.update(shard.seconds)
        self._count += 1
        count = f"shard {self._count} of {self._shards}"
        self._advance(shard.worker, shard.rows, lambda rate: f"{count}, {rate}, {self.workers()}")

    def _advance(self, worker: str, rows: int, note: Callable[[str], str]) -> None:
        self._rows[worker] += rows
        now = time.perf_counter()
        if now - self._noted > NOTE_SECONDS:
            self._noted = now
            rate = self._rows.total() * self._row_bytes / (now - self._begun)
            self._note = note(f"{size(rate)}/s")
        self._tick(rows, self._note)

    def workers(self) -> str:
        """Images per second of every worker: ``"images/s by worker: 0 512, 1 498"``"""
        taken = max(time.perf_counter() - self._begun, 1e-9)
        rows = islice(sorted(self._rows.items()), NAMED)
        named = ", ".join(f"{worker} {count / taken:,.0f}" for worker, count in rows)
        return f"images/s by worker: {named}{' …' if len(self._rows) > NAMED else ''}"

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part: of what workers have published, or of this process so far."""
        if self._of_workers:
            return dict(self._of_workers)
        working = time.perf_counter() - self._begun - sum(self._waited.values())
        return {self._work: max(working, 1e-9), **self._waited}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time that each part took, or kept the others waiting; they add up to 1."""
        seconds = self.seconds
        return {part: taken / sum(seconds.values()) for part, taken in seconds.items()}


def limit(shares: Mapping[str, float]) -> str:
    """The part that takes, or keeps waiting, the longest."""
    return max(shares, key=lambda name: shares[name])
