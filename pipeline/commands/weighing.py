"""What `plan` says of which levels are worth their disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from strata.pipeline.commands import worth_tables
from strata.pipeline.errors import BudgetError, NotThereYet
from strata.pipeline.plan import caching
from strata.pipeline.plan.plan import Plan
from strata.pipeline.plan.worth import weigh
from strata.pipeline.recipe.recipe import Recipe


def weighed(
    recipe: Recipe, plan: Plan, options: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[Any]]:
    """For machines, and as tables and lines for people; None where no machine is known.

    Args:
        options: as of :func:`strata.pipeline.plan.caching.caching`.
    """
    try:
        known = caching.costs(recipe, plan, options)
    except (NotThereYet, BudgetError) as error:
        return None, [f"Which levels are worth their disk: {error}."]
    budget = options["disk_budget"]
    worth = weigh(known, math.inf if budget is None else budget)
    shown = [worth_tables.of_worth(worth), worth_tables.summary(worth)]
    shown += [worth_tables.of_ways(worth, recipe), *caching.guesses(recipe, known.machine)]
    return worth.as_json(), shown
