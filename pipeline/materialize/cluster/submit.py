"""Keep workers busy with the items of a task: a few of them under way, answers as they come.

A window of items is with the scheduler, so that a level of a million shards is no graph of a
million tasks. An answer is read and let go at once: a result that is kept would be computed again
when its worker dies. An item whose workers die is given up after some deaths, the others go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from strata.pipeline.errors import ClusterError, one_line
from strata.pipeline.materialize.cluster import tasks
from strata.pipeline.materialize.cluster.tasks import WORKERS_S, Done, Failed, WorkerTask
from strata.pipeline.materialize.timing import NAMED, WorkersTiming
from strata.pipeline.run.session import Crew, Session
from strata.store.errors import StoreRefused
from strata.store.write.mandate import Published, unsettled
from strata.store.write.writer import LevelWriter

if TYPE_CHECKING:
    from distributed import Client, Future

WINDOW = 3
"""Items under way for every worker: one computes, one is published, one waits."""
POLL_S = 0.2
"""Between two looks at Ctrl-C while nothing comes."""
LOOK_S = 5.0
"""Between two looks at whether there are workers, while nothing comes."""
ROUNDS = 3
"""How often a shard is asked for that a worker has published and that is not to be seen here."""
ACCIDENTS = 4
"""Workers that refuse: so many, and it is not they but the store."""


class WorkersDied(ClusterError):
    """Workers die of one item, again and again."""


class Dispatch:
    """Items of one task, under way."""

    def __init__(self, crew: Crew, task: WorkerTask) -> None:
        self._crew, self._task = crew, task
        self._client: Client = crew.client
        self._finished: SimpleQueue[Future] = SimpleQueue()
        self._under_way: dict[Future, Any] = {}
        self._again: deque[Any] = deque()
        self._refusing: set[str] = set()
        """Workers that cannot get at the files."""
        self._workers = max(1, crew.count())
        self._gpu = isinstance(task, tasks.FeaturesTask) and crew.on_gpu
        self._heard = self._looked = time.monotonic()
        self.most = 0
        """Items that were under way at once."""

    def answers(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Every item with its answer, as they come; :class:`Failed` where there is none.

        Raises:
            ClusterError: the scheduler, or all workers, are gone.
            KeyboardInterrupt: somebody asked to stop; what is under way is cancelled.
        """
        killed: list[Any] = []
        try:
            for item, answer in self._in_a_window(iter(items)):
                if isinstance(answer, Failed) and isinstance(answer.error, WorkersDied):
                    killed.append(item)
                else:
                    yield item, answer
            # Dask suspects all that a dead worker was given: alone, it is seen who kills.
            yield from self._in_a_window(iter(killed), alone=True)
        finally:
            with suppress(Exception):  # the scheduler may be gone
                self._client.cancel(list(self._under_way), force=True)

    def _in_a_window(
        self, coming: Iterator[Any], *, alone: bool = False
    ) -> Iterator[tuple[Any, Any]]:
        self._submit(coming, alone)
        while self._under_way:
            self._look()
            future = self._next()
            item, answer = self._under_way[future], self._answer(future)
            del self._under_way[future]
            future.release()
            if others := isinstance(answer, Failed) and self._others_may(answer):
                self._again.append(item)
            self._submit(coming, alone)
            if not others:
                yield item, answer

    def _others_may(self, failed: Failed) -> bool:
        """Is it one of several workers that cannot get at the files? It answers late, so that it is
        given little; others do that."""
        if not (failed.for_all and tasks.one_machine_alone(failed.error)):
            return False
        known = failed.worker in self._refusing
        self._refusing.add(failed.worker)
        others = len(self._refusing) < min(self._workers, ACCIDENTS)
        if others and not known:
            self._crew.report.say(
                f"the worker {failed.worker} refuses, and others do its part: {failed.error}"
            )
        return others

    def _submit(self, coming: Iterator[Any], alone: bool) -> None:
        room = max(0, (1 if alone else WINDOW * self._workers) - len(self._under_way))
        again = [self._again.popleft() for _ in range(min(room, len(self._again)))]
        for item in chain(again, islice(coming, room - len(again))):
            future = self._crew.submit(self._task, item, gpu=self._gpu)
            self._under_way[future] = item
            future.add_done_callback(self._finished.put)
        self.most = max(self.most, len(self._under_way))

    def _next(self) -> Future:
        """The next future that is done."""
        while True:
            self._crew.stop.check()
            with suppress(Empty):
                future = self._finished.get(timeout=POLL_S)
                self._heard = time.monotonic()
                return future
            self._look()

    def _answer(self, future: Future) -> Any:
        from distributed import KilledWorker

        while True:
            self._crew.stop.check()
            try:
                return future.result(timeout=POLL_S)
            except TimeoutError:
                self._look()
            except CancelledError:
                raise self._lost() from None
            except KilledWorker as error:
                died = f"workers died of it, {error.allowed_failures + 1} of them: out of memory?"
                return Failed(error.last_worker.address, WorkersDied(died))
            except Exception as error:
                return Failed("a worker", error)

    def _look(self) -> None:
        """Is there still somebody to wait for?"""
        if self._client.status not in ("running", "connecting"):
            raise self._lost()
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked, there = now, 0
        with suppress(OSError):
            there = self._crew.count()
        if there:
            self._workers, self._heard = there, now
        elif now - self._heard > WORKERS_S:
            raise ClusterError(
                f"all workers are gone, for {WORKERS_S:.0f} s. Start some and repeat the command: "
                "what is finished is kept"
            )

    def _lost(self) -> ClusterError:
        return ClusterError(
            f"{self._crew.where} is gone. Start it and repeat the command: what is finished is kept"
        )


# ---- writing a level ----------------------------------------------------------------------------


def publish(
    session: Session,
    writer: LevelWriter,
    task: WorkerTask,
    todo: Sequence[int],
    timing: WorkersTiming,
) -> int:
    """Let workers publish shards of a level that is locked; returns their bytes.

    Raises:
        DiskFull, StoreRefused: of a worker; nothing more is begun, finished shards are kept.
        ClusterError: names the shards that failed, once all others are finished.
    """
    assert session.crew is not None
    published: dict[int, Published] = {}
    failed: dict[int, Failed] = {}
    for _ in range(ROUNDS):
        for shard, answer in Dispatch(session.crew, task).answers(todo):
            if isinstance(answer, Done):
                published[shard] = Published(shard, answer.nbytes, answer.sha256)
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


def refusal(failed: Failed) -> Exception:
    """The error to raise where a worker refuses every shard: its disk's, or a ClusterError."""
    if isinstance(failed.error, StoreRefused):
        failed.error.add_note(
            f"So says the worker {failed.worker}: mend that or stop it, and repeat the command; "
            "what is finished is kept"
        )
        return failed.error
    return ClusterError(
        f"the worker {failed.worker} refuses: {one_line(failed.error)}. What is finished is kept"
    )


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
