"""The decision ``--cache``: which depths a run writes on its way, for the problems above to read.

A depth that is not written is computed from the nearest level below whenever a problem reads it.
The weights are the same, to the bit: only time and disk differ.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from strata.pipeline.errors import BudgetError, NotThereYet, RecipeError
from strata.pipeline.options import Options
from strata.pipeline.plan import hardware, machine, memory
from strata.pipeline.plan.choose import cheapest_chain, evicted
from strata.pipeline.plan.costs import RecipeCosts, kind
from strata.pipeline.plan.plan import Plan, check_budget
from strata.pipeline.progress import size
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.store.feature_store import Place, is_url

FEATURES = "features of x_1"
"""The ``sample`` of a machine whose rows were measured on features, which says how they pack."""
ADVICE = "Run `calibrate`, or give --machine FILE"


@dataclass(frozen=True)
class Caching:
    """What to write and how, and whether levels must go again once they are not needed."""

    depths: Collection[int] | None
    """Depths that are written; None: all."""
    evict: bool
    """Levels are removed once they are not needed."""
    said: tuple[str, ...] = ()
    """Lines for people: what was chosen and why; empty where there was nothing to choose."""
    profiles: Mapping[int, str] = field(default_factory=dict[int, str])
    """How x_depth is stored where the recipe leaves that open; raw where nothing is said."""


def caching(recipe: Recipe, plan: Plan, options: Options) -> Caching:
    """Decide what a run writes on its way.

    Raises:
        BudgetError: even so it does not fit; gives both numbers.
        NotThereYet: ``--cache auto`` knows no rates of this machine.
    """
    how = _depths(recipe, plan, options)
    remote = is_url(options.store)  # where `materialize` packs what is left open
    if remote or recipe.cache.profile != "auto" or augmentation.mode(recipe) == "fresh":
        return how
    try:
        table = costs(recipe, plan, options).table
    except NotThereYet as error:
        return replace(how, said=(f"'cache.profile' is auto, and that means raw: {error}",))
    between = range(max(1, recipe.given), table.layers)
    must = frozenset(between if how.depths is None else how.depths)
    never = frozenset(between) - must
    best = cheapest_chain(table, disk=disk_budget(options), must=must, never=never)
    # The other depths are written by whoever asks for them: as if each were cached, too.
    alone = {d: cheapest_chain(table, must=frozenset([d])) for d in between}
    profiles = {d: best.form(d) or alone[d].form(d) or "raw" for d in between}
    named = ", ".join(f"x_{depth} {profile}" for depth, profile in profiles.items())
    said = f"'cache.profile' is auto: {named}, if they are written now"
    return replace(how, said=(*how.said, said), profiles=profiles)


def _depths(recipe: Recipe, plan: Plan, options: Options) -> Caching:
    budget = options.disk_budget
    if options.cache == "always":
        return Caching(None, check_budget(plan, budget))
    images = plan.depths[0].bytes
    if budget is not None and images > budget:
        raise BudgetError(f"x_0 needs {size(images)} of disk; --disk-budget is {size(budget)}")
    if options.cache == "never":
        return Caching((), False)
    found, disk = costs(recipe, plan, options), disk_budget(options)
    best = cheapest_chain(found.table, disk=disk)
    depths = frozenset(node.depth for node in best.chain)
    cached = ", ".join(f"x_{depth}" for depth in sorted(depths)) or "nothing"
    said = f"--cache auto: worth caching on {found.machine.name}: {cached}"
    return Caching(depths, bool(evicted(found.table, best, disk)), (said,))


def disk_budget(options: Options) -> float:
    """Bytes that ``--disk-budget`` allows; infinite where nothing is said."""
    return math.inf if options.disk_budget is None else float(options.disk_budget)


def costs(recipe: Recipe, plan: Plan, options: Options) -> RecipeCosts:
    """The costs of a recipe on the machine that ``--machine`` describes, or else on this one,
    within the bounds on its memory.

    Raises:
        NotThereYet: neither is known, or the figures in the store are another machine's.
        BudgetError: no step fits into ``--gpu-memory``.
    """
    there = known_machine(options)
    if there is None:
        raise NotThereYet(f"nothing is known of this machine's rates. {ADVICE}")
    if (budget := options.memory_budget) is not None:
        there = replace(there, memory=min(there.memory, float(budget)))
    if (cap := options.gpu_memory) is not None and there.device_memory:
        device = memory.named_device(recipe)
        divided = memory.fit(recipe, device, cap)
        room = max(1.0, cap - max(memory.peaks(recipe, device, divided)))
        there = replace(there, device_memory=min(there.device_memory, room))
    asked = options.problems, options.loader, options.tier
    return RecipeCosts(recipe, there, plan.images, plan.tests, *asked)


def guesses(recipe: Recipe, there: machine.Machine) -> list[str]:
    """Lines for people: what of a machine's rates says little about this recipe."""
    lines, precision = list[str](), recipe.cache.precision
    measured = there.sample if precision in {rate.precision for rate in there.rows} else ""
    if recipe.cache.profile != "raw" and measured != FEATURES:
        how = f"measured on {measured}" if measured else "not measured"
        lines.append(f"how {precision} features pack was {how}")
    if recipe.data.jpeg and there.decode_jpeg is None:
        lines.append(f"images are decoded from JPEG at {size(there.jpeg)}/s")
    kinds, layers = {rate.kind for rate in there.layers}, range(1, len(recipe.layers) + 1)
    unknown = ", ".join(str(j) for j in layers if kind(recipe, j) not in kinds)
    if unknown and there.hardware:
        lines.append(f"rates of layers {unknown} are the median of others")
    return [f"A guess: {line}." for line in lines]


def known_machine(options: Options) -> machine.Machine | None:
    """The machine of ``--machine``, or the one whose disk the store is on; None: not calibrated,
    as object stores never are.

    Raises:
        NotThereYet: the figures in the store are another machine's, or cannot be read.
        RecipeError: those of ``--machine`` cannot be read.
    """
    if options.machine is not None:
        return machine.load(options.machine)
    if is_url(options.store) or not (path := calibrated(options.store)).exists():
        return None
    try:
        found = machine.load(path)
    except RecipeError as error:  # of a version before, or edited
        raise NotThereYet(f"{error}. {ADVICE}") from error
    if found.hardware != hardware.described():
        raise NotThereYet(
            f"{path} was measured on another machine ({found.hardware}); this one is "
            f"{hardware.described()}. {ADVICE}"
        )
    return found


def calibrated(store: Place) -> Path:
    """Where ``calibrate`` keeps its figures: beside the levels, whose disk they speak of."""
    return Path(store) / "machine.toml"
