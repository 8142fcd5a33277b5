"""Levels written, images read and bytes hashed by workers: as one process does it, or refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from axes import forms
from clusters import (
    ANSWER_BYTES,
    TASK_BYTES,
    Cluster,
    cluster,
    crew_of,
    session_of,
    task_for,
    told,
    without,
)
from command import PETS, pets, recipe
from runs import Place, here, made
from spoil import flip, named

from strata.pipeline.commands.verify import hashing
from strata.pipeline.errors import ClusterError, one_line
from strata.pipeline.materialize.cluster import cluster as cluster_module
from strata.pipeline.materialize.cluster import worker
from strata.pipeline.materialize.cluster.submit import WINDOW, Dispatch
from strata.pipeline.materialize.cluster.worker import Failed
from strata.pipeline.materialize.timing import Done
from strata.pipeline.run.stores import StoreAddress
from strata.store.errors import DiskFull, StoreRefused
from strata.store.fingerprint import sha256
from strata.store.level.layout import LevelKey
from strata.store.level.level import COMMIT


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("dask") / "cluster") as found:
        yield found


# ---- the same bytes -----------------------------------------------------------------------------


def test_levels_by_workers_are_those_of_one_process(
    dask: Cluster, place: Place, sound: Place
) -> None:
    without(place, 0, 1, 2)
    shutil.rmtree(place.store / "sources")
    (place.run / "data.json").unlink()
    said = place.do("materialize", "--layer", 2, "--scheduler", dask.address)
    assert said.rc == 0, said.err
    assert place.files() == sound.files()
    assert place.weights() == sound.weights()
    assert f"2 workers at {dask.address}" in said.err
    assert "images/s by worker: 127.0.0.1:" in said.err
    with dask.client() as client:
        there = client.run_on_scheduler(eval, "'torch' in __import__('sys').modules")
    assert not there, "a scheduler computes nothing"
    again = place.do("materialize", "--layer", 2, "--scheduler", "tcp://127.0.0.1:1")
    assert again.out == "nothing to do: everything is there\n", "nobody is connected to for nothing"
    record = json.loads((place.run / "layer_1/features.json").read_text())["body"]
    assert record["outcome"]["whole"] is False, "its seconds are not those of one process"
    assert sum(record["levels"]["test"]["shares"].values()) == pytest.approx(1)


def test_levels_of_any_axes_by_workers_are_those_of_one_process(
    dask: Cluster, tmp_path: Path
) -> None:
    """Tokens and a grid of them; what is said of their channels, too."""
    tmp_path.joinpath("alone").mkdir()
    alone = made(tmp_path / "alone", 2, forms(tmp_path / "alone", "uint4", views=2))
    place = alone.copy(tmp_path / "shared")
    without(place, 1, 2)
    for j in (1, 2):
        said = place.do("materialize", "--layer", j, "--scheduler", dask.address)
        assert said.rc == 0, said.err
    assert place.files() == alone.files()
    one, other = (
        p.do("statistics", "--json", *more).json["levels"]
        for p, more in ((alone, ()), (place, ("--scheduler", dask.address)))
    )
    assert one == other


@pytest.mark.slow
def test_workers_of_this_machine(place: Place, sound: Place) -> None:
    """Four of them, which end with the command."""
    without(place, 1)
    said = place.do("materialize", "--layer", 1, "--workers", 4)
    assert said.rc == 0, said.err
    assert place.files() == sound.files()
    assert "4 workers at tcp://127.0.0.1:" in said.err


def test_images_of_a_folder_named_from_here(
    dask: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers stand in another directory."""
    monkeypatch.chdir(tmp_path)
    pets(tmp_path / "pets")
    name, found = recipe(tmp_path, **PETS), {}
    for store, words in (("alone", ()), ("shared", ("--scheduler", dask.address))):
        options = ("--layer", 1, "--run", f"run {store}", "--store", store)
        said = here("materialize", name, *options, *words)
        assert said.rc == 0, said.err
        found[store] = {
            str(path.relative_to(store)): path.read_bytes()
            for path in Path(store).rglob("x_*/*/**/*.*")
        }
    assert found["alone"] == found["shared"]
    assert len(found["alone"]) > 30


def test_broken_images_are_counted_as_by_one_process(
    dask: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (pets(tmp_path / "pets") / "train/cat/1.png").write_bytes(b"no image")
    name, errors = recipe(tmp_path, **PETS), []
    for words in ((), ("--scheduler", dask.address)):
        said = here("materialize", name, "--layer", 1, *words)
        assert said.rc == 4
        errors.append(said.error)
    assert errors[0] == errors[1]
    assert "train/cat/1.png" in errors[0]


# ---- hashing ------------------------------------------------------------------------------------


def test_workers_find_the_damage_that_one_process_finds(dask: Cluster, place: Place) -> None:
    spoiled = place.level(1, "train.plain") / "x/c.2.0.0.0"
    flip(spoiled, 100)
    (place.level(0, "test") / "x/c.0.0.0.0").unlink()
    alone = place.do("verify", "--deep", "--json")
    shared = place.do("verify", "--deep", "--json", "--scheduler", dask.address)
    assert (alone.rc, shared.rc) == (10, 10)
    assert alone.out == shared.out
    assert str(spoiled) in named(shared)


def test_damage_is_mended_by_workers(dask: Cluster, place: Place, sound: Place) -> None:
    flip(place.level(1, "train.plain") / "x/c.2.0.0.0", 100)
    said = place.do("verify", "--deep", "--repair", "--scheduler", dask.address)
    assert said.rc == 0, said.err
    assert "the same values as before" in said.out
    assert place.files() == sound.files()


def test_a_level_that_workers_do_not_see_is_not_called_damaged(dask: Cluster, place: Place) -> None:
    with crew_of(dask.address) as crew:
        address = StoreAddress(str(place.store))
        task = partial(hashing, address, place.root / "not here", "0" * 64)
        (answer,) = (answer for _, answer in Dispatch(crew, task).answers([0]))
    assert isinstance(answer, Failed)
    assert answer.for_all
    assert "not the level that the command sees" in one_line(answer.error)


# ---- shards that fail ---------------------------------------------------------------------------


def test_a_shard_that_fails_is_named_and_the_rest_is_finished(
    dask: Cluster, place: Place, sound: Place
) -> None:
    without(place, 2)
    poisoned = place.level(1, "train.plain") / "x/c.2.0.0.0"
    flip(poisoned, 100)
    said = place.do("materialize", "--layer", 2, "--scheduler", dask.address)
    assert said.rc == 12
    level = place.level(2, "train.plain")
    assert "of x_2 train.plain failed" in said.error
    assert f"{poisoned}: row" in said.error
    assert "repeat the command" in said.error
    failed = {number for number in range(4) if f"shard {number} (rows " in said.error}
    assert failed
    receipts = {int(path.stem) for path in (level / "receipts").iterdir()}
    assert not failed & receipts
    shards = len(list(sound.level(2, "train.plain").glob("x/c.*")))
    assert failed | receipts == set(range(shards))
    kept = {path: path.stat().st_ino for path in level.glob("x/c.*")}
    flip(poisoned, 100)
    again = place.do("materialize", "--layer", 2, "--scheduler", dask.address)
    assert again.rc == 0, again.err
    assert {path: path.stat().st_ino for path in kept} == kept
    assert place.files() == sound.files()


def key(place: Place, depth: int, split: str, view: str = "clean") -> LevelKey:
    return session_of(place).key(depth, split, view)


@pytest.fixture
def begun(place: Place) -> tuple[Place, partial[Any], int]:
    without(place, 1)
    return place, *task_for(place)


Begun = tuple[Place, partial[Any], int]


def refused(dask: Cluster, task: partial[Any]) -> str:
    """What all workers say of a task; there must be nothing that they did."""
    with crew_of(dask.address) as crew:
        answers = [answer for _, answer in Dispatch(crew, task).answers(range(2))]
    assert all(isinstance(answer, Failed) and answer.for_all for answer in answers)
    address, key = task.args[:2]
    assert not list(key.directory(Path(address.store.place)).glob("x/c.*"))
    return one_line(answers[0].error)


def test_weights_that_changed_under_a_worker_are_refused(dask: Cluster, begun: Begun) -> None:
    place, task, _ = begun
    path = place.run / "layer_1/weights.safetensors"
    flip(path)
    assert f"{path} has digest" in refused(dask, task)


def test_a_layer_that_was_solved_again_is_refused(dask: Cluster, begun: Begun) -> None:
    place, task, _ = begun
    shutil.rmtree(place.run / "layer_1")
    assert place.do("train", "--layer", 1).rc == 0  # the same weights, so still the same level
    with crew_of(dask.address) as crew:
        answers = [answer for _, answer in Dispatch(crew, task).answers([0])]
    assert isinstance(answers[0], Done)
    other = told(task, weights=("0" * 64,))
    assert "other weights" in refused_item(dask, other)
    root = told(task, base=task.args[4] | {"content_root": "0" * 64})
    assert "other values" in refused_item(dask, root)


def refused_item(dask: Cluster, task: partial[Any]) -> str:
    with crew_of(dask.address) as crew:
        ((_, answer),) = Dispatch(crew, task).answers([1])
    assert answer.for_all
    return one_line(answer.error)


@pytest.mark.slow
def test_workers_that_do_not_see_the_store_say_so(dask: Cluster, begun: Begun) -> None:
    _, task, _ = begun
    address = task.args[0]
    store = StoreAddress(f"{address.store.place}/elsewhere")
    assert "the store must lie where all can see it" in refused_item(
        dask, told(task, address=replace(address, store=store))
    )
    elsewhere = replace(address, run=address.run / "elsewhere")
    assert "there is no run in" in refused_item(dask, told(task, address=elsewhere))


# ---- what is on the wire, and how much is under way ---------------------------------------------


def test_receipts_come_back_and_no_arrays(dask: Cluster, begun: Begun) -> None:
    _, task, shards = begun
    assert len(pickle.dumps(task)) < TASK_BYTES
    with crew_of(dask.address) as crew:
        answers = dict(Dispatch(crew, task).answers(range(shards)))
        assert not crew.client.futures, "every future is let go"
    assert sorted(answers) == list(range(shards))
    for answer in answers.values():
        assert isinstance(answer, Done)
        assert answer.published.nbytes > 100 * ANSWER_BYTES
        assert len(pickle.dumps(answer)) < ANSWER_BYTES


@pytest.mark.slow
def test_files_of_a_run_that_a_worker_cannot_reach_are_refused(
    dask: Cluster, begun: Begun, tmp_path: Path
) -> None:
    """As if its file system were gone: here the system says no to the name."""
    _, task, _ = begun
    nowhere = replace(task.args[0], run=tmp_path / ("x" * 300))
    said = refused(dask, told(task, address=nowhere))
    assert said.startswith(f"the file system refuses {nowhere.run}/run.json: file name too long")


def test_four_machines_that_cannot_reach_the_files_are_no_accident(
    dask: Cluster, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of nine, which this machine has not."""
    _, task, _ = begun
    with crew_of(dask.address) as crew:
        monkeypatch.setattr(crew, "count", lambda: 9)
        spread = Dispatch(crew, task)
        refusals = [Failed(name, StoreRefused("gone"), for_all=True) for name in "aabcd"]
        assert [spread._others_may(one) for one in refusals] == [True] * 4 + [False]
        full = Failed("e", DiskFull("x_1", 2, 1), for_all=True)
        assert not spread._others_may(full), "a disk that is full is everybody's"


def test_a_window_of_items_is_under_way(dask: Cluster, begun: Begun) -> None:
    place, _, _ = begun
    level = session_of(place).store.open(key(place, 0, "train"))
    commit = sha256((level.directory / COMMIT).read_bytes())
    task = partial(hashing, StoreAddress(str(place.store)), level.directory, commit)
    with crew_of(dask.address) as crew:
        spread = Dispatch(crew, task)
        asked = 0

        def items() -> Iterator[int]:
            nonlocal asked
            for _ in range(100):
                asked += 1
                yield 0

        for done, (_, answer) in enumerate(spread.answers(items()), 1):
            assert answer is None, "nothing is wrong"
            assert asked - done <= 2 * WINDOW
    assert spread.most == 2 * WINDOW
    assert asked == 100


# ---- no cluster to work with --------------------------------------------------------------------


def test_a_scheduler_that_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "CONNECT_S", 1.0)
    without(place, 2)
    for address in ("tcp://127.0.0.1:1", "127.0.0.1:1", "nonsense://x:1"):
        said = place.do("materialize", "--layer", 2, "--scheduler", address)
        assert said.rc == 12, said.err
        assert f"no scheduler answers at {address}" in said.error
        assert "dask scheduler" in said.error


def test_other_versions_are_refused(
    dask: Cluster, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CODE", "another")
    without(place, 2)
    said = place.do("materialize", "--layer", 2, "--scheduler", dask.address)
    assert said.rc == 12
    assert "runs other versions: code " in said.error
    assert "Start it again" in said.error


OPTIONS = [
    (("--workers", 2, "--scheduler", "tcp://127.0.0.1:1"), "give one"),
    (("--workers", 2, "--loader", "ffcv"), "--loader ffcv reads in one process"),
    (("--workers", 0), "--workers"),
]


@pytest.mark.parametrize(("words", "text"), OPTIONS)
def test_flags_that_exclude_each_other(sound: Place, words: tuple[object, ...], text: str) -> None:
    said = sound.do("materialize", "--layer", 2, *words)
    assert said.rc == 2
    assert text in said.err


def test_a_cluster_without_workers(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "WORKERS_S", 1.0)
    without(place, 2)
    with cluster(tmp_path / "empty", workers=0) as empty:
        said = place.do("materialize", "--layer", 2, "--scheduler", empty.address)
        assert said.rc == 12
        assert "no workers" in said.error
        assert f"dask worker {empty.address}" in said.error
        with pytest.raises(ClusterError), crew_of(empty.address) as crew:
            crew.begin()
