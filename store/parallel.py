"""Work by a few threads while the caller goes on."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WAITING = 8
"""Items for every thread that are asked for before their results are taken."""
NICENESS = 5
"""What is added to the niceness of threads that publish."""


def map_in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    *,
    waiting: int | None = None,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Results in the order of the items, as ``map`` gives them, of which a few are held at a time.

    Args:
        threads: 1 without an initializer is the caller's own.
        waiting: most items at work or waiting while the next one is made; None: ``WAITING`` for
            every thread.
        initializer: called first by every thread.
    """
    if threads == 1 and initializer is None:
        yield from map(work, items)
        return
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, initializer=initializer) as pool:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > (WAITING * threads if waiting is None else waiting):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def lower_priority() -> None:
    """Let those who compute go before this thread, and the threads that it starts: a forward pass
    runs on all cores at once, and waits for the one that was taken from it."""
    if sys.platform == "linux":  # where threads have a priority of their own
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(19, nice + NICENESS))
