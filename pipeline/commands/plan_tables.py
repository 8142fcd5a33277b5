"""What `plan` and `calibrate` have found, as tables and lines for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from strata.pipeline.commands.tables import Row, table
from strata.pipeline.plan.machine import Machine
from strata.pipeline.plan.plan import DepthPlan, Plan, Step
from strata.pipeline.plan.worth import MOST_PROBLEMS, Worth
from strata.pipeline.progress import duration, size
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe


def of_plan(plan: Plan) -> Table:
    """One row per depth."""
    columns = ("", "shape", "one view", "levels", "on disk", "parameters", "SGD steps")
    return table(*columns, "multiply-adds", "peak memory", rows=map(_of_depth, plan.depths))


def _of_depth(d: DepthPlan) -> Row:
    cached = "×".join(map(str, d.shape)), size(d.bytes_one_view), ", ".join(d.levels), size(d.bytes)
    if d.depth == 0:
        return "x_0", *cached, *[""] * 4
    parameters = f"{d.parameters:,} + {d.auxiliary_parameters:,}"
    memory = "unknown" if d.memory_bytes is None else size(d.memory_bytes)
    return f"x_{d.depth}", *cached, parameters, f"{d.steps:,}", f"{d.operations:.2g}", memory


def summary(recipe: Recipe, plan: Plan, todo: Sequence[Step]) -> str:
    """Totals, and what is left to do."""
    last, one = plan.depths[-1].depth, size(plan.depths[1].bytes_one_view)
    return (
        f"x_1 is {one} at {plan.precision} for {plan.images:,} images and one view; "
        f"{_mode_text(recipe)}.\n"
        f"Disk for `run`: {size(plan.total)} in total, {size(plan.peak)} at the peak if levels "
        f"are removed once unneeded. x_{last} is written only by `materialize --layer {last}`.\n"
        "Reading the layers below instead of recomputing them divides the operations of one "
        f"run by at most {plan.ceiling:.2f}; further problems on one depth gain more.\n"
        f"To do: {', '.join(map(str, todo)) or 'nothing'}."
    )


def _mode_text(recipe: Recipe) -> str:
    side, views = recipe.canvas, recipe.augment.views
    return {
        "fresh": "fresh draws every epoch: no training features are cached",
        "fixed": f"{views} fixed views are cached",
        "canvas": f"the {side}×{side} canvas is cached, and cropped in feature space",
    }[augmentation.mode(recipe)]


def space(needed_bytes: int, free_bytes: int | None) -> str:
    """Whether the disk has room for what is still to be written."""
    if free_bytes is None:
        return f"Still to write: {size(needed_bytes)}, to an object store."
    text = f"Still to write: {size(needed_bytes)}; free: {size(free_bytes)}"
    if needed_bytes <= free_bytes:
        return f"{text}."
    return f"{text}. NOT ENOUGH: make space, choose another --store, or use --disk-budget."


def of_worth(worth: Worth) -> Table:
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


def worth_summary(worth: Worth) -> str:
    """The seconds predicted, beside those of other ways to cache."""
    best, always, never = worth.seconds.values()
    if best == math.inf:
        return "No way to run this within the disk budget."
    said = f"Predicted, from {worth.source}: {duration(best)}; every depth cached {_time(always)}, "
    stored = (f"{name} {_time(seconds)}" for name, seconds in worth.profiles.items())
    return f"{said}none cached {_time(never)}. By profile: {', '.join(stored)}."


def of_ways(worth: Worth, recipe: Recipe) -> Table:
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


def of_machine(machine: Machine) -> Table:
    """The rates of a machine."""
    title = f"{machine.hardware}, {machine.device}, {machine.source}"
    found = table("", "per second", title=title)
    for name in ("disk_write", "disk_read", "gather", "decode_jpeg"):
        if (rate := getattr(machine, name)) is not None:
            found.add_row(name.replace("_", " "), size(rate))
    for rate in machine.rows:
        text = f"{size(rate.encode)} encoded, {size(rate.decode)} decoded, ratio {rate.ratio:.2f}"
        found.add_row(f"{rate.precision} {rate.profile}", text)
    for rate in machine.layers:
        text = f"{rate.forward:.2g} multiply-adds forward, {rate.train:.2g} in training"
        found.add_row(rate.kind, text)
    shard, level = (1000 * s for s in (machine.publish_shard, machine.publish_level))
    found.caption = f"{shard:.1f} ms a shard and {level:.1f} ms a level beyond their bytes"
    found.caption_justify = "left"
    return found
