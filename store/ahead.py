"""Work on many items by a few threads, in their order, without asking for all of it at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_Result = TypeVar("_Result")

WAITING = 8
"""Items for every thread that are asked for before their results are taken."""


def several(
    work: Callable[[Item], _Result], items: Iterable[Item], threads: int
) -> Iterator[_Result]:
    """As ``map``, by so many threads; of a million items a few are held at a time. One thread is
    the caller's own."""
    if threads == 1:
        yield from map(work, items)
        return
    under_way: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > WAITING * threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
