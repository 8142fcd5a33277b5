"""Write one level, shard by shard: what images and features share, here and in workers.

The next shard is computed while the last ones are published. Memory is bounded by a few shards, a
killed process loses those at work, and of two processes that want the same level one writes and the
other waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from strata.pipeline.errors import ClusterError, one_line
from strata.pipeline.interrupt import patience
from strata.pipeline.materialize.cluster.submit import Dispatch, refusal
from strata.pipeline.materialize.timing import NAMED, Done, Timing, limit
from strata.pipeline.progress import duration, size
from strata.pipeline.run import levels, rundir
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.session import Session
from strata.pipeline.run.stores import StoreAddress
from strata.stages.home import absolute
from strata.store.level.layout import Geometry, LevelKey
from strata.store.write.shard import Published, ShardWriter
from strata.store.write.unfinished import unsettled
from strata.store.write.writer import LevelWriter

if TYPE_CHECKING:
    from strata.pipeline.materialize.cluster.worker import Failed, Task

ROUNDS = 3
"""How often a shard is asked for that a worker has published and that is not to be seen here."""
ShardRows = Iterator[tuple[int, np.ndarray]]
"""Numbers of shards, and their stored elements, for example (rows, channel, y, x)."""


class ShardSource(Protocol):
    """A computation of the rows of a level."""

    work: str
    """Its name, for people: ``forward pass``."""

    def shards(self, todo: Sequence[int], timing: Timing) -> ShardRows:
        """The rows of some shards, in this order; ticks as rows are done. A shard is computed when
        it is its turn (``timing.computing``), from when its first rows are there: so of several
        threads one computes, and the next one has read."""
        ...


@contextmanager
def locked_writer(session: Session, key: LevelKey, shape: Geometry) -> Iterator[LevelWriter | None]:
    """The writer of a level that is locked and begun; None if there is nothing to do, perhaps
    because another process wrote the level while we waited for it.

    Args:
        shape: of a level that is new; one that is there, or was begun, goes on as it was.
    """
    levels.refer_to(session.run, session.store)
    shape = session.store.geometry(key) or shape
    writer = session.store.writer(key, shape, session.run.lineage(key.depth))
    waiting = patience(session.stop, session.report)
    with writer.lock(waiting):
        if levels.is_current(session.store, key):
            yield None
            return
        if writer.committed():
            # It was made from a level below that has changed since.
            session.store.remove_level(key, waiting)
        writer.begin()
        yield writer


def write_level(
    session: Session, writer: LevelWriter, source: ShardSource, task: Task, **commit: Any
) -> dict[str, Any]:
    """Write what is missing of a level that is locked and begun, and commit it.

    Args:
        task: what workers do in place of ``source``: it gives the function of :func:`publishing`.
        commit: parent, arrays and tool, as :meth:`LevelWriter.commit` takes them.

    Returns:
        Rows, bytes on disk, seconds and shares of the time, peak bytes of tensors, and whether all
        of it was written now.

    Raises:
        DiskFull, StoreRefused: every finished shard is kept.
        KeyboardInterrupt: somebody asked to stop; finished shards are kept.
    """
    begun = time.monotonic()
    todo, shape, label = writer.missing(), writer.geometry, writer.key.label
    rows = sum(map(shape.rows_in, todo))
    crew = session.crew if todo else None
    if crew is not None:
        crew.begin()
    with session.report.task(f"writing {label}", rows, "images") as tick:
        timing = Timing(source.work, shape.row_bytes, tick, shards=len(todo))
        if crew is not None:
            nbytes = _by_workers(session, writer, task, todo, timing)
        else:
            shards = source.shards(todo, timing)
            nbytes = writer.fill(timing.publishing(shards, session.stop.check))
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


# ---- by workers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunAddress:
    """Paths by which a worker finds what a run is made of. All of it must be on a shared file
    system, but for a store in a bucket."""

    run: Path
    store: StoreAddress
    source: str
    """The images, as a recipe names them, with an absolute path."""
    data_root: Path
    """Directory of torchvision's data sets."""

    @classmethod
    def of(cls, session: Session) -> RunAddress:
        run, source = session.run.directory.absolute(), absolute(session.run.source)
        root = session.options.data_root.absolute()
        return cls(run, StoreAddress.of(session.store), source, root)

    def begun(self, key: LevelKey, shape: Geometry) -> tuple[Run, ShardWriter]:
        """The run, which must give a level its name (so its recipe, layers and scales are those
        that the command knows), and a writer of the level's shards, which must be begun. Raises
        ClusterError, StoreRefused: it is not so, here."""
        store = self.store.open()
        writer = ShardWriter(store.root, key, shape, store.files)
        writer.expect_begun()
        run = rundir.find(self.run)
        if run is None:
            raise ClusterError(f"there is no run in {self.run} here: it must lie on a shared disk")
        nodes = run.nodes()
        if key.depth >= len(nodes) or nodes[key.depth].fingerprint != key.fingerprint:
            raise ClusterError(
                f"the run in {self.run} is, here, not the one that x_{key.depth} is of"
            )
        return run, writer


def publishing(writer: ShardWriter, source: ShardSource) -> Callable[[int], Done]:
    """A function of a worker that computes a shard and publishes it, unless another has."""
    from strata.pipeline.materialize.cluster.worker import this_worker

    worker, shape = this_worker(), writer.geometry

    def publish(shard: int) -> Done:
        first, last = shape.shard_range(shard)
        timing = Timing(source.work, shape.row_bytes, lock=worker.computing)
        published, seconds = writer.done(shard), {}
        if published is None:
            for _, rows in timing.publishing(source.shards([shard], timing)):
                published = writer.put(shard, rows, worker.threads)
            seconds = timing.seconds
        assert published is not None
        return Done(worker.label, last - first, published, seconds, timing.peak_bytes)

    return publish


def _by_workers(
    session: Session, writer: LevelWriter, task: Task, todo: Sequence[int], timing: Timing
) -> int:
    """Let workers publish shards of a level that is locked; returns their bytes.

    Raises:
        DiskFull, StoreRefused: of a worker; nothing more is begun, finished shards are kept.
        ClusterError: names the shards that failed, once all others are finished.
    """
    from strata.pipeline.materialize.cluster.worker import Failed

    published: dict[int, Published] = {}
    failed: dict[int, Failed] = {}
    for _ in range(ROUNDS):
        dispatch = Dispatch(session.crew, task, gpu=writer.key.depth > 0)
        for shard, answer in dispatch.answers(todo):
            if isinstance(answer, Done):
                published[shard] = answer.published
                timing.done(answer)
            elif answer.for_all:
                raise refusal(answer)
            else:
                failed[shard] = answer
        todo = unsettled(writer, published.values())
        if not todo:
            break
    unseen = Failed("a worker", ClusterError("it was published, and is not to be seen here"))
    failed |= dict.fromkeys(todo, unseen)
    writer.sweep()  # what workers that died were at
    session.report.say(f"  {timing.workers()}")
    if failed:
        raise _named(writer, failed, len(published) - len(todo))
    return sum(one.nbytes for one in published.values())


def _named(writer: LevelWriter, failed: dict[int, Failed], finished: int) -> ClusterError:
    named = []
    for shard, why in sorted(failed.items())[:NAMED]:
        first, last = writer.geometry.shard_range(shard)
        said = one_line(why.error) if str(why.error) else type(why.error).__name__
        named.append(f"shard {shard} (rows {first}…{last - 1}, on {why.worker}): {said}")
    rest = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    noun = "shard" if len(failed) == 1 else "shards"
    return ClusterError(
        f"{len(failed)} {noun} of {writer.key.label} failed, {finished} are finished and kept. "
        f"{'; '.join(named)}{rest}. Mend that and repeat the command: only these are missing"
    )
