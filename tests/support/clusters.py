"""A Dask scheduler and workers as processes of their own, over TCP, to be stopped and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from command import environment
from distributed import Client
from root import PYTHONPATH
from runs import Place

from strata.pipeline.interrupt import Interruptions
from strata.pipeline.materialize import materialize
from strata.pipeline.materialize.cluster.cluster import Workers
from strata.pipeline.progress import Reporter
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.session import Session
from strata.store.level.layout import LevelKey
from strata.store.write.writer import LevelWriter

ANSWER_BYTES, TASK_BYTES = 1_000, 4_000
"""Most that one shard may put on the wire."""
PATIENCE = 120.0
"""A busy machine takes long to start workers."""
DASK = {
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
    "DASK_LOGGING__DISTRIBUTED": "critical",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
    "PYTHONPATH": PYTHONPATH,
}


def until(what: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait until something holds; returns it."""
    end = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < end, f"not within {patience:.0f} s"
        time.sleep(0.02)
    return found


class Deadly:
    """The number of a shard of which every worker dies."""

    def __mul__(self, rows: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return rows


@dataclass
class Cluster:
    """Processes of one scheduler."""

    place: Path
    address: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, workers: int) -> None:
        known = self.place / "scheduler.json"
        # No host but this one, no ports that another test may have.
        words = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        self._run("dask_scheduler", *words, "--scheduler-file", known)
        self.address = json.loads(until(lambda: known.exists() and known.read_text()))["address"]
        self.join(workers)

    def join(self, workers: int) -> None:
        """Start more of them, with the environment as it is now."""
        with self.client() as client:
            whole = len(client.scheduler_info()["workers"]) + workers
            for _ in range(workers):
                words = ["--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
                scratch = self.place / f"worker{len(self.processes)}"
                self._run("dask_worker", self.address, *words, "--local-directory", scratch)
            until(lambda: len(client.scheduler_info()["workers"]) == whole)

    def _run(self, module: str, *words: object) -> None:
        line = [sys.executable, "-m", f"distributed.cli.{module}", *map(str, words)]
        with (self.place / f"{module}{len(self.processes)}.log").open("wb") as log:
            env = {**environment(), **DASK}
            process = subprocess.Popen(
                line, cwd=self.place, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.processes.append(process)

    @contextmanager
    def client(self) -> Iterator[Client]:
        with Client(self.address, set_as_default=False, timeout=PATIENCE) as client:
            yield client

    def pids(self) -> list[int]:
        """Of the workers, not of the nannies that start them again."""
        with self.client() as client:
            found: Any = client.run(os.getpid)  # a coroutine only of a client that is one
            return list(found.values())

    def kill_scheduler(self) -> None:
        self.processes[0].kill()
        self.processes[0].wait()

    def end(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def cluster(place: Path, workers: int = 2) -> Iterator[Cluster]:
    place.mkdir()
    found = Cluster(place)
    try:
        found.start(workers)
        yield found
    finally:
        found.end()


@contextmanager
def crew_of(address: str | None, workers: int | None = None) -> Iterator[Workers]:
    """The workers of a scheduler, as a command has them."""
    crew = Workers(workers, address, "cpu", Reporter(), Interruptions())
    try:
        yield crew
    finally:
        crew.close()


def session_of(place: Place, crew: Workers | None = None) -> Session:
    """A session on a run that is there, as a command opens one."""
    import torch

    found: Overview = place.overview()
    return Session(found.existing(), found.store, torch.device("cpu"), crew=crew)


def without(place: Place, *depths: int) -> None:
    for depth in depths:
        for directory in place.store.glob(f"x_{depth}-*"):
            shutil.rmtree(directory)


def task_for(place: Place, view: str = "plain") -> tuple[partial[Any], int]:
    """The task of workers that publish x_1 train, begun anew, and its number of shards."""
    session = session_of(place)
    key = session.key(1, "train", view)
    return task_of(session, key), session.geometry(1, "train").shards


def task_of(session: Session, key: LevelKey) -> partial[Any]:
    """What the command gives to workers for a level of x_1, which is begun."""
    seen: list[partial[Any]] = []

    def begun(_: Session, writer: LevelWriter, rows: Any, task: partial[Any], **commit: Any) -> Any:
        writer.missing()
        seen.append(task)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, suppress(InterruptedError):
        patch.setattr(materialize, "write_level", begun)
        materialize.write(session, [key])
    return seen[0]


def told(task: partial[Any], **other: Any) -> partial[Any]:
    """A task that is told something else."""
    names = list(signature(task.func).parameters)
    given = dict(zip(names, task.args, strict=True)) | other
    return partial(task.func, *(given[name] for name in names))


def finished(place: Place, depth: int, name: str) -> dict[str, tuple[int, int]]:
    """Inode and mtime of the shards of a level that have a receipt, and of the receipts."""
    found = {}
    for receipt in place.store.glob(f"x_{depth}-*/{name}/receipts/*.json"):
        shard = receipt.parents[1] / f"x/c.{int(receipt.stem)}.0.0.0"
        for path in (receipt, shard):
            stat = path.stat()
            found[str(path.relative_to(place.store))] = (stat.st_ino, stat.st_mtime_ns)
    return found


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
