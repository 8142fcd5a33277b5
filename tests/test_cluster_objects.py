"""Workers on a store in a bucket: the same objects as of one process on a disk."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster, cluster, until
from command import environment, start
from house import Place, made
from s3_server import Road, connect, new_bucket, road, serving, use
from test_object_commands import TEXT, Remote, both, levels, local_levels

from pipeline.stores import Address, open_store


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


def test_objects_by_workers_are_those_of_one_process(
    dask: Cluster, empty: Remote, local: Place
) -> None:
    said = empty.do("materialize", "--layer", 2, "--scheduler", dask.address)
    assert said.rc == 0, said.err
    assert f"2 workers at {dask.address}" in said.err
    assert "images/s by worker: 127.0.0.1:" in said.err
    assert levels(empty.objects) == local_levels(local)
    assert empty.weights() == local.weights()
    assert list((empty.root / "cache").iterdir()), "workers read through the command's cache"

    before, files = levels(empty.objects), empty.objects.files
    path = empty.level_path(1, "train.plain") / "c.1.0.0.0"
    data = bytearray(files.read(path))
    data[50] ^= 4
    files.put(path, bytes(data))  # pyright: ignore
    found = empty.do("verify", "--deep", "--scheduler", dask.address)
    assert found.rc == 10
    assert str(path) in found.out
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
def test_two_clients_at_once_end_with_one_result(dask: Cluster, empty: Remote) -> None:
    """That of one process alone: its layer is solved in a process like theirs."""
    places = [Remote(empty.root, f"run{i}", bucket=empty.bucket) for i in range(2)]
    said = both(places, "materialize", "--layer", 1, "--scheduler", dask.address)
    assert [result.rc for result in said] == [0, 0], [result.err for result in said]
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
        assert way.count(rf"PUT .*train\.plain/c\.{int(name.removesuffix('.json'))}\.") == 1
    x_1 = {n: data for n, data in local_levels(local).items() if not n.startswith("x_2")}
    assert levels(empty.objects) == x_1


def receipts(place: Remote) -> Path:
    return place.level_path(1, "train.plain") / "receipts"


@pytest.mark.parametrize("more", ["", "?writers=1"])
def test_a_store_is_told_so_that_another_process_finds_it(
    empty: Remote, tmp_path: Path, more: str
) -> None:
    store = open_store(f"{empty.store}{more}", f"{tmp_path / 'copies'}:12345")
    told = pickle.loads(pickle.dumps(Address.of(store)))
    again = told.open()
    assert str(again.root) == empty.store
    assert again.files.bucket.conditional == (not more)
    assert (again.files.cache.directory, again.files.cache.budget) == (tmp_path / "copies", 12345)
    assert Address.of(connect(empty.bucket)).read_cache is None


def test_a_folder_is_told_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = Address.of(open_store(Path("features")))
    assert told == Address(str(tmp_path / "features"))
    assert told.open().root == tmp_path / "features"
