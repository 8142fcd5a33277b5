"""Workers on a store in a bucket: the same objects as of one process on a disk."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import ANSWER_BYTES, TASK_BYTES, Cluster, cluster, crew_of, task_of, until
from command import environment, start
from remote import TEXT, Remote, both, levels, local_levels
from runs import Place, here, made
from s3_server import Road, connect, new_bucket, road, serving, use

from strata.pipeline.materialize.cluster.submit import Dispatch
from strata.pipeline.materialize.timing import Done
from strata.pipeline.run import rundir
from strata.pipeline.run.session import Session
from strata.pipeline.run.stores import StoreAddress, open_store
from strata.store.level.level import Level


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same run on a disk, of one process. Not to be changed."""
    return made(tmp_path_factory.mktemp("local") / "place", 2, TEXT)


@pytest.fixture(scope="module")
def open_way() -> Iterator[Road]:
    """A server, and the road that everybody takes to it."""
    with serving() as url, road(url) as way, pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, way.url)
        yield way


@pytest.fixture
def way(open_way: Road) -> Iterator[Road]:
    yield open_way
    open_way.slow = "$^"
    open_way.lost.clear()


@pytest.fixture(scope="module")
def dask(open_way: Road, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Workers with credentials of their own: those of the environment that they are started in."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment().items():
            monkeypatch.setenv(name, value)
        with cluster(tmp_path_factory.mktemp("dask") / "cluster") as found:
            yield found


@pytest.fixture
def empty(way: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Nothing is there yet."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tiny.toml").write_text(TEXT)
    return Remote(tmp_path, bucket=new_bucket(way.url))


@pytest.mark.slow
def test_objects_by_workers_are_those_of_one_process(
    dask: Cluster, empty: Remote, local: Place
) -> None:
    said = empty.do("materialize", "--layer", 2, "--scheduler", dask.address)
    assert said.rc == 0, said.err
    assert f"2 workers at {dask.address}" in said.err
    assert "images/s by worker: 127.0.0.1:" in said.err
    assert levels(empty.objects) == local_levels(local)
    assert empty.weights() == local.weights()
    seen = empty.do("statistics", "--json", "--scheduler", dask.address)
    assert seen.json["levels"] == local.do("statistics", "--json").json["levels"]

    before, files = levels(empty.objects), empty.objects.files
    path = empty.level_path(1, "train.plain") / "x/c.1.0.0.0"
    data = bytearray(files.read(path))
    data[50] ^= 4
    files.put(path, bytes(data))  # pyright: ignore
    found = empty.do("verify", "--deep", "--scheduler", dask.address)
    assert found.rc == 10
    assert str(path) in found.out
    alone = ("--store", f"{empty.store}?writers=1", "--scheduler", dask.address)
    assert here("verify", *empty.options, "--deep", *alone).rc == 10, "who only looks may be many"
    mended = empty.do("verify", "--deep", "--repair", "--scheduler", dask.address)
    assert mended.rc == 0, mended.err
    assert levels(empty.objects) == before


@pytest.mark.slow
def test_workers_of_this_machine_and_answers_that_are_lost(
    empty: Remote, way: Road, local: Place
) -> None:
    way.lost += [r"PUT .*/c\.0", r"PUT .*/c\.1", r"PUT .*/receipts/000001", r"PUT .*/COMMIT"]
    said = empty.do("materialize", "--layer", 2, "--workers", 2)
    assert said.rc == 0, said.err
    assert not way.lost
    assert levels(empty.objects) == local_levels(local)


@pytest.mark.slow
@pytest.mark.parametrize("with_workers", [1, 2])
def test_two_clients_at_once_end_with_one_result(
    dask: Cluster, empty: Remote, with_workers: int
) -> None:
    """That of one process alone: its layer is solved in a process like theirs."""
    places = [Remote(empty.root, f"run{i}", bucket=empty.bucket) for i in range(2)]
    words = [("materialize", *place.options, "--layer", 1) for place in places]
    workers = [("--scheduler", dask.address)] * with_workers + [()] * (2 - with_workers)
    with ExitStack() as stack:
        begun = [
            stack.enter_context(start(empty.root, *w, *more))
            for w, more in zip(words, workers, strict=True)
        ]
        said = [process.communicate(timeout=100) for process in begun]
    for process, (_, err) in zip(begun, said, strict=True):
        assert process.returncode == 0, err
    alone = Place(empty.root, "alone")
    assert [result.rc for result in both([alone], "materialize", "--layer", 1)] == [0]
    assert levels(empty.objects) == local_levels(alone)


@pytest.mark.slow
def test_a_worker_is_killed(dask: Cluster, empty: Remote, way: Road, local: Place) -> None:
    """What is finished by then is not put again."""
    assert empty.do("train", "--layer", 1).rc == 0
    until(lambda: len(dask.pids()) == 2)
    victim, _ = dask.pids()
    way.seen.clear()
    way.slow = r"PUT .*x_1.*/c\."
    words = ("materialize", *empty.options, "--layer", 1, "--scheduler", dask.address)
    with start(empty.root, *words) as process:
        until(lambda: way.count(r"PUT .*x_1.*/receipts/") or process.poll() is not None)
        there = [n for n in empty.objects.files.names(receipts(empty)) if n.endswith(".json")]
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert there
    for name in there:
        assert way.count(rf"PUT .*train\.plain/x/c\.{int(name.removesuffix('.json'))}\.") == 1
    x_1 = {n: data for n, data in local_levels(local).items() if not n.startswith("x_2")}
    assert levels(empty.objects) == x_1


def task_for(place: Remote, cache: Path) -> tuple[partial[Any], Level]:
    """What workers are told of x_1 train, begun, and the level that they read."""
    store, run = open_store(place.store, f"{cache}:50MB"), rundir.find(place.run)
    assert run is not None
    session = Session(run, store, torch.device("cpu"))
    return task_of(session, session.key(1, "train", "plain")), session.images()["train"]


@pytest.mark.slow
def test_what_workers_are_told_and_through_which_cache_they_read(
    dask: Cluster, empty: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a path that this process does not read through, so the copies are the workers'."""
    assert empty.do("train", "--layer", 1).rc == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "our-own-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "our-own-secret")
    task, base = task_for(empty, tmp_path / "copies")
    told = pickle.dumps(task)
    assert len(told) < TASK_BYTES
    assert empty.store.encode() in told
    assert b"our-own" not in told
    assert not (tmp_path / "copies").exists()
    with crew_of(dask.address) as crew:
        answers = dict(Dispatch(crew, task).answers(range(task.args[2].shards)))
    assert len(answers) > 1
    for answer in answers.values():
        assert isinstance(answer, Done)
        assert len(pickle.dumps(answer)) < ANSWER_BYTES < answer.published.nbytes
    copies = {path.name for path in (tmp_path / "copies").iterdir()}
    assert {facts["sha256"] for facts in base.shards} <= copies


@pytest.mark.slow
def test_workers_without_credentials_say_so(
    empty: Remote, local: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs count, and not those of the command. Beside one that has some, they do no harm."""
    assert empty.do("train", "--layer", 1).rc == 0
    with monkeypatch.context() as theirs:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            theirs.delenv(name)
        theirs.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # which machines in AWS ask
        hands = Cluster(tmp_path)
        hands.start(1)
    order = ("materialize", "--layer", 1, "--scheduler", hands.address)
    try:
        alone = empty.do(*order)
        none = [name for name in levels(empty.objects) if "x_1" in name and "/c." in name]
        hands.join(1)
        beside = empty.do(*order)
    finally:
        hands.end()
    assert (alone.rc, none) == (11, [])
    assert "no credentials: set AWS_ACCESS_KEY_ID" in alone.err
    assert "So says the worker 127.0.0.1:" in alone.err
    assert beside.rc == 0, beside.err
    assert beside.err.count("refuses, and others do its part") >= 1
    wanted, found = local_levels(local), levels(empty.objects)
    assert {name: found[name] for name in wanted if "x_2" not in name} == {
        name: data for name, data in wanted.items() if "x_2" not in name
    }


@pytest.mark.parametrize(
    "words", [("materialize", "--layer", 1), ("run",), ("verify", "--deep", "--repair")]
)
def test_a_store_of_one_writer_is_not_given_to_workers(
    empty: Remote, words: tuple[object, ...]
) -> None:
    """tests/store/s3/test_shard_objects.py has what would become of it."""
    command, *more = words
    store = ("--store", f"{empty.store}?writers=1", "--workers", 2)
    said = here(command, *empty.options, *more, *store)
    assert said.rc == 2
    assert "there is one writer, and workers are several" in said.err
    assert not empty.run.exists()


def receipts(place: Remote) -> Path:
    return place.level_path(1, "train.plain") / "receipts"


@pytest.mark.parametrize("more", ["", "?writers=1"])
def test_a_store_is_told_so_that_another_process_finds_it(
    empty: Remote, tmp_path: Path, more: str
) -> None:
    store = open_store(f"{empty.store}{more}", f"{tmp_path / 'copies'}:12345")
    told = pickle.loads(pickle.dumps(StoreAddress.of(store)))
    again = told.open()
    assert str(again.root) == empty.store
    assert again.files.conditional == (not more)
    assert (again.files.cache.directory, again.files.cache.budget) == (tmp_path / "copies", 12345)
    assert StoreAddress.of(connect(empty.bucket)).read_cache is None


def test_a_folder_is_told_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = StoreAddress.of(open_store(Path("features")))
    assert told == StoreAddress(str(tmp_path / "features"))
    assert told.open().root == tmp_path / "features"
