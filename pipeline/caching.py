"""``--cache``: which depths a run writes on its way, for the problems above to read.

A depth that is not written is computed from the nearest level below whenever a problem reads it.
The weights are the same, to the bit: only time and disk differ.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import hardware, machine
from pipeline.choice import START, Choice, Node, choose
from pipeline.economics import RecipeCosts, kind
from pipeline.errors import BudgetError, NotThereYet
from pipeline.plan import Plan, check_budget
from pipeline.progress import size
from pipeline.recipe import Recipe

ADVICE = "Run `calibrate`, or give --machine FILE"


@dataclass(frozen=True)
class Caching:
    """What to write, and whether levels must go again once they are not needed."""

    depths: Collection[int] | None
    """None: all."""
    evict: bool
    said: str
    """What was chosen and why, for people; empty where there was nothing to choose."""


def caching(recipe: Recipe, plan: Plan, options: Mapping[str, Any]) -> Caching:
    """
    Args:
        options: of the command line: ``cache``, ``machine``, ``problems``, ``disk_budget``,
            ``memory_budget``.

    Raises:
        BudgetError: even so it does not fit; gives both numbers.
        NotThereYet: ``auto`` knows no rates of this machine.
    """
    budget = options.get("disk_budget")
    if options["cache"] == "always":
        return Caching(None, check_budget(plan, budget), "")
    images = plan.depths[0].nbytes
    if budget is not None and images > budget:
        raise BudgetError(f"x_0 needs {size(images)} of disk; --disk-budget is {size(budget)}")
    if options["cache"] == "never":
        return Caching((), False, "")
    found = costs(recipe, plan, options)
    best = choose(found, disk=math.inf if budget is None else budget)
    nbytes = sum(map(found.nbytes, (Node(0, START), *best.chain)))
    return Caching(
        frozenset(node.depth for node in best.chain),
        budget is not None and nbytes > budget,
        _told(best, found),
    )


def costs(recipe: Recipe, plan: Plan, options: Mapping[str, Any]) -> RecipeCosts:
    """Of this recipe on the machine that ``--machine`` describes, or else on this one.

    Raises:
        NotThereYet: neither is known, or the figures in the store are another machine's.
    """
    there = known_machine(options)
    if there is None:
        raise NotThereYet(f"nothing is known of this machine's rates. {ADVICE}")
    if (budget := options.get("memory_budget")) is not None:
        there = replace(there, memory=min(there.memory, float(budget)))
    return RecipeCosts(recipe, there, plan.images, plan.tests, options["problems"])


def guesses(recipe: Recipe, there: machine.Machine) -> list[str]:
    """What of a machine's rates says little about this recipe, for people."""
    lines, precision = [], recipe.cache.precision
    if recipe.cache.profile != "raw" and not there.packed.startswith(f"{precision}, features"):
        measured = f"measured on {there.packed}" if there.packed else "not measured"
        lines.append(f"A guess: how {precision} features pack was {measured}.")
    kinds = {rate.kind for rate in there.layers}
    unknown = [j for j in range(1, len(recipe.layers) + 1) if kind(recipe, j) not in kinds]
    if unknown and there.hardware:
        named = ", ".join(map(str, unknown))
        lines.append(f"A guess: rates of layers {named} are the median of others.")
    return lines


def known_machine(options: Mapping[str, Any]) -> machine.Machine | None:
    """The one of ``--machine``, or the one whose disk the store is on; None: not calibrated."""
    if options["machine"] is not None:
        return machine.load(options["machine"])
    path = calibrated(options["store"])
    if not path.exists():
        return None
    found = machine.load(path)
    if found.hardware != hardware.described():
        raise NotThereYet(
            f"{path} was measured on another machine ({found.hardware}); this one is "
            f"{hardware.described()}. {ADVICE}"
        )
    return found


def calibrated(store: Path) -> Path:
    """Where ``calibrate`` keeps its figures: beside the levels, whose disk they speak of."""
    return store / "machine.toml"


def _told(best: Choice, found: RecipeCosts) -> str:
    cached = ", ".join(f"x_{node.depth}" for node in best.chain) or "nothing"
    return f"--cache auto: worth caching on {found.machine.name}: {cached}"
