"""The commands `plan`, which needs no data, and `calibrate`, which makes its predictions real."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from strata.pipeline.commands import lifecycle, plan_tables
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.errors import BudgetError, NotThereYet
from strata.pipeline.options import Options
from strata.pipeline.plan import caching, compression, machine, memory
from strata.pipeline.plan.plan import check_budget, make_plan, steps
from strata.pipeline.plan.worth import weigh
from strata.pipeline.progress import size
from strata.pipeline.recipe import named_network
from strata.pipeline.run import stores
from strata.store.files.publish import replace


def plan(options: Options) -> Answer:
    """What a run costs and what of it is left to do. What a budget forbids is shown, then refused:
    see :attr:`Answer.error`."""
    found = lifecycle.find(options)
    recipe, costs = found.recipe, make_plan(found.recipe, found.data())
    todo = steps(found.inventory(), solve=len(recipe.layers))
    space = {"needed_bytes": found.to_write(costs), "free_bytes": found.store.free_bytes()}
    value = {"recipe": found.name, **costs.as_json(), **space, "todo": [str(s) for s in todo]}
    saved, saving = compression.saved(recipe, costs, found.data(), options)
    value |= {"compression": saved} if saved else {}
    shown: list[Any] = [plan_tables.of_plan(costs)]
    if blocks := named_network.listed(recipe.layers):
        value["blocks"] = blocks
        names = ", ".join(f"{block['index']} {block['name']}" for block in blocks)
        shown.append(f"{recipe.network.said} has {len(blocks)} blocks, each a layer: {names}.")
    shown += [plan_tables.summary(recipe, costs, todo), *saving, plan_tables.space(**space)]
    refused = None
    try:
        if (cap := options.gpu_memory) is not None:
            divided = memory.fit(recipe, memory.named_device(recipe), cap)
            value["accumulate"] = divided
            lines = memory.divided_layers(recipe, divided) or ["whole batches fit"]
            shown.append(f"Within --gpu-memory {size(cap)}: {'; '.join(lines)}.")
    except BudgetError as error:
        refused = error
    try:
        known = caching.costs(recipe, costs, options)
    except (NotThereYet, BudgetError) as error:
        shown.append(f"Which levels are worth their disk: {error}.")
    else:
        worth = weigh(known, caching.disk_budget(options))
        value["economics"] = worth.as_json()
        shown += [plan_tables.of_worth(worth), plan_tables.worth_summary(worth)]
        shown += [plan_tables.of_ways(worth, recipe), *caching.guesses(recipe, known.machine)]
    try:
        if check_budget(costs, options.disk_budget):
            shown.append(
                "Within --disk-budget only if levels are removed once unneeded; `run` does so."
            )
    except BudgetError as error:
        refused = refused or error
    return Answer(value, tuple(shown), refused)


def calibrate(options: Options) -> Answer:
    """Measure this machine, and keep the figures where ``plan`` and ``--cache auto`` look."""
    from strata.pipeline.plan import hardware
    from strata.pipeline.run import device
    from strata.pipeline.study.calibrate import measure

    stores.check_calibrated(options.store)
    found, report = lifecycle.find(options), lifecycle.reporting(options)
    chosen = device.pick(options.device)
    if chosen.type == "cpu":
        hardware.keep_freed_memory()
    compute, _ = device.compute_dtype(found.recipe.schedule.precision, chosen)
    here = measure(found, chosen, device.dtype(compute), report)
    path = caching.calibrated(options.store)
    replace(path.parent, path.name, machine.as_toml(here).encode())
    return Answer(asdict(here), (plan_tables.of_machine(here), f"kept in {path}"))
