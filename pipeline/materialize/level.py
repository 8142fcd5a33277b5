"""Write one level, shard by shard: the line that images and features share.

The next shard is computed while the last ones are published. Memory is bounded by a few shards, a
killed process loses those at work, and of two processes that want the same level one writes and the
other waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strata.pipeline.materialize.cluster.tasks import WorkerTask
from strata.pipeline.materialize.timing import Line, ShardRows, Together
from strata.pipeline.progress import Tick, duration, size
from strata.pipeline.run import levels
from strata.pipeline.run.session import Session, patience
from strata.store.level.layout import Geometry, LevelKey
from strata.store.level.level import Level
from strata.store.write.mandate import Mandate
from strata.store.write.verify import Damage, mend
from strata.store.write.writer import LevelWriter


@dataclass(frozen=True)
class Content:
    """What goes into a level."""

    work: str
    """What computes it, for people: ``forward pass``."""
    shards: Callable[[Sequence[int], Line], ShardRows]
    """Those that are missing; ticks as rows are done."""
    parent: Mapping[str, Any] | None = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    tool: Mapping[str, str] = field(default_factory=dict)
    told: Callable[[Mandate], WorkerTask] | None = None
    """What workers of a cluster are told, to do the same; None: they cannot."""


def write_level(
    session: Session,
    key: LevelKey,
    shape: Geometry,
    content: Callable[[], Content],
    damaged: Sequence[Damage] = (),
) -> dict[str, Any] | None:
    """Write what is missing of a level and commit it.

    Args:
        content: called once the level is locked, because only then is it known what lies below it.
        damaged: files of a committed level to write again.

    Returns:
        Rows, bytes on disk, seconds and shares of the time, peak bytes of tensors, and whether all
        of it was written now; None if there was nothing to do, perhaps because another process
        wrote the level while we waited for it.

    Raises:
        DiskFull, StoreRefused: every finished shard is kept.
        KeyboardInterrupt: somebody asked to stop; finished shards are kept.
    """
    begun = time.monotonic()
    levels.refer_to(session.run, session.store)
    writer = session.store.writer(key, shape, session.run.lineage(key.depth))
    with writer.lock(patience(session)):
        if damaged:
            mend(writer, damaged)
        elif levels.is_current(session.store, key):
            return None
        elif writer.committed():
            session.store.remove_level(key)  # made from a level below that has changed since
        writer.begin()
        rows, nbytes, level, line = _fill(session, writer, content())
    seconds = time.monotonic() - begun
    session.report.say(
        f"wrote {key.label}: {rows:,} of {len(level):,} rows, {size(nbytes)}, {duration(seconds)}, "
        f"{rows / seconds:,.0f} images/s, {size(nbytes / seconds)}/s; "
        f"{line.limit} limits ({100 * line.shares[line.limit]:.0f} %)"
    )
    return {
        "rows": len(level),
        "bytes": level.nbytes,
        "seconds": seconds,
        "shares": line.shares,
        "peak_bytes": line.peak_bytes,
        "whole": rows == len(level) and isinstance(line, Line),  # not where many wrote it
    }


def _fill(
    session: Session, writer: LevelWriter, content: Content
) -> tuple[int, int, Level, Line | Together]:
    """Rows and bytes written, the committed level, and where the time went."""
    todo, shape = writer.missing(), writer.geometry
    rows = sum(b - a for a, b in map(shape.shard_range, todo))
    crew = session.crew if todo and content.told else None
    if crew is not None:
        crew.begin()
    with session.report.task(f"writing {writer.key.label}", rows, "images") as tick:
        if crew is not None:
            nbytes, line = _spread(session, writer, content, todo, tick)
        else:
            line = Line(content.work, shape.row_bytes, tick)
            nbytes = _here(session, writer, content, todo, line)
    return rows, nbytes, writer.commit(content.parent, content.arrays, content.tool), line


def _here(
    session: Session, writer: LevelWriter, content: Content, todo: Sequence[int], line: Line
) -> int:
    """Publish shards from this process; returns their bytes."""

    def produced() -> ShardRows:
        for shard in line.publishing(content.shards(todo, line)):
            yield shard
            session.stop.check()

    return writer.fill(produced())


def _spread(
    session: Session, writer: LevelWriter, content: Content, todo: Sequence[int], tick: Tick
) -> tuple[int, Together]:
    """Let workers publish shards; returns their bytes, and where the workers' time went."""
    from strata.pipeline.materialize.cluster.submit import publish

    assert content.told is not None
    told, together = content.told(Mandate.of(writer)), Together(content.work)
    return publish(session, writer, told, todo, together, tick), together
