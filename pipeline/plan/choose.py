"""The algorithm that finds which depths to cache, and how: a shortest path, exactly.

A level is computed from the nearest cached level below, and so is what a problem reads. So a chain
0 = d_0 < d_1 < … < d_n of cached depths costs what its links cost: between two neighbours, writing
the upper one from the lower one, and solving every layer between them from the lower one. Links do
not know of each other, and a shortest path over (depth, form) is the cheapest chain. The disk need
hold x_0 and two neighbours at a time, so a budget forbids links and changes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class CachedDepth:
    """A cached depth, and how it is stored."""

    depth: int
    form: str
    """Profile of the level: ``raw``, ``lz4`` or ``zstd``."""


X0 = CachedDepth(0, "raw")


@dataclass(frozen=True)
class Costs:
    """The table of what can be done in layers 1 … ``layers``, in bytes and seconds."""

    layers: int
    nbytes: Mapping[CachedDepth, int]
    """Bytes on disk of all levels of a depth, of x_0 and of every way to store x_1 … x_{J-1}."""
    write: Mapping[tuple[CachedDepth, CachedDepth], float]
    """Seconds to compute the levels of a depth from one below, and to store them."""
    solve: Mapping[tuple[CachedDepth, int], float]
    """Seconds of one problem at layer j, which reads a depth and computes x_{j-1} from it."""
    problems: int = 1
    """Solved at every depth, one after another."""

    @cached_property
    def solved(self) -> Mapping[CachedDepth, list[float]]:
        """Seconds of all problems of the next 0, 1, 2, … layers above a depth, that read it."""
        found, layers = dict[CachedDepth, list[float]](), range(1, self.layers + 1)
        for base in self.nbytes:
            seconds = (self.problems * self.solve[base, j] for j in layers[base.depth :])
            found[base] = list(accumulate(seconds, initial=0.0))
        return found


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
    end, best = CachedDepth(costs.layers, ""), {X0: Chain(0.0, ())}
    nodes = (node for node in costs.nbytes if node.depth and node.depth not in never)
    nbytes, room = {**costs.nbytes, X0: 0, end: 0}, disk - costs.nbytes[X0]
    for node in (*nodes, end):
        lowest = max((depth for depth in must if depth < node.depth), default=0)
        ways = (
            (_extended(costs, so_far, base, node), so_far.chain)
            for base, so_far in best.items()
            if lowest <= base.depth < node.depth and nbytes[base] + nbytes[node] <= room
        )
        if way := min(ways, key=lambda found: found[0], default=None):
            best[node] = Chain(way[0], (*way[1], node))
    whole = best.get(end, Chain(math.inf, ()))
    return Chain(whole.seconds, whole.chain[:-1])


def _extended(costs: Costs, so_far: Chain, base: CachedDepth, node: CachedDepth) -> float:
    """Seconds of a chain that goes on from ``base``: the layers up to that of ``node`` are solved,
    and it is written."""
    solving = costs.solved[base][node.depth - base.depth]
    writing = costs.write[base, node] if node.depth < costs.layers else 0.0
    return so_far.seconds + solving + writing


def evicted(costs: Costs, best: Chain, disk: float) -> dict[int, int]:
    """Which level leaves the disk once which other is written, by depth; none where all fit."""
    if sum(costs.nbytes[node] for node in (X0, *best.chain)) <= disk:
        return {}
    return {node.depth: above.depth for node, above in pairwise(best.chain)}
