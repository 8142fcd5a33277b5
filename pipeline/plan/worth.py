"""The explanation that ``plan`` prints: which levels are worth their disk, and why, by depth.

What changes only time and bytes is chosen: the depths, and with ``cache.profile`` auto how each is
stored. Views and precision change what is learned; what others would cost is said, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from strata.pipeline.errors import BudgetError, RecipeError
from strata.pipeline.plan.choose import (
    START,
    CachedDepth,
    Chain,
    MemoisedCosts,
    cheapest_chain,
    other_decision,
)
from strata.pipeline.plan.costs import PROFILES, RecipeCosts
from strata.pipeline.progress import duration, size

MOST_PROBLEMS = 64
"""Most problems per depth that are tried."""
VIEWS = (1, 2, 4, 8, "canvas")
PRECISIONS = ("float32", "float16", "uint8", "uint4")
"""Precisions that features may be stored in."""


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
    """Views and precision that a recipe could have, and what its best run then costs."""

    views: int | str
    precision: str
    seconds: float
    nbytes: int
    """Bytes on disk of the levels that are then worth caching."""

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
    """Seconds of the best run by profile, if all levels were stored in that one."""
    depths: tuple[Depth, ...]
    ways: tuple[Way, ...] = ()

    def as_json(self) -> dict[str, Any]:
        totals = {"best": self.best, "always": self.always, "never": self.never}
        return {
            "machine": self.machine,
            "source": self.source,
            "problems": self.problems,
            "seconds": {name: _finite(value) for name, value in totals.items()},
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
    of_one = MemoisedCosts(replace(costs, problems=1))
    table, between = MemoisedCosts(of_one, costs.problems), range(1, costs.layers)
    best, every = cheapest_chain(table, disk=disk), frozenset(between)
    fewest, leaving = _crossovers(of_one, disk), evicted(costs, best, disk)
    depths: list[Depth] = []
    for depth in between if best.seconds < math.inf else ():
        other = other_decision(table, best, depth, disk=disk).seconds
        node = next((node for node in best.chain if node.depth == depth), None)
        tier, reason = None, _reason(costs, table, best, depth, disk, other)
        with suppress(BudgetError):
            tier = costs.tier_of(node).tier if node else None
        form, nbytes = (node.form, table.nbytes(node)) if node else (None, 0)
        facts = (other, fewest.get(depth), tier, reason, leaving.get(depth))
        depths.append(Depth(depth, form, nbytes, *facts))
    stored = {name: MemoisedCosts(costs.stored_as(name)) for name in PROFILES}
    return Worth(
        costs.machine.name,
        costs.machine.source,
        costs.problems,
        best.seconds,
        cheapest_chain(table, disk=disk, must=every).seconds,
        cheapest_chain(table, disk=disk, never=every).seconds,
        {name: cheapest_chain(those, disk=disk).seconds for name, those in stored.items()},
        tuple(depths),
        tuple(_ways(costs, disk)),
    )


def evicted(costs: RecipeCosts, best: Chain, disk: float) -> dict[int, int]:
    """Which level leaves the disk once which other is written, by depth; none where all fit."""
    if sum(map(costs.nbytes, (CachedDepth(0, START), *best.chain))) <= disk:
        return {}
    return {node.depth: above.depth for node, above in pairwise(best.chain)}


def _crossovers(of_one: MemoisedCosts, disk: float) -> dict[int, int]:
    """For each depth the fewest problems with which it is cached.

    Args:
        of_one: costs of a run that solves one problem per depth.
    """
    found: dict[int, int] = {}
    for problems in range(1, MOST_PROBLEMS + 1):
        if len(found) == of_one.layers - 1:
            break
        for node in cheapest_chain(MemoisedCosts(of_one, problems), disk=disk).chain:
            found.setdefault(node.depth, problems)
    return found


def _reason(
    costs: RecipeCosts, table: MemoisedCosts, best: Chain, depth: int, disk: float, other: float
) -> str:
    """Why a depth is cached, or is not: by an epoch of the problem right above it.

    Args:
        other: seconds of the cheapest run that decides differently about ``depth``.
    """
    forms, form = costs.forms(depth), best.form(depth)
    if not forms:
        return "fresh draws cannot be cached"
    if not form and disk < math.inf and cheapest_chain(table).form(depth):
        return f"over the budget of {size(disk)}"
    below = [node for node in best.chain if node.depth < depth]
    base = below[-1] if below else CachedDepth(0, START)
    wanted = [CachedDepth(depth, name) for name in ((form,) if form else forms)]
    node = min(wanted, key=lambda n: table.write(base, n) + table.solve(n, depth + 1))
    read, again = costs.reading(node), costs.recomputing(base, depth)
    if read >= again and form:
        return f"it spares {_time(other - best.seconds)} in all"
    if read >= again:
        return f"computing {_time(again)} < reading {_time(read)} per epoch"
    faster = f"reading {_time(read)} < computing {_time(again)} per epoch"
    return faster if form else f"{faster}, but writing takes {_time(table.write(base, node))}"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _ways(costs: RecipeCosts, disk: float) -> Iterator[Way]:
    """All views and precisions that the recipe allows, its own among them."""
    recipe = costs.recipe
    own, precision = recipe.augment.views, recipe.cache.precision
    every = VIEWS if own in (*VIEWS, 0) else (own, *VIEWS)
    precisions = PRECISIONS if precision in PRECISIONS else (precision, *PRECISIONS)
    for views, name in product(every, precisions):
        augment = replace(recipe.augment, views=views, allow_single_view=True)
        cache = replace(recipe.cache, precision=name)
        with suppress(RecipeError):  # a canvas that does not divide
            other = replace(costs, recipe=replace(recipe, augment=augment, cache=cache))
            best = cheapest_chain(MemoisedCosts(other), disk=disk)
            yield Way(views, name, best.seconds, sum(map(other.nbytes, best.chain)))
