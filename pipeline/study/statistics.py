"""What the channels of the levels on disk hold: mean, deviation, extremes, zeros, over every row.

Nothing is computed but from the levels, a shard at a time, here or by workers. A shard's figures
are merged in the order of shards, so that they are the same to the last digit whoever took them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from rich.table import Table

from strata.pipeline.commands import lifecycle
from strata.pipeline.commands.answer import Answer
from strata.pipeline.commands.lifecycle import Options
from strata.pipeline.errors import NotThereYet
from strata.pipeline.feed.shard_moments import looking_at
from strata.pipeline.interrupt import Interruptions, interruptions
from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.materialize.cluster.cluster import Crew
from strata.pipeline.progress import Reporter, Tick
from strata.pipeline.run import levels
from strata.pipeline.run.overview import Overview
from strata.stages.features.moments import Moments
from strata.store.ahead import several
from strata.store.feature_store import Store
from strata.store.level.layout import LevelKey
from strata.store.level.level import Level

HEADS = ("mean", "deviation", "minimum", "maximum", "zeros")
THREADS = 2
"""Shards at a time, where there are no workers."""


def statistics(options: Options) -> Answer:
    """Look at every row of the levels that are asked for.

    Raises:
        LayerRange, NotThereYet: there is no such layer, or not one of its levels.
        LevelDamaged: a row is not the one that was written; names file and row.
        ClusterError: there are no workers, or they do not see the store.
    """
    found, report = lifecycle.find(options), lifecycle.reporting(options)
    keys, measured = _chosen(found, options, report), {}
    with interruptions() as stop, cluster.crew(options, report, stop, reads=True) as crew:
        for key in keys:
            level = found.store.open(key)
            with report.task(key.label, len(level), "rows") as tick:
                shards = _by_workers(crew, found.store, level) if crew else _here(level)
                measured[key] = reduce(Moments.merged, _watched(shards, level, stop, tick))
    value = {"run": str(found.directory), "levels": [_told(*one) for one in measured.items()]}
    table = _of_channels if options["channels"] else _of_levels
    return Answer(value, (table(f"levels of {found.directory}", value["levels"]),))


def _chosen(found: Overview, options: Options, report: Reporter) -> list[LevelKey]:
    """The levels that are there, of those that are asked for."""
    run, layer = found.existing(), options["layer"]
    if layer is not None:
        found.check_layer(layer)
    depths = range(len(run.nodes())) if layer is None else [layer]
    there = []
    for key in (key for depth in depths for key in levels.all_at(run, depth)):
        if options["split"] not in (None, key.split):
            continue
        state = levels.state_of(found.store, key).state
        if state == "complete":
            there.append(key)
        elif state != "absent":
            report.say(f"{key.label} is {state}, and left out")
    if not there:
        what = ("level", f"x_{layer}" if layer else "", options["split"] or "")
        raise NotThereYet(
            f"there is no {' '.join(filter(None, what))} in {found.store.root}. "
            f"Run: strata materialize {found.name} --layer {layer or 1}"
        )
    return there


def _watched(
    shards: Iterable[Moments], level: Level, stop: Interruptions, tick: Tick
) -> Iterator[Moments]:
    for shard, moments in enumerate(shards):
        stop.check()
        first, last = level.geometry.shard_range(shard)
        tick(last - first)
        yield moments


def _here(level: Level) -> Iterable[Moments]:
    return several(looking_at(level), range(level.geometry.shards), THREADS)


def _by_workers(crew: Crew, store: Store, level: Level) -> Iterable[Moments]:
    from strata.pipeline.materialize.cluster.checks import counted

    return counted(crew, store, level)


# ---- for machines and for people -----------------------------------------------------------------


def _told(key: LevelKey, moments: Moments) -> dict[str, Any]:
    """As JSON: of all channels together, and of each."""
    return {
        "level": key.label,
        "depth": key.depth,
        "split": key.split,
        "view": key.view,
        "dead": moments.dead,
        "all": _figures(moments.together())[0],
        "channels": _figures(moments),
    }


def _figures(moments: Moments) -> list[dict[str, float]]:
    columns = [getattr(moments, name) for name in HEADS[:-1]]
    columns.append(moments.zeros / moments.count)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [dict(zip(HEADS, row, strict=True)) for row in rows]


def _of_levels(title: str, found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("level", "channels", "dead", *HEADS, title=title, title_justify="left")
    for one in found:
        counts = (f"{len(one['channels']):,}", f"{one['dead']:,}")
        table.add_row(one["level"], *counts, *_cells(one["all"]))
    return table


def _of_channels(title: str, found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("level", "channel", *HEADS, title=title, title_justify="left")
    for one in found:
        for channel, figures in enumerate(one["channels"]):
            table.add_row(one["level"], str(channel), *_cells(figures))
    return table


def _cells(figures: Mapping[str, float]) -> list[str]:
    cells = [f"{figures[name]:.4g}" for name in HEADS[:-1]]
    return [*cells, f"{100 * figures['zeros']:.2f} %"]
