"""The algorithm that finds which depths to cache, and how: a shortest path, exactly.

A level is computed from the nearest cached level below, and so is what a problem reads. So a chain
0 = d_0 < d_1 < … < d_n of cached depths costs what its links cost: between two neighbours, writing
the upper one from the lower one, and solving every layer between them from the lower one. Links do
not know of each other, and a shortest path over (depth, form) is the cheapest chain. The disk need
hold x_0 and two neighbours at a time, so a budget forbids links and changes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def nbytes(self, node: CachedDepth) -> int:
        """Bytes on disk of all levels of a depth."""
        ...

    def write(self, base: CachedDepth, node: CachedDepth) -> float:
        """Seconds to compute a level from the one below and store it."""
        ...

    def solve(self, base: CachedDepth, j: int) -> float:
        """Seconds of all problems at layer j, each reading ``base`` and computing x_{j-1} from
        it."""
        ...


class MemoisedCosts:
    """Costs that are computed once each.

    Args:
        problems: factor on the seconds of solving.
    """

    def __init__(self, costs: Costs, problems: int = 1) -> None:
        self.layers, self._problems = costs.layers, problems
        self.forms, self.nbytes = cache(costs.forms), cache(costs.nbytes)
        self.write, self._solve = cache(costs.write), cache(costs.solve)

    def solve(self, base: CachedDepth, j: int) -> float:
        return self._problems * self._solve(base, j)


@dataclass(frozen=True)
class Chain:
    """A chain of cached levels above x_0, by depth, and what it costs."""

    seconds: float
    """Infinite where nothing fits the budget."""
    chain: tuple[CachedDepth, ...]

    def form(self, depth: int) -> str | None:
        """How x_depth is cached; None: it is computed again each time."""
        return next((node.form for node in self.chain if node.depth == depth), None)


def cheapest_chain(
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
    start, end = CachedDepth(0, START), CachedDepth(costs.layers, "")
    depths = (depth for depth in range(1, costs.layers) if depth not in never)
    nodes = (CachedDepth(depth, form) for depth in depths for form in costs.forms(depth))
    room, best = disk - costs.nbytes(start), [(start, 0, Chain(0.0, ()))]
    for node in (*nodes, end):
        nbytes = costs.nbytes(node) if node.depth < costs.layers else 0
        ways = (
            _extended(costs, so_far, base, node)
            for base, below, so_far in best
            if base.depth < node.depth
            and must.isdisjoint(range(base.depth + 1, node.depth))
            and below + nbytes <= room
        )
        if way := min(ways, key=lambda chain: chain.seconds, default=None):
            best.append((node, nbytes, way))
    last, _, whole = best[-1]
    return Chain(whole.seconds, whole.chain[:-1]) if last == end else Chain(math.inf, ())


def _extended(costs: Costs, so_far: Chain, base: CachedDepth, node: CachedDepth) -> Chain:
    """A chain that goes on from ``base``: the layers up to that of ``node`` are solved, and it is
    written."""
    seconds = so_far.seconds + sum(
        costs.solve(base, j) for j in range(base.depth + 1, node.depth + 1)
    )
    seconds += costs.write(base, node) if node.depth < costs.layers else 0.0
    return Chain(seconds, (*so_far.chain, node))


def other_decision(costs: Costs, best: Chain, depth: int, *, disk: float = math.inf) -> Chain:
    """The cheapest chain that decides differently about one depth."""
    one = frozenset([depth])
    if best.form(depth):
        return cheapest_chain(costs, disk=disk, never=one)
    return cheapest_chain(costs, disk=disk, must=one)
