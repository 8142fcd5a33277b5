"""What limits the writing of a level, and what is said about it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from strata.pipeline.materialize.timing import Timing, limit

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
