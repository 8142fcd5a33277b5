"""Keep workers busy with the items of a task: a few of them under way, answers as they come.

A window of items is with the scheduler, so that a level of a million shards is no graph of a
million tasks. An answer is read and let go at once: a result that is kept would be computed again
when its worker dies. An item whose workers die is given up after some deaths, the others go on.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from strata.pipeline.errors import ClusterError, one_line
from strata.pipeline.materialize.cluster.cluster import WORKERS_S, Workers
from strata.store.errors import StoreRefused
from strata.store.parallel import map_in_threads

if TYPE_CHECKING:
    from distributed import Future

    from strata.pipeline.materialize.cluster.worker import Failed, Task

WINDOW = 3
"""Items under way for every worker: one computes, one is published, one waits."""
POLL_S = 0.02
"""Between two looks at Ctrl-C while nothing comes."""
LOOK_S = 5.0
"""Between two looks at whether there are workers."""
ACCIDENTS = 4
"""Workers that refuse: so many, and it is not they but the store."""


class WorkersDied(ClusterError):
    """Workers die of one item, again and again."""


def in_order(crew: Workers | None, task: Task, items: Sequence[Any], threads: int) -> Iterator[Any]:
    """What a task says of every item, in their order: here in some threads, or by workers. What
    those could not do is done here, where an error has its own name and exit code.

    Args:
        items: different from each other.

    Raises:
        ClusterError: there are no workers, or they do not see what the command sees.
    """
    if crew is None:
        with task() as work:
            yield from map_in_threads(work, items, threads)
        return
    from strata.pipeline.materialize.cluster.worker import Failed

    waiting: dict[Any, Any] = {}
    due = iter(items)
    first = next(due, None)
    with ExitStack() as opened:
        here = None
        for item, answer in Dispatch(crew, task).answers(items):
            if isinstance(answer, Failed):
                if answer.for_all:
                    raise refusal(answer)
                here = here or opened.enter_context(task())
                answer = here(item)
            waiting[item] = answer
            while first in waiting:
                yield waiting.pop(first)
                first = next(due, None)


class Dispatch:
    """Items of one task, under way."""

    def __init__(self, crew: Workers, task: Task, *, gpu: bool = False) -> None:
        """
        Args:
            gpu: give the items to workers with a GPU alone, where there are any.
        """
        self._crew, self._client, self._task = crew, crew.client, pickle.dumps(task)
        self._resources = {"GPU": 1} if gpu and crew.on_gpu else None
        self._under_way: dict[Future, Any] = {}
        self._refusing: set[str] = set()
        """Workers that cannot get at the files."""
        self._workers = max(1, crew.count())
        self._seen = self._looked = time.monotonic()
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
            for item, answer in self._in_a_window(items):
                if isinstance(getattr(answer, "error", None), WorkersDied):
                    killed.append(item)
                else:
                    yield item, answer
            for item in killed:  # Dask suspects all that a dead worker was given: alone, it is seen
                yield from self._in_a_window([item])
        finally:
            with suppress(Exception):  # the scheduler may be gone
                self._client.cancel(list(self._under_way), force=True)

    def _in_a_window(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        from distributed import as_completed

        from strata.pipeline.materialize.cluster.worker import serve

        coming, again, done = iter(items), list[Any](), as_completed(loop=self._client.loop)
        while True:
            while len(self._under_way) < WINDOW * self._workers:
                if (item := again.pop() if again else next(coming, None)) is None:
                    break
                future = self._client.submit(
                    serve, self._task, item, pure=False, resources=self._resources
                )
                self._under_way[future] = item
                done.add(future)
            if not self._under_way:
                return
            self.most = max(self.most, len(self._under_way))
            while not done.has_ready():
                self._look()
                time.sleep(POLL_S)
            future = next(done)
            item, answer = self._under_way[future], self._answer(future)
            del self._under_way[future]
            future.release()
            if self._others_may(answer):
                again.append(item)
            else:
                yield item, answer

    def _answer(self, future: Future) -> Any:
        from distributed import KilledWorker

        from strata.pipeline.materialize.cluster.worker import Failed

        while True:
            self._look()
            try:
                return future.result(timeout=LOOK_S)
            except TimeoutError:  # whoever has it is gone: it is done again
                continue
            except CancelledError:
                raise self._lost() from None
            except KilledWorker as error:
                died = f"workers died of it, {error.allowed_failures + 1} of them: out of memory?"
                return Failed(error.last_worker.address, WorkersDied(died))
            except Exception as error:
                return Failed("a worker", error)

    def _others_may(self, answer: Any) -> bool:
        """Is it one of several workers that cannot get at the files? It answers late, so that it is
        given little; others do that."""
        if not getattr(answer, "alone", False):
            return False
        known = answer.worker in self._refusing
        self._refusing.add(answer.worker)
        others = len(self._refusing) < min(self._workers, ACCIDENTS)
        if others and not known:
            self._crew.report.say(
                f"the worker {answer.worker} refuses, and others do its part: {answer.error}"
            )
        return others

    def _look(self) -> None:
        """Does somebody ask us to stop, and is there still somebody to wait for?"""
        self._crew.stop.check()
        if self._client.status not in ("running", "connecting"):
            raise self._lost()
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked, there = now, 0
        with suppress(OSError):
            there = self._crew.count()
        if there:
            self._workers, self._seen = there, now
        elif now - self._seen > WORKERS_S:
            raise ClusterError(
                f"all workers are gone, for {WORKERS_S:.0f} s. Start some and repeat the command: "
                "what is finished is kept"
            )

    def _lost(self) -> ClusterError:
        return ClusterError(
            f"{self._crew.where} is gone. Start it and repeat the command: what is finished is kept"
        )


def refusal(failed: Failed) -> Exception:
    """The error to raise where a worker refuses every item: its disk's, or a ClusterError."""
    if isinstance(failed.error, StoreRefused):
        failed.error.add_note(
            f"So says the worker {failed.worker}: mend that or stop it, and repeat the command; "
            "what is finished is kept"
        )
        return failed.error
    return ClusterError(
        f"the worker {failed.worker} refuses: {one_line(failed.error)}. What is finished is kept"
    )
