"""Copies to the device on a stream of their own, with streams that are as late as they may be.

A GPU's streams may do what they were given at any time within the order that events prescribe.
These do it at the last moment: a missing event shows as a wrong batch.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import examples
from torch import Tensor

from strata.pipeline.feed.transfer import AHEAD, Transfer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Event:
    """So many pieces of work of a queue."""

    late: Late
    queue: str
    count: int

    def reach(self) -> None:
        self.late.reach(self.queue, self.count)

    def query(self) -> bool:
        """As of torch's: was it reached?"""
        return self.late.done[self.queue] >= self.count


@dataclass
class Late:
    """Two queues of work. Nothing is done before somebody must have it: an event that is waited
    for, or the end."""

    copies: list[Callable[[], None]] = field(default_factory=list)
    uses: list[Callable[[], None]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=lambda: {"copies": 0, "uses": 0})
    most: int = 0

    def reach(self, queue: str, count: int) -> None:
        work = getattr(self, queue)
        while self.done[queue] < count:
            at = self.done[queue]
            self.done[queue] += 1
            work[at]()
            work[at] = lambda: None  # and forget what it was about

    def copy(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
        def run() -> None:
            if after is not None:
                after.reach()
            target.copy_(source)

        self.copies.append(run)
        return Event(self, "copies", len(self.copies))

    def wait(self, event: Event) -> None:
        self.uses.append(event.reach)

    def mark(self) -> Event:
        return Event(self, "uses", len(self.uses))

    def use(self, tensor: Tensor, into: list[Tensor]) -> None:
        """What the consumer's stream does with a batch, some time."""
        self.uses.append(lambda: into.append(tensor.clone()))

    def finish(self) -> None:
        self.reach("uses", len(self.uses))
        self.reach("copies", len(self.copies))


def over(streams: Any) -> Transfer:
    """A transfer with streams of a test in the place of a GPU's."""
    return Transfer(CPU, streams)


def drawn(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, (n, 2, 3, 3), np.uint8).view(np.int8) for n in sizes]


@settings(max_examples=examples(40), deadline=None)
@given(epochs=st.lists(st.lists(st.integers(1, 5), max_size=9), min_size=1, max_size=3))
def test_every_batch_arrives_however_late_the_streams_are(epochs: list[list[int]]) -> None:
    """Batches of any sizes, so that buffers grow; over several epochs, in the same buffers."""
    late = Late()
    transfer, seen, given = over(late), [], []
    for seed, sizes in enumerate(epochs):
        batches = drawn(sizes, seed)
        given += batches
        for tensor in transfer(iter(batches)):
            late.use(tensor, seen)
    late.finish()
    assert len(seen) == len(given)
    assert all(np.array_equal(t.numpy(), b) for t, b in zip(seen, given, strict=True))


@pytest.mark.parametrize("forgotten", ["wait", "mark", "after"])
def test_a_missing_event_would_be_seen(forgotten: str) -> None:
    class Careless(Late):
        def wait(self, event: Event) -> None:
            if forgotten != "wait":
                super().wait(event)

        def mark(self) -> Event:
            return Event(self, "uses", 0) if forgotten == "mark" else super().mark()

        def copy(self, target: Tensor, source: Tensor, after: Event | None):
            found = super().copy(target, source, None if forgotten == "after" else after)
            if forgotten != "wait":
                self.reach("copies", len(self.copies))  # as early as it may be
            return found

    late, batches, seen = Careless(), drawn([4] * 9), []
    for tensor in over(late)(iter(batches)):
        late.use(tensor, seen)
    late.finish()
    assert not all(np.array_equal(t.numpy(), b) for t, b in zip(seen, batches, strict=True))


def test_copies_are_begun_ahead_of_their_use() -> None:
    late, batches = Late(), drawn([4] * 9)
    coming = over(late)(iter(batches))
    next(coming)
    assert len(late.copies) == AHEAD + 1


def test_host_memory_is_held_until_its_copy_is_done_and_no_longer() -> None:
    """The reader's ring takes for free what nobody holds."""
    late, held = Late(), []

    class Batch(np.ndarray):
        """An array that can be watched."""

    def batches() -> Iterator[np.ndarray]:
        for array in drawn([4] * 12):
            batch = array.view(Batch)
            held.append(weakref.ref(batch))
            yield batch
            del batch, array

    alive = []
    for _ in over(late)(batches()):
        gc.collect()
        alive.append(sum(ref() is not None for ref in held))
        late.reach("copies", len(late.copies) - 1)
    assert alive[0] == AHEAD + 1  # nothing was copied yet
    assert max(alive[2:]) <= AHEAD + 2
