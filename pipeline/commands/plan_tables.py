"""What `plan` and `calibrate` have found, as tables and lines for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from strata.pipeline.commands.tables import table
from strata.pipeline.plan.machine import Machine
from strata.pipeline.plan.plan import Plan, Step
from strata.pipeline.plan.worth import MOST_PROBLEMS, Way, Worth
from strata.pipeline.progress import duration, size
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe


def of_plan(plan: Plan) -> Table:
    """One row per depth."""
    columns = ("", "shape", "one view", "levels", "on disk", "parameters", "SGD steps")
    found = table(*columns, "multiply-adds", "peak memory")
    for d in plan.depths:
        solved = (
            f"{d.parameters:,} + {d.auxiliary_parameters:,}",
            f"{d.steps:,}",
            f"{d.operations:.2g}",
            "unknown" if d.memory_bytes is None else size(d.memory_bytes),
        )
        found.add_row(
            f"x_{d.depth}",
            "×".join(map(str, d.shape)),
            size(d.bytes_one_view),
            ", ".join(d.levels),
            size(d.bytes),
            *(solved if d.depth else ("",) * len(solved)),
        )
    return found


def summary(recipe: Recipe, plan: Plan, todo: Sequence[Step]) -> str:
    """Totals, and what is left to do."""
    last = plan.depths[-1].depth
    training = plan.depths[1]
    one_view = f"{size(training.bytes_one_view)} at {plan.precision} for {plan.images:,} images"
    return "\n".join(
        (
            f"x_1 is {one_view} and one view; {_mode_text(recipe)}.",
            f"Disk for `run`: {size(plan.total)} in total, {size(plan.peak)} at the peak if levels "
            f"are removed once unneeded. x_{last} is written only by `materialize --layer {last}`.",
            "Reading the layers below instead of recomputing them divides the operations of one "
            f"run by at most {plan.ceiling:.2f}; further problems on one depth gain more.",
            f"To do: {', '.join(map(str, todo)) or 'nothing'}.",
        )
    )


def _mode_text(recipe: Recipe) -> str:
    match augmentation.mode(recipe):
        case "fresh":
            return "fresh draws every epoch: no training features are cached"
        case "fixed":
            count = recipe.augment.views
            return "1 fixed view is cached" if count == 1 else f"{count} fixed views are cached"
        case _:
            side = recipe.canvas
            return f"the {side}×{side} canvas is cached, and cropped in feature space"


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
    found = table(*columns, "worth caching with", title=title)
    for d in worth.depths:
        fewest = f"{d.from_problems} or more" if d.from_problems else f"more than {MOST_PROBLEMS}"
        more = d.otherwise - worth.seconds["best"]
        found.add_row(
            f"x_{d.depth}",
            d.form or "computed again",
            size(d.nbytes) if d.form else "",
            d.tier or "",
            d.reason,
            f"{duration(more)} more" if more < math.inf else "not possible",
            f"once x_{d.until} is written" if d.until else "stays" if d.form else "",
            fewest,
        )
    return found


def worth_summary(worth: Worth) -> str:
    """The seconds predicted, beside those of other ways to cache."""
    best, always, never = worth.seconds.values()
    if best == math.inf:
        return "No way to run this within the disk budget."
    compared = ", ".join(
        f"{said} {duration(seconds)}" if seconds < math.inf else f"{said} does not fit"
        for said, seconds in (("every depth cached", always), ("none cached", never))
    )
    said = f"Predicted, from {worth.source}: {duration(best)}; {compared}."
    profile, seconds = min(worth.profiles.items(), key=lambda item: item[1])
    if seconds < best:
        said += f" With 'cache.profile' {profile}: {duration(seconds)}."
    return f"{said} {crossover(worth)}"


def crossover(worth: Worth) -> str:
    """Where reading wins, and with how many problems it wins lower down."""
    depths = [d.depth for d in worth.depths]
    cached = [d.depth for d in worth.depths if d.form]
    said = f"Reading wins {_from(cached, depths)}" if cached else "Computing again wins everywhere"
    more = sorted({d.from_problems for d in worth.depths if not d.form and d.from_problems})
    for fewest in (n for n in more if n > worth.problems):
        with_more = [d.depth for d in worth.depths if d.from_problems and d.from_problems <= fewest]
        said += f"; with {fewest} or more problems {_from(sorted({*cached, *with_more}), depths)}"
    return f"{said}."


def _from(some: Sequence[int], depths: Sequence[int]) -> str:
    """``from x_5 on``, or ``at x_2, x_4`` where there are gaps."""
    first = some[0]
    if list(some) == [d for d in depths if d >= first]:
        return f"from x_{first} on"
    return "at " + ", ".join(f"x_{d}" for d in some)


def of_ways(worth: Worth, recipe: Recipe) -> Table:
    """Other views and precisions, one row and one column each; the recipe's own is marked."""
    precisions = list(dict.fromkeys(way.precision for way in worth.other_ways))
    title = "other ways to cache: they change what is learned, and only a recipe chooses them"
    found = table("views", *precisions, title=title)
    own = recipe.augment.views, recipe.cache.precision
    for views in dict.fromkeys(way.views for way in worth.other_ways):
        row = [way for way in worth.other_ways if way.views == views]
        found.add_row(str(views), *(_way(way, (way.views, way.precision) == own) for way in row))
    return found


def _way(way: Way, own: bool) -> str:
    if way.seconds == math.inf:
        return "does not fit"
    return f"{duration(way.seconds)}, {way.nbytes / 1e9:.3g} GB{' *' if own else ''}"


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
