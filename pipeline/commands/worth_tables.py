"""What is worth caching, and the machine that says so, as tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from strata.pipeline.plan.machine import Machine
from strata.pipeline.plan.worth import MOST_PROBLEMS, Way, Worth
from strata.pipeline.progress import duration, size
from strata.pipeline.recipe.recipe import Recipe


def of_machine(machine: Machine) -> Table:
    """Its rates, as people say them."""
    table = _table("", "per second")
    table.title = f"{machine.hardware}, {machine.device}, {machine.source}"
    for name in ("disk_write", "disk_read", "gather", "decode_jpeg"):
        if (rate := getattr(machine, name)) is not None:
            table.add_row(name.replace("_", " "), size(rate))
    for rate in machine.rows:
        told = f"{size(rate.encode)} encoded, {size(rate.decode)} decoded, ratio {rate.ratio:.2f}"
        table.add_row(f"{rate.precision} {rate.profile}", told)
    for rate in machine.layers:
        told = f"{rate.forward:.2g} multiply-adds forward, {rate.train:.2g} in training"
        table.add_row(rate.kind, told)
    shard, level = (1000 * s for s in (machine.publish_shard, machine.publish_level))
    table.caption = f"{shard:.1f} ms a shard and {level:.1f} ms a level beyond their bytes"
    return table


def of_worth(worth: Worth) -> Table:
    """One row per depth that could be cached."""
    columns = ("", "cached", "on disk", "read from", "why", "deciding otherwise costs", "removed")
    table = _table(*columns, "worth caching with")
    table.title = f"on {worth.machine} ({worth.source}), {worth.problems} per depth"
    for d in worth.depths:
        fewest = f"{d.from_problems} or more" if d.from_problems else f"more than {MOST_PROBLEMS}"
        more = d.otherwise - worth.best
        table.add_row(
            f"x_{d.depth}",
            d.form or "computed again",
            size(d.nbytes) if d.form else "",
            d.tier or "",
            d.reason,
            f"{duration(more)} more" if more < math.inf else "not possible",
            f"once x_{d.until} is written" if d.until else "stays" if d.form else "",
            fewest,
        )
    return table


def summary(worth: Worth) -> str:
    """What it comes to."""
    if worth.best == math.inf:
        return "No way to run this within the disk budget."
    others = (("every depth cached", worth.always), ("none cached", worth.never))
    told = ", ".join(
        f"{name} {duration(seconds)}" if seconds < math.inf else f"{name} does not fit"
        for name, seconds in others
    )
    said = f"Predicted, from {worth.source}: {duration(worth.best)}; {told}."
    profile, seconds = min(worth.profiles.items(), key=lambda item: item[1])
    if seconds < worth.best:
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
    precisions = list(dict.fromkeys(way.precision for way in worth.ways))
    table = _table("views", *precisions)
    table.title = "other ways to cache: they change what is learned, and only a recipe chooses them"
    own = recipe.augment.views, recipe.cache.precision
    for views in dict.fromkeys(way.views for way in worth.ways):
        row = [way for way in worth.ways if way.views == views]
        table.add_row(str(views), *(_way(way, (way.views, way.precision) == own) for way in row))
    return table


def _way(way: Way, own: bool) -> str:
    if way.seconds == math.inf:
        return "does not fit"
    return f"{duration(way.seconds)}, {way.nbytes / 1e9:.3g} GB{' *' if own else ''}"


def _table(*columns: str) -> Table:
    table = Table(title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
