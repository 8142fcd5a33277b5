"""The explanation that ``plan`` prints: which levels are worth their disk, and why, by depth.

What changes only time and bytes is chosen: the depths, and with ``cache.profile`` auto how each is
stored. Views and precision change what is learned; what others would cost is said, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from strata.pipeline.errors import RecipeError
from strata.pipeline.plan.choose import X0, CachedDepth, Chain, Costs, cheapest_chain, evicted
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


@dataclass(frozen=True)
class Way:
    """Views and precision that a recipe could have, and what its best run then costs."""

    views: int | str
    precision: str
    seconds: float
    nbytes: int
    """Bytes on disk of the levels that are then worth caching."""


@dataclass(frozen=True)
class Reuse:
    """The features of given layers from a cache, beside computing them in every epoch; seconds."""

    depth: int
    """Of the last layer that is given."""
    form: str
    """How x_depth is best stored."""
    write: float
    """To write all its levels."""
    read: float
    """Of an epoch of the problem above it that reads it."""
    again: float
    """Of an epoch that computes it from the images."""
    epochs: float | None
    """The number of epochs from which the cache pays; None: it never does."""
    problems: float | None
    """The number of problems, each a variant of a sweep with what it evaluates, from which it
    pays."""


@dataclass(frozen=True)
class Worth:
    """A recipe on a machine: what to cache, and what that saves. Times are in seconds."""

    machine: str
    source: str
    problems: int
    seconds: dict[str, float]
    """Of the ``best`` run, of one that caches ``always``, in the cheapest forms, or ``never``."""
    profiles: dict[str, float]
    """Seconds of the best run by profile, if all levels were stored in that one."""
    depths: tuple[Depth, ...]
    other_ways: tuple[Way, ...] = ()
    reuse: Reuse | None = None
    """None: no layer is given, or draws are fresh."""

    def as_json(self) -> dict[str, Any]:
        found = asdict(self, dict_factory=_finite)
        return found | {name: _finite(found[name].items()) for name in ("seconds", "profiles")}


def _finite(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """JSON has no infinity: None is what cannot be had."""
    return {name: None if value == math.inf else value for name, value in fields}


def weigh(costs: RecipeCosts, disk: float = math.inf) -> Worth:
    """The cheapest way, and what each decision of it is worth.

    Args:
        disk: bytes that the run may take.
    """
    table = costs.table
    between = range(max(1, costs.recipe.given), table.layers)
    best, every = cheapest_chain(table, disk=disk), frozenset(between)
    fewest, leaving = _crossovers(table, disk), evicted(table, best, disk)
    depths: list[Depth] = []
    for depth in between if best.seconds < math.inf else ():
        form, one = best.form(depth), frozenset([depth])
        differently = {"never": one} if form else {"must": one}
        other = cheapest_chain(table, disk=disk, **differently).seconds
        node = CachedDepth(depth, form) if form else None
        tier, nbytes = (costs.tier_of(node).tier, table.nbytes[node]) if node else (None, 0)
        facts = (tier, _reason(costs, best, depth, disk), leaving.get(depth))
        depths.append(Depth(depth, form, nbytes, other, fewest.get(depth), *facts))
    seconds = {
        "best": best.seconds,
        "always": cheapest_chain(table, disk=disk, must=every).seconds,
        "never": cheapest_chain(table, disk=disk, never=every).seconds,
    }
    stored = ((name, _otherwise(costs, profile=name).table) for name in PROFILES)
    profiles = {name: cheapest_chain(those, disk=disk).seconds for name, those in stored}
    who = costs.machine.name, costs.machine.source, costs.problems
    return Worth(*who, seconds, profiles, tuple(depths), tuple(_ways(costs, disk)), reuse(costs))


def reuse(costs: RecipeCosts) -> Reuse | None:
    """From when on the features of the given layers are worth writing, in the form with which it is
    soonest; None: no layer is given, or draws are fresh."""
    depth = costs.recipe.given
    if not depth:
        return None
    above = depth + 1
    step = costs.step(above)
    again = costs.epoch(X0, costs.forward(0, depth) + step)
    found = list[Reuse]()
    for node in (CachedDepth(depth, form) for form in costs.forms):
        write, read = costs.write(X0, node), costs.epoch(node, step)
        saved = costs.problem(X0, above, swept=True) - costs.problem(node, above, swept=True)
        paid = [write / one if one > 0 else None for one in (again - read, saved)]
        found.append(Reuse(depth, node.form, write, read, again, *paid))
    return min(found, key=lambda way: way.epochs or math.inf, default=None)


def _crossovers(table: Costs, disk: float) -> dict[int, int]:
    """The fewest problems per depth with which each depth is cached."""
    found: dict[int, int] = {}
    for problems in range(1, MOST_PROBLEMS + 1):
        if len(found) == table.layers - 1:
            break
        for node in cheapest_chain(replace(table, problems=problems), disk=disk).chain:
            found.setdefault(node.depth, problems)
    return found


def _reason(costs: RecipeCosts, best: Chain, depth: int, disk: float) -> str:
    """Why a depth is cached, or is not: by an epoch of the problem right above it."""
    table, form = costs.table, best.form(depth)
    if not costs.forms:
        return "fresh draws cannot be cached"
    if not form and disk < math.inf and cheapest_chain(table).form(depth):
        return f"over the budget of {size(disk)}"
    base = next((node for node in reversed(best.chain) if node.depth < depth), X0)
    wanted = [CachedDepth(depth, name) for name in ((form,) if form else costs.forms)]
    solving = {node: table.problems * table.solve[node, depth + 1] for node in wanted}
    node = min(wanted, key=lambda n: table.write[base, n] + solving[n])
    read, again = costs.epoch(node), costs.epoch(base, costs.forward(base.depth, depth))
    if read == math.inf:
        return f"--tier {costs.tier} has no room for it"
    if read >= again:
        than = f"computing {short(again)} < reading {short(read)} per epoch"
        return "cheaper over the whole run" if form else than
    faster = f"reading {short(read)} < computing {short(again)} per epoch"
    return faster if form else f"{faster}, but writing takes {short(table.write[base, node])}"


def short(seconds: float) -> str:
    """A time for people, also of less than a second."""
    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _ways(costs: RecipeCosts, disk: float) -> Iterator[Way]:
    """All views and precisions that the recipe allows, its own among them."""
    recipe = costs.recipe
    own, precision = recipe.augment.views, recipe.cache.precision
    every = VIEWS if own in (*VIEWS, 0) else (own, *VIEWS)
    precisions = PRECISIONS if precision in PRECISIONS else (precision, *PRECISIONS)
    for views, name in product(every, precisions):
        with suppress(RecipeError):  # a canvas that does not divide
            table = _otherwise(costs, views, precision=name).table
            best = cheapest_chain(table, disk=disk)
            yield Way(views, name, best.seconds, sum(table.nbytes[node] for node in best.chain))


def _otherwise(costs: RecipeCosts, views: int | str | None = None, **cache: str) -> RecipeCosts:
    """The costs of the recipe with other views, or other keys in [cache]."""
    recipe = replace(costs.recipe, cache=replace(costs.recipe.cache, **cache))
    if views is not None:
        augment = replace(recipe.augment, views=views, allow_single_view=True)
        recipe = replace(recipe, augment=augment)
    return replace(costs, recipe=recipe)
