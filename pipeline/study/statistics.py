"""What the channels of the levels on disk hold: mean, deviation, extremes, zeros, over every row.

Nothing is computed but from the levels, a shard at a time, here or by workers. A shard's figures
are merged in the order of shards, so that they are the same to the last digit whoever took them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from strata.pipeline.errors import ClusterError, NotThereYet
from strata.pipeline.feed.level_feed import moments_of
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.materialize.cluster.cluster import Workers
from strata.pipeline.materialize.cluster.submit import in_order
from strata.pipeline.progress import Reporter
from strata.pipeline.run import levels
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.stores import StoreAddress
from strata.stages.features.moments import Moments
from strata.store.level.layout import LevelKey

HEADS = ("mean", "deviation", "minimum", "maximum", "zeros")
THREADS = 2
"""Shards at a time, where there are no workers."""


def statistics(
    found: Overview,
    keys: Sequence[LevelKey],
    report: Reporter,
    stop: Interruptions,
    crew: Workers | None = None,
) -> list[dict[str, Any]]:
    """Mean, deviation, extremes and zeros of the channels of some levels, over every row: of the
    features of tokens and vectors.

    Args:
        crew: workers that look; None: this process.

    Returns:
        As JSON, for each level: figures of all channels together, and of each.

    Raises:
        LevelDamaged: a row is not the one that was written; names file and row.
        ClusterError: there are no workers, or they do not see the store.
    """
    measured = []
    for key in keys:
        level = found.store.open(key)
        with report.task(key.label, len(level), "rows") as tick:
            task = partial(moments, StoreAddress.of(found.store), key, level.content_root)
            channels: Moments | None = None
            shards = in_order(crew, task, range(level.geometry.shards), THREADS)
            for shard, seen in enumerate(shards):
                stop.check()
                first, last = level.geometry.shard_range(shard)
                tick(last - first)
                channels = channels.merged(seen) if channels else seen
        assert channels is not None, "every level has a shard"
        measured.append(
            {
                "level": key.label,
                "depth": key.depth,
                "split": key.split,
                "view": key.view,
                "dead": channels.dead,
                "all": _figures(channels.together())[0],
                "channels": _figures(channels),
            }
        )
    return measured


@contextmanager
def moments(
    store: StoreAddress, key: LevelKey, content_root: str
) -> Iterator[Callable[[int], Moments]]:
    """The task that computes the moments of the channels of a level, shard by shard. Raises
    ClusterError: the level has, here, other values than the command knows."""
    level = store.open().open(key)
    if level.content_root != content_root:
        raise ClusterError(f"{key.label} has, here, other values than the command knows")
    yield moments_of(level)


def chosen(
    found: Overview, layer: int | None, split: str | None, say: Callable[[str], object]
) -> list[LevelKey]:
    """The levels that are there, of those that are asked for (None: of all layers, both splits).

    Raises:
        LayerRange, NotThereYet: there is no such layer, or not one of its levels.
    """
    run = found.existing()
    if layer is not None:
        found.check_layer(layer)
    depths = range(len(run.nodes())) if layer is None else [layer]
    there = []
    keys = (key for depth in depths for key in levels.all_at(run, depth))
    for key in (key for key in keys if split in (None, key.split)):
        state = levels.state_of(found.store, key).state
        if state == "complete":
            there.append(key)
        elif state != "absent":
            say(f"{key.label} is {state}, and left out")
    if not there:
        what = ("level", f"x_{layer}" if layer else "", split or "")
        raise NotThereYet(
            f"there is no {' '.join(filter(None, what))} in {found.store.root}. "
            f"Run: strata materialize {found.name} --layer {layer or 1}"
        )
    return there


def _figures(moments: Moments) -> list[dict[str, float]]:
    columns = [getattr(moments, name) for name in HEADS[:-1]]
    columns.append(moments.zeros / moments.count)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [dict(zip(HEADS, row, strict=True)) for row in rows]
