"""Which depths to cache, and how: the cheapest chain of levels within a disk budget, exactly.

A level is computed from the nearest cached level below, and so is what a problem reads. So a chain
0 = d_0 < d_1 < … < d_n of cached depths costs what its links cost: between two neighbours, writing
the upper one from the lower one, and solving every layer between them from the lower one. Links do
not know of each other, and a shortest path over (depth, form) is the cheapest chain. The disk need
hold x_0 and two neighbours at a time, so a budget forbids links and changes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Protocol

START = "raw"
"""The form of x_0."""


@dataclass(frozen=True)
class CachedDepth:
    """A cached depth, and how it is stored."""

    depth: int
    form: str
    """Profile of the level: ``raw``, ``lz4`` or ``zstd``."""


class Costs(Protocol):
    """Seconds and bytes, for layers 1 … ``layers``."""

    @property
    def layers(self) -> int: ...

    def forms(self, depth: int) -> Sequence[str]:
        """How x_depth may be stored."""
        ...

    def nbytes(self, node: CachedDepth) -> int: ...

    def write(self, base: CachedDepth, node: CachedDepth) -> float:
        """To compute a level from the one below and store it."""
        ...

    def solve(self, base: CachedDepth, j: int) -> float:
        """All problems at layer j, each reading ``base`` and computing x_{j-1} from it."""
        ...


class Tabled:
    """The same costs, each computed once."""

    def __init__(self, costs: Costs) -> None:
        self.layers, self._times = costs.layers, 1
        self.forms, self.nbytes = cache(costs.forms), cache(costs.nbytes)
        self.write, self._once = cache(costs.write), cache(costs.solve)

    def solve(self, base: CachedDepth, j: int) -> float:
        return self._times * self._once(base, j)

    def several(self, times: int) -> Tabled:
        """The same, with every problem solved so many times; they share what is known."""
        other = copy(self)
        other._times = times
        return other


@dataclass(frozen=True)
class Chain:
    """A chain of cached levels above x_0, by depth, and what it costs."""

    seconds: float
    """Infinite where nothing fits the budget."""
    chain: tuple[CachedDepth, ...]

    def form(self, depth: int) -> str | None:
        """How x_depth is cached; None: it is computed again each time."""
        return next((node.form for node in self.chain if node.depth == depth), None)


def choose(
    costs: Costs,
    *,
    disk: float = math.inf,
    must: frozenset[int] = frozenset(),
    never: frozenset[int] = frozenset(),
) -> Chain:
    """The cheapest chain.

    Args:
        disk: bytes that x_0 and two neighbours may take together.
        must, never: depths that are cached, or are not, whatever it costs.
    """
    start = CachedDepth(0, START)
    room = disk - costs.nbytes(start)
    best = {start: Chain(0.0, ())}
    for depth in range(1, costs.layers):
        if depth in never:
            continue
        for node in (CachedDepth(depth, form) for form in costs.forms(depth)):
            ways = (
                _extended(costs, best[base], base, node)
                for base in best
                if _linked(base, node, must) and _bytes(costs, base) + costs.nbytes(node) <= room
            )
            if way := min(ways, key=lambda choice: choice.seconds, default=None):
                best[node] = way
    end = CachedDepth(costs.layers, "")
    whole = (
        Chain(so_far.seconds + _between(costs, base, end), so_far.chain)
        for base, so_far in best.items()
        if _linked(base, end, must) and room >= 0
    )
    return min(whole, key=lambda choice: choice.seconds, default=Chain(math.inf, ()))


def _linked(base: CachedDepth, node: CachedDepth, must: frozenset[int]) -> bool:
    """Is ``node`` above, with nothing between that must be cached?"""
    return base.depth < node.depth and must.isdisjoint(range(base.depth + 1, node.depth))


def _bytes(costs: Costs, base: CachedDepth) -> int:
    """Of a level beside x_0."""
    return costs.nbytes(base) if base.depth else 0


def _extended(costs: Costs, so_far: Chain, base: CachedDepth, node: CachedDepth) -> Chain:
    seconds = so_far.seconds + _between(costs, base, node) + costs.write(base, node)
    return Chain(seconds, (*so_far.chain, node))


def _between(costs: Costs, base: CachedDepth, node: CachedDepth) -> float:
    """Solving the layers above one level, up to that whose output the next one is."""
    return sum(costs.solve(base, j) for j in range(base.depth + 1, node.depth + 1))


def otherwise(costs: Costs, best: Chain, depth: int, *, disk: float = math.inf) -> Chain:
    """The cheapest chain that decides differently about one depth."""
    one = frozenset([depth])
    if best.form(depth):
        return choose(costs, disk=disk, never=one)
    return choose(costs, disk=disk, must=one)
