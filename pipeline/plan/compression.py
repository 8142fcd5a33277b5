"""What [compress] saves, for ``plan``, and what it cost, for ``status``. Arithmetic; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from strata.pipeline.errors import BudgetError, NotThereYet, OptionRange
from strata.pipeline.options import Options
from strata.pipeline.plan import caching
from strata.pipeline.plan.choose import cheapest_chain
from strata.pipeline.plan.plan import Plan, make_plan
from strata.pipeline.progress import duration, size
from strata.pipeline.recipe.recipe import Recipe


def saved(
    recipe: Recipe, plan: Plan, data: dict[str, Any] | None, options: Options
) -> tuple[dict[str, Any], list[str]]:
    """The plan beside that of the same recipe without [compress]: for machines, and as lines for
    people; both empty where no filter is removed.

    Args:
        data: the run's record of its images; None: as many as the recipe expects.
        options: those of ``caching.caching``.
    """
    if not recipe.compress:
        return {}, []
    whole = replace(recipe, compress=None)
    without = make_plan(whole, data)
    filters = [
        {"layer": layer.index, "filters": layer.width, "of": given.width}
        for layer, (given, _) in zip(recipe.layers, recipe.problems, strict=True)
    ]
    times = [_seconds(recipe, plan, options), _seconds(whole, without, options)]
    value = {
        "filters": filters,
        "bytes_without": [depth.bytes for depth in without.depths],
        "total_bytes_without": without.total,
        "operations_without": without.operations,
        "seconds": times[0],
        "seconds_without": times[1],
    }
    kept = ", ".join(f"{one['filters']} of {one['of']}" for one in filters)
    levels = ", ".join(
        f"x_{one.depth} {size(one.bytes)} instead of {size(other.bytes)}"
        for one, other in zip(plan.depths[1:], without.depths[1:], strict=True)
    )
    lines = [
        f"[compress] leaves {kept} filters: {levels}.",
        f"Compressed, the run takes {size(plan.total)} of disk in total instead of "
        f"{size(without.total)}, and {plan.operations:.2g} multiply-adds instead of "
        f"{without.operations:.2g}, fine-tuning included.",
    ]
    known = [duration(seconds) for seconds in times if seconds is not None]
    if len(known) == len(times):
        lines.append(f"At best it then takes {' instead of '.join(known)}.")
    return value, lines


def _seconds(recipe: Recipe, plan: Plan, options: Options) -> float | None:
    """Seconds of the best run on a machine whose rates are known; else None."""
    with suppress(NotThereYet, BudgetError):
        known = caching.costs(recipe, plan, options)
        found = cheapest_chain(known.table, disk=caching.disk_budget(options)).seconds
        return found if found < math.inf else None
    return None


def summary(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The filters that are left in a layer, and what that cost; None where none is gone.

    Args:
        record: the layer's.

    Returns:
        ``filters`` of ``of``, and the test accuracies (shares) of the layer as it was solved, with
        those filters removed, and fine-tuned: ``solved``, ``removed`` and ``tuned``. ``points`` is
        what was won in all, in percentage points; below 0 where it was lost.
    """
    found = (record or {}).get("compression")
    if found is None:
        return None
    first, last = found["removals"][0], found["removals"][-1]
    solved, tuned = first["test_before"], last["test_after"]
    return {
        "filters": last["filters"],
        "of": found["solved_filters"],
        "solved": solved,
        "removed": last["test_removed"],
        "tuned": tuned,
        "points": 100 * (tuned - solved),
    }


def check_sweep(name: str, recipe: Recipe) -> None:
    """Refuse variants of a layer that loses filters after it is solved. Raises OptionRange."""
    if recipe.compress:
        raise OptionRange(
            f"sweep: recipe {name} removes filters of every layer once it is solved ([compress]), "
            "which variants are not. Take [compress] out of a copy of the recipe, or use `final`"
        )
