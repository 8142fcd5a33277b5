"""What limits the writing of a level, and what is said about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from strata.pipeline.materialize.timing import Done, Timing, limit
from strata.store.write.shard import Published

PARTS = ("reading", "forward pass", "publishing")
SLOW, FAST = 0.03, 0.002


@pytest.mark.parametrize("slow", PARTS)
def test_the_slowest_part_is_named(slow: str) -> None:
    """A level of ten shards of one block, in which one part sleeps longer than the others."""
    said: list[tuple[int, str]] = []
    timing = Timing("forward pass", 1000, lambda done, note="": said.append((done, note)))

    def work(part: str) -> None:
        time.sleep(SLOW if part == slow else FAST)

    def read() -> Iterator[int]:
        for block in range(20):
            work("reading")
            yield block

    def computed() -> Iterator[int]:
        for block in timing.reading(read()):
            with timing.computing():
                work("forward pass")
            timing.tick(50)
            yield block

    for _ in timing.publishing(computed()):
        work("publishing")
    assert limit(timing.shares) == slow
    assert set(timing.shares) == set(PARTS)
    assert sum(timing.shares.values()) == pytest.approx(1)
    assert sum(rows for rows, _ in said) == 1000
    notes = [note for _, note in said if note]
    assert notes
    assert notes[-1].endswith(f"/s, {slow} limits")


def test_a_level_that_is_written_at_once_has_shares_too() -> None:
    timing = Timing("decoding", 10, lambda done, note="": None)
    assert limit(timing.shares) == "decoding"
    assert list(timing.reading([])) == []
    assert sum(timing.shares.values()) == pytest.approx(1)


def test_the_time_of_workers_is_added_up() -> None:
    said: list[tuple[int, str]] = []
    tick = lambda done, note="": said.append((done, note))  # noqa: E731
    timing = Timing("forward pass", 1000, tick, shards=2)
    time.sleep(0.51)
    for shard, worker in enumerate("ab"):
        seconds = {"forward pass": 3.0, "reading": 1.0, "publishing": 0.0}
        timing.done(Done(worker, 50, Published(shard, 10, ""), seconds, peak_bytes=shard))
    assert timing.shares == {"forward pass": 0.75, "reading": 0.25, "publishing": 0.0}
    assert timing.peak_bytes == 1
    assert [rows for rows, _ in said] == [50, 50]
    assert said[0][1].startswith("shard 1 of 2, ")
    assert "images/s by worker: a " in said[0][1]
    assert timing.workers().count(",") == 1


def test_waiting_for_the_turn_to_compute_counts_as_nothing() -> None:
    lock = threading.Lock()
    timing = Timing("decoding", 10, lock=lock)
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    with timing.computing():
        pass
    assert timing.seconds["decoding"] < 0.15
