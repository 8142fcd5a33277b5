"""The commands `plan`, which needs no data, and `calibrate`, which makes its predictions real."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from strata.pipeline.commands import lifecycle
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.commands.tables import Row, table
from strata.pipeline.errors import BudgetError, NotThereYet
from strata.pipeline.options import Options
from strata.pipeline.plan import caching, compression, machine, memory
from strata.pipeline.plan.machine import Machine
from strata.pipeline.plan.plan import DepthPlan, Plan, Step, check_budget, make_plan, named, steps
from strata.pipeline.plan.worth import MOST_PROBLEMS, Reuse, Worth, short, weigh
from strata.pipeline.progress import duration, size
from strata.pipeline.recipe import named_network
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import stores
from strata.store.files.publish import replace


def plan(options: Options) -> Answer:
    """What a run costs and what of it is left to do. What a budget forbids is shown, then refused:
    see :attr:`Answer.error`."""
    found = lifecycle.find(options)
    recipe, costs = found.recipe, make_plan(found.recipe, found.data())
    todo = steps(found.inventory(), **found.goal)
    space = {"needed_bytes": found.to_write(costs, todo), "free_bytes": found.store.free_bytes()}
    value = {"recipe": found.name, **costs.as_json(), **space, "todo": named(todo)}
    saved, saving = compression.saved(recipe, costs, found.data(), options)
    value |= {"compression": saved} if saved else {}
    shown: list[Any] = [_of_plan(costs)]
    if blocks := named_network.listed(recipe.layers):
        value["blocks"] = blocks
        names = ", ".join(f"{block['index']} {block['name']}" for block in blocks)
        shown.append(f"{recipe.network.said} has {len(blocks)} blocks, each a layer: {names}.")
    shown += [_summary(recipe, costs, todo), *saving, _space(**space)]
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
        if worth.depths or not recipe.given:
            shown += [_of_worth(worth), _worth_summary(worth)]
        shown += [_of_reuse(worth.reuse, recipe.schedule.epochs)] if worth.reuse else []
        shown += [_of_ways(worth, recipe), *caching.guesses(recipe, known.machine)]
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
    return Answer(asdict(here), (_of_machine(here), f"kept in {path}"))


# ---- what is said -------------------------------------------------------------------------------


def _of_plan(plan: Plan) -> Table:
    """One row per depth."""
    columns = ("", "shape", "on disk", "peak memory", "parameters", "steps", "multiply-adds")
    return table(*columns, "one view", "levels", rows=map(_of_depth, plan.depths))


def _of_depth(d: DepthPlan) -> Row:
    cached = f"x_{d.depth}", "×".join(map(str, d.shape)), size(d.bytes)
    views = size(d.bytes_one_view), ", ".join(d.levels)
    if d.depth == 0:
        return *cached, *[""] * 4, *views
    parameters = f"{d.parameters:,} + {d.auxiliary_parameters:,}"
    memory = "unknown" if d.memory_bytes is None else size(d.memory_bytes)
    return *cached, memory, parameters, f"{d.steps:,}", f"{d.operations:.2g}", *views


def _summary(recipe: Recipe, plan: Plan, todo: Sequence[Step]) -> str:
    """Totals, and what is left to do."""
    last, one = plan.depths[-1].depth, size(plan.depths[1].bytes_one_view)
    views = "" if recipe.data.shape else f"; 'augment.views' is {recipe.augment.views}"
    given, which = recipe.given, f"layers 1 … {recipe.given}"
    when = f"x_{last} is written only by `materialize --layer {last}`." * (given < last)
    return (
        f"x_1 is {one} at {plan.precision} for {plan.images:,} images and one view"
        f"{views}.\n"
        f"Disk for `run`: {size(plan.total)} in total, {size(plan.peak)} at the peak if levels "
        f"are removed once unneeded. {when}\n"
        "Reading the layers below instead of recomputing them divides the operations of one "
        f"run by at most {plan.ceiling:.2f}; further problems on one depth gain more.\n"
        + f"Given, and not trained, are {which}.\n" * (given > 0)
        + f"To do: {', '.join(named(todo)) or 'nothing'}."
    )


def _space(needed_bytes: int, free_bytes: int | None) -> str:
    """Whether the disk has room for what is still to be written."""
    if free_bytes is None:
        return f"Still to write: {size(needed_bytes)}, to an object store."
    text = f"Still to write: {size(needed_bytes)}; free: {size(free_bytes)}"
    if needed_bytes <= free_bytes:
        return f"{text}."
    return f"{text}. NOT ENOUGH: make space, choose another --store, or use --disk-budget."


def _of_worth(worth: Worth) -> Table:
    """One row per depth that could be cached."""
    columns = ("", "cached", "on disk", "read from", "why", "deciding otherwise costs", "removed")
    title = f"on {worth.machine} ({worth.source}), {worth.problems} per depth"
    rows = (
        (
            f"x_{d.depth}",
            d.form or "computed again",
            size(d.nbytes) if d.form else None,
            d.tier,
            d.reason,
            _time(d.otherwise - worth.seconds["best"], "{} more", "not possible"),
            f"once x_{d.until} is written" if d.until else "stays" if d.form else None,
            f"{d.from_problems} or more" if d.from_problems else f"more than {MOST_PROBLEMS}",
        )
        for d in worth.depths
    )
    return table(*columns, "worth caching with", title=title, rows=rows)


def _worth_summary(worth: Worth) -> str:
    """The seconds predicted, beside those of other ways to cache."""
    best, always, never = worth.seconds.values()
    if best == math.inf:
        return "No way to run this within the disk budget."
    said = f"Predicted, from {worth.source}: {duration(best)}; every depth cached {_time(always)}, "
    stored = (f"{name} {_time(seconds)}" for name, seconds in worth.profiles.items())
    return f"{said}none cached {_time(never)}. By profile: {', '.join(stored)}."


def _of_reuse(reuse: Reuse, epochs: int) -> str:
    """From when on a cache of what given layers make is worth it."""
    x = f"x_{reuse.depth}"
    text = (
        f"Layers 1 … {reuse.depth} are given. An epoch that reads {x} takes {short(reuse.read)}, "
        f"one that computes it again {short(reuse.again)}, and writing it once "
        f"{short(reuse.write)}"
    )
    if reuse.epochs is None or reuse.problems is None:
        return f"{text}: the cache never pays. Use --cache never."
    heads = math.ceil(reuse.problems)
    which = "the first problem or head" if heads == 1 else f"{heads} problems or heads"
    return (
        f"{text}: the cache pays from {math.ceil(reuse.epochs)} epochs on, that is with {which} "
        f"of {epochs} epochs."
    )


def _of_ways(worth: Worth, recipe: Recipe) -> Table:
    """Other views and precisions, one row and one column each; the recipe's own is marked."""
    cells: dict[int | str, dict[str, str]] = {}
    for way in worth.other_ways:
        cell = _time(way.seconds, f"{{}}, {way.nbytes / 1e9:.3g} GB")
        own = (way.views, way.precision) == (recipe.augment.views, recipe.cache.precision)
        cells.setdefault(way.views, {})[way.precision] = f"{cell} *" if own else cell
    title = "other ways to cache: they change what is learned, and only a recipe chooses them"
    precisions = next(iter(cells.values()))
    rows = ((views, *row.values()) for views, row in cells.items())
    return table("views", *precisions, title=title, rows=rows)


def _time(seconds: float, said: str = "{}", never: str = "does not fit") -> str:
    return said.format(duration(seconds)) if seconds < math.inf else never


def _of_machine(machine: Machine) -> Table:
    """The rates of a machine."""
    shard, level = (1000 * s for s in (machine.publish_shard, machine.publish_level))
    title = f"{machine.hardware}, {machine.device}, {machine.source}"
    found = table("", "per second", title=title)
    for name in ("disk_write", "disk_read", "gather", "decode_jpeg"):
        if (rate := getattr(machine, name)) is not None:
            found.add_row(name.replace("_", " "), size(rate))
    for r in machine.rows:
        text = f"{size(r.encode)} encoded, {size(r.decode)} decoded, ratio {r.ratio:.2f}"
        found.add_row(f"{r.precision} {r.profile}", text)
    for r in machine.layers:
        found.add_row(r.kind, f"{r.forward:.2g} multiply-adds forward, {r.train:.2g} in training")
    found.add_row("", f"{shard:.1f} ms a shard and {level:.1f} ms a level beyond their bytes")
    return found
