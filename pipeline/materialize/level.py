"""Write one level, shard by shard: what images and features share.

The next shard is computed while the last ones are published. Memory is bounded by a few shards, a
killed process loses those at work, and of two processes that want the same level one writes and the
other waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from strata.pipeline.materialize.cluster.submit import publish
from strata.pipeline.materialize.cluster.tasks import WorkerTask
from strata.pipeline.materialize.timing import Timing, WorkersTiming, limit
from strata.pipeline.progress import duration, size
from strata.pipeline.run import levels
from strata.pipeline.run.session import Session, patience
from strata.store.level.layout import Geometry, LevelKey
from strata.store.write.verify import Damage, mend
from strata.store.write.writer import LevelWriter

ComputeLock = AbstractContextManager[object]
ShardRows = Iterator[tuple[int, np.ndarray]]
"""Numbers of shards, and their stored elements, (rows, channel, y, x)."""


class ShardSource(Protocol):
    """A computation of the rows of a level."""

    work: str
    """Its name, for people: ``forward pass``."""

    def shards(self, todo: Sequence[int], timing: Timing, lock: ComputeLock) -> ShardRows:
        """The rows of some shards, in this order; ticks as rows are done.

        Args:
            lock: held while a shard is computed, from when its first rows are there: so of several
                threads one computes, and the next one has read.
        """
        ...


@contextmanager
def locked_writer(
    session: Session, key: LevelKey, shape: Geometry, damaged: Sequence[Damage] = ()
) -> Iterator[LevelWriter | None]:
    """The writer of a level that is locked and begun; None if there is nothing to do, perhaps
    because another process wrote the level while we waited for it.

    Args:
        damaged: files of a committed level to write again.
    """
    levels.refer_to(session.run, session.store)
    writer = session.store.writer(key, shape, session.run.lineage(key.depth))
    with writer.lock(patience(session)):
        if damaged:
            mend(writer, damaged)
        elif levels.is_current(session.store, key):
            yield None
            return
        elif writer.committed():
            session.store.remove_level(key)  # made from a level below that has changed since
        writer.begin()
        yield writer


def write_level(
    session: Session,
    writer: LevelWriter,
    source: ShardSource,
    task: WorkerTask | None,
    begun: float,
    **commit: Any,
) -> dict[str, Any]:
    """Write what is missing of a level that is locked and begun, and commit it.

    Args:
        task: tells workers to do what ``source`` does; None: there are no workers.
        begun: when work on the level began, by the monotonic clock.
        commit: parent, arrays and tool, as :meth:`LevelWriter.commit` takes them.

    Returns:
        Rows, bytes on disk, seconds and shares of the time, peak bytes of tensors, and whether all
        of it was written now.

    Raises:
        DiskFull, StoreRefused: every finished shard is kept.
        KeyboardInterrupt: somebody asked to stop; finished shards are kept.
    """
    todo, shape, label = writer.missing(), writer.geometry, writer.key.label
    rows = sum(last - first for first, last in map(shape.shard_range, todo))
    crew = session.crew if todo else None
    if crew is not None:
        crew.begin()
    with session.report.task(f"writing {label}", rows, "images") as tick:
        if crew is not None and task is not None:
            timing = WorkersTiming(source.work, len(todo), tick)
            nbytes = publish(session, writer, task, todo, timing)
        else:
            timing = Timing(source.work, shape.row_bytes, tick)
            shards = source.shards(todo, timing, nullcontext())
            nbytes = writer.fill(_until_stopped(session, timing.publishing(shards)))
    level = writer.commit(**commit)
    seconds, shares = time.monotonic() - begun, timing.shares
    session.report.say(
        f"wrote {label}: {rows:,} of {len(level):,} rows, {size(nbytes)}, {duration(seconds)}, "
        f"{rows / seconds:,.0f} images/s, {size(nbytes / seconds)}/s; "
        f"{limit(shares)} limits ({100 * shares[limit(shares)]:.0f} %)"
    )
    return {
        "rows": len(level),
        "bytes": level.nbytes,
        "seconds": seconds,
        "shares": shares,
        "peak_bytes": timing.peak_bytes,
        "whole": rows == len(level) and crew is None,  # not where many wrote it
    }


def _until_stopped(session: Session, shards: ShardRows) -> ShardRows:
    for shard in shards:
        yield shard
        session.stop.check()
