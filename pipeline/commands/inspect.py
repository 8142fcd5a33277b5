"""Commands that look at what a run has: `statistics`, `export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from strata.pipeline.commands import lifecycle
from strata.pipeline.commands.lifecycle import Answer, Options
from strata.pipeline.interrupt import interruptions
from strata.pipeline.materialize.cluster import cluster


def statistics(options: Options) -> Answer:
    """Look at every row of the levels that are asked for. Raises as study/statistics.py does."""
    from strata.pipeline.study.statistics import chosen, statistics

    found, report = lifecycle.find(options), lifecycle.reporting(options)
    keys = chosen(found, options["layer"], options["split"], report)
    with interruptions() as stop, cluster.crew(options, report, stop, reads=True) as crew:
        levels = statistics(found, keys, report, stop, crew)
    table = _of_channels if options["channels"] else _of_levels
    value = {"run": str(found.directory), "levels": levels}
    return Answer(value, (table(f"levels of {found.directory}", levels),))


def export(options: Options) -> Answer:
    """Write the network as plain PyTorch. Raises as results/export.py does."""
    from strata.pipeline.results.export import export, wanted

    flags = {name: options[name] for name in ("layer", "features", "ensemble", "final")}
    value, lines = export(wanted(lifecycle.find(options), **flags), options["to"])
    return Answer({"to": str(options["to"]), **value}, tuple(lines))


def _of_levels(title: str, found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("level", "channels", "dead", *found[0]["all"], title=title, title_justify="left")
    for one in found:
        counts = (f"{len(one['channels']):,}", f"{one['dead']:,}")
        table.add_row(one["level"], *counts, *_cells(one["all"]))
    return table


def _of_channels(title: str, found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("level", "channel", *found[0]["all"], title=title, title_justify="left")
    for one in found:
        for channel, figures in enumerate(one["channels"]):
            table.add_row(one["level"], str(channel), *_cells(figures))
    return table


def _cells(figures: Mapping[str, float]) -> list[str]:
    percent = {"zeros": f"{100 * figures['zeros']:.2f} %"}
    return [percent.get(name, f"{figure:.4g}") for name, figure in figures.items()]
