"""Which levels of a recipe are worth their disk on a machine, and why, depth by depth.

What changes only time and bytes is chosen: the depths, and with ``cache.profile`` auto how each is
stored. Views and precision change what is learned; what others would cost is said, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from strata.pipeline.errors import BudgetError, RecipeError
from strata.pipeline.plan.choose import START, CachedDepth, Chain, Tabled, choose, otherwise
from strata.pipeline.plan.costs import PROFILES, RecipeCosts
from strata.pipeline.progress import duration, size

MOST_PROBLEMS = 64
"""How far a crossover is looked for."""
VIEWS = (1, 2, 4, 8, "canvas")
PRECISIONS = ("float32", "float16", "uint8", "uint4")
"""What else could be cached."""


@dataclass(frozen=True)
class Depth:
    """What is decided about one depth."""

    depth: int
    form: str | None
    """How x_depth is cached; None: it is computed again each time."""
    nbytes: int
    """On disk, if it is cached; else 0."""
    otherwise: float
    """Seconds of the cheapest run that decides differently here."""
    from_problems: int | None
    """The fewest problems per depth with which it is worth caching; None: more than was tried."""
    tier: str | None = None
    """Where its rows lie while a problem reads them, if it is cached."""
    reason: str = ""
    """In a few words."""
    until: int | None = None
    """It leaves the disk once x_until is written; None: it stays."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "otherwise": _finite(self.otherwise)}


@dataclass(frozen=True)
class Way:
    """Another way to cache, and what the best run costs with it: other features are learned."""

    views: int | str
    precision: str
    seconds: float
    nbytes: int
    """Of the levels that are then worth caching."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "seconds": _finite(self.seconds)}


@dataclass(frozen=True)
class Worth:
    """A recipe on a machine: what to cache, and what that saves. Times are in seconds."""

    machine: str
    source: str
    problems: int
    best: float
    always: float
    """Every depth cached, each in its cheapest form."""
    never: float
    profiles: dict[str, float]
    """The best, were all levels stored in this profile: the values would be the same."""
    depths: tuple[Depth, ...]
    ways: tuple[Way, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "source": self.source,
            "problems": self.problems,
            "seconds": {
                "best": _finite(self.best),
                "always": _finite(self.always),
                "never": _finite(self.never),
            },
            "profiles": {name: _finite(value) for name, value in self.profiles.items()},
            "depths": [depth.as_json() for depth in self.depths],
            "other_ways": [way.as_json() for way in self.ways],
        }


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: None is what cannot be had."""
    return seconds if seconds < math.inf else None


def weigh(costs: RecipeCosts, disk: float = math.inf) -> Worth:
    """The cheapest way, and what each decision of it is worth.

    Args:
        disk: bytes that the run may take.
    """
    known = Tabled(replace(costs, problems=1))
    table, between = known.several(costs.problems), range(1, costs.layers)
    best, every = choose(table, disk=disk), frozenset(between)
    fewest, leaving = _crossovers(known, disk), evicted(costs, best, disk)
    reasons = _Reasons(costs, table, best, disk)
    depths = []
    for depth in between if best.seconds < math.inf else ():
        other = otherwise(table, best, depth, disk=disk).seconds
        nbytes = sum(table.nbytes(node) for node in best.chain if node.depth == depth)
        facts = (_tier(costs, best, depth), reasons.of(depth, other), leaving.get(depth))
        depths.append(Depth(depth, best.form(depth), nbytes, other, fewest.get(depth), *facts))
    return Worth(
        costs.machine.name,
        costs.machine.source,
        costs.problems,
        best.seconds,
        choose(table, disk=disk, must=every).seconds,
        choose(table, disk=disk, never=every).seconds,
        {name: _best(costs.stored_as(name), disk).seconds for name in PROFILES},
        tuple(depths),
        tuple(_ways(costs, disk)),
    )


def _best(costs: RecipeCosts, disk: float) -> Chain:
    return choose(Tabled(costs), disk=disk)


def evicted(costs: RecipeCosts, best: Chain, disk: float) -> dict[int, int]:
    """Which level leaves the disk once which other is written, by depth; none where all fit."""
    chain = best.chain
    if sum(map(costs.nbytes, (CachedDepth(0, START), *chain))) <= disk:
        return {}
    return {node.depth: above.depth for node, above in pairwise(chain)}


def _tier(costs: RecipeCosts, best: Chain, depth: int) -> str | None:
    form = best.form(depth)
    with suppress(BudgetError):
        return costs.held(CachedDepth(depth, form)).tier if form else None
    return None


def _crossovers(known: Tabled, disk: float) -> dict[int, int]:
    """For each depth the fewest problems with which it is cached."""
    found: dict[int, int] = {}
    problems = 1
    while problems <= MOST_PROBLEMS and len(found) < known.layers - 1:
        for node in choose(known.several(problems), disk=disk).chain:
            found.setdefault(node.depth, problems)
        problems += 1
    return found


@dataclass(frozen=True)
class _Reasons:
    """Why a depth is cached, or is not: by an epoch of the problem right above it."""

    costs: RecipeCosts
    table: Tabled
    best: Chain
    disk: float

    def of(self, depth: int, other: float) -> str:
        """
        Args:
            other: seconds of the cheapest run that decides differently about ``depth``.
        """
        if not self.costs.forms(depth):
            return "fresh draws cannot be cached"
        form = self.best.form(depth)
        if not form and self.disk < math.inf and choose(self.table).form(depth):
            return f"over the budget of {size(self.disk)}"
        base = self._base(depth)
        node = CachedDepth(depth, form or self._form(base, depth))
        read, again = self.costs.reading(node), self.costs.recomputing(base, depth)
        if read >= again and form:
            return f"it spares {_told(other - self.best.seconds)} in all"
        if read >= again:
            return f"computing {_told(again)} < reading {_told(read)} per epoch"
        faster = f"reading {_told(read)} < computing {_told(again)} per epoch"
        written = _told(self.table.write(base, node))
        return faster if form else f"{faster}, but writing takes {written}"

    def _base(self, depth: int) -> CachedDepth:
        """What x_depth would be computed from."""
        below = [node for node in self.best.chain if node.depth < depth]
        return below[-1] if below else CachedDepth(0, START)

    def _form(self, base: CachedDepth, depth: int) -> str:
        """The cheapest for the problem right above."""

        def seconds(form: str) -> float:
            node = CachedDepth(depth, form)
            return self.table.write(base, node) + self.table.solve(node, depth + 1)

        return min(self.costs.forms(depth), key=seconds)


def _told(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _ways(costs: RecipeCosts, disk: float) -> Iterator[Way]:
    """All that the recipe allows, its own among them."""
    own, precision = costs.recipe.augment.views, costs.recipe.cache.precision
    every = VIEWS if own in (*VIEWS, 0) else (own, *VIEWS)
    for count in every:
        for name in PRECISIONS if precision in PRECISIONS else (precision, *PRECISIONS):
            with suppress(RecipeError):  # a canvas that does not divide
                yield _way(costs, count, name, disk)


def _way(costs: RecipeCosts, count: int | str, precision: str, disk: float) -> Way:
    recipe = costs.recipe
    augment = replace(recipe.augment, views=count, allow_single_view=True)
    cache = replace(recipe.cache, precision=precision)
    other = replace(costs, recipe=replace(recipe, augment=augment, cache=cache))
    best = _best(other, disk)
    return Way(count, precision, best.seconds, sum(map(other.nbytes, best.chain)))
