"""Workers, schedulers and commands die in the middle of a level: what is finished stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clusters import (
    Cluster,
    Deadly,
    cluster,
    crew_of,
    finished,
    go_on,
    session_of,
    stop,
    task_for,
    until,
    without,
)
from command import CLI, environment, start
from runs import Place, made, tiny

from strata.pipeline.errors import one_line
from strata.pipeline.materialize.cluster.submit import Dispatch
from strata.pipeline.materialize.cluster.worker import Failed
from strata.pipeline.materialize.timing import Done
from strata.store.level.level import COMMIT

TEXT = tiny(flip="false", layers=1, downsample="[]", epochs=1).replace("width = 8", "width = 64")
"""x_1 train.plain has some 26 shards: enough to be met in the middle."""
LEVEL = 1, "train.plain"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return made(tmp_path_factory.mktemp("sound") / "place", 1, TEXT)


@pytest.fixture
def place(sound: Place, tmp_path: Path) -> Place:
    """Without x_1."""
    place = sound.copy(tmp_path / "place")
    without(place, 1)
    return place


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("dask") / "cluster") as found:
        yield found


def words(place: Place, *more: object) -> tuple[object, ...]:
    return ("materialize", *place.options, "--layer", 1, *more)


@contextmanager
def in_the_middle(dask: Cluster, place: Place) -> Iterator[tuple[Any, int, dict[str, Any]]]:
    """A command whose level cannot be finished, because one worker is stopped: its process, that
    worker, and what the other has finished by now."""
    first, second = dask.pids()
    with start(place.root, *words(place, "--scheduler", dask.address)) as process:
        try:
            until(lambda: finished(place, *LEVEL) or process.poll() is not None)
            stop(first)
            # The other one finishes what it has.
            seen = until(lambda: len(now := finished(place, *LEVEL)) >= 4 and now)
            yield process, first, seen
        finally:
            process.kill()
            dask_goes_on(first, second)


def dask_goes_on(*pids: int) -> None:
    for pid in pids:
        try:
            go_on(pid)
        except ProcessLookupError:
            continue


def kept(place: Place, seen: dict[str, Any]) -> None:
    """Nothing that was finished is done again, not even touched."""
    now = finished(place, *LEVEL)
    assert {name: now.get(name) for name in seen} == seen


def whole(place: Place, sound: Place) -> None:
    assert place.files() == sound.files()
    assert not list(place.store.rglob(".tmp-*"))


def test_a_worker_is_killed(dask: Cluster, place: Place, sound: Place) -> None:
    with in_the_middle(dask, place) as (process, worker, seen):
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "done: write x_1" in out
    kept(place, seen)
    whole(place, sound)


def test_the_command_is_killed(dask: Cluster, place: Place, sound: Place) -> None:
    until(lambda: len(dask.pids()) == 2)
    with in_the_middle(dask, place) as (process, _, seen):
        process.kill()
        process.wait()
        assert not (place.level(*LEVEL) / COMMIT).exists()
    # The worker that was stopped may be at a shard still: a stray.
    again = place.do("materialize", "--layer", 1, "--scheduler", dask.address)
    assert again.rc == 0, again.err
    kept(place, seen)
    whole(place, sound)
    assert place.do("verify", "--deep").rc == 0


def test_a_shard_that_kills_its_workers_is_given_up(dask: Cluster, place: Place) -> None:
    until(lambda: len(dask.pids()) == 2)
    task, shards = task_for(place)
    items = [0, Deadly(), *range(1, shards)]
    with crew_of(dask.address) as crew:
        answers = dict(Dispatch(crew, task).answers(items))
    failed = answers.pop(items[1])
    assert isinstance(failed, Failed)
    assert not failed.for_all
    assert "workers died of it, 2 of them" in one_line(failed.error)
    assert sorted(answers) == list(range(shards))
    assert all(isinstance(answer, Done) for answer in answers.values())
    assert session_of(place).store.state(task.args[1]).rows == 1437


def test_ctrl_c_in_the_middle(place: Place, sound: Place) -> None:
    """As a terminal sends it: to the command and to its workers."""
    line = [sys.executable, str(CLI), *map(str, words(place, "--workers", 2))]
    with subprocess.Popen(
        line,
        cwd=place.root,
        env=environment(),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            until(lambda: finished(place, *LEVEL) or process.poll() is not None)
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    if process.returncode != 0:  # a quick machine is done before it hears of it
        assert process.returncode == 130, err
        assert "the same command goes on from there" in err.splitlines()[-1]
        assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        until(lambda: os.killpg(process.pid, 0), patience=20)
    seen = finished(place, *LEVEL)
    again = place.do("materialize", "--layer", 1)
    assert again.rc == 0, again.err
    kept(place, seen)
    whole(place, sound)


def test_the_scheduler_is_killed(dask: Cluster, place: Place, sound: Place) -> None:
    """The last test of this cluster."""
    until(lambda: len(dask.pids()) == 2)
    with in_the_middle(dask, place) as (process, _, seen):
        dask.kill_scheduler()
        _, err = process.communicate(timeout=100)
    assert process.returncode == 12, err
    last = err.splitlines()[-1]
    assert last.startswith(f"Error: the scheduler at {dask.address} is gone")
    assert "what is finished is kept" in last
    assert "Traceback" not in err
    again = place.do("materialize", "--layer", 1)
    assert again.rc == 0, again.err
    kept(place, seen)
    whole(place, sound)
