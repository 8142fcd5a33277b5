"""Commands that remove beside others that work with the same run or level: they are told."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from command import start
from runs import Place, here, made, open_run, tiny
from together import holding

from strata.pipeline.feed import features as features_of
from strata.pipeline.progress import Reporter
from strata.pipeline.train.algorithm import make
from strata.store.errors import LevelAbsent
from strata.store.feature_store import open_level
from strata.store.files.files import DISK

TEXT = tiny(flip="false", layers=2, epochs=1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return made(tmp_path_factory.mktemp("sound") / "place", 2, TEXT)


@pytest.fixture
def place(sound: Place, tmp_path: Path) -> Place:
    return sound.copy(tmp_path / "place")


CLEAN = pytest.mark.parametrize("which", [(), ("--layer", 2), ("--sweeps",), ("--features",)])


@CLEAN
def test_clean_beside_a_process_that_works_on_the_run(
    place: Place, which: tuple[object, ...]
) -> None:
    before, weights = place.files(), place.weights()
    with holding(place.run / "LOCK") as process:
        said = place.do("clean", "--yes", *which)
        assert said.rc == 8
        who = f"process {process.pid} on {socket.gethostname()} since 20"
        assert f"the run {place.run} is being written by {who}" in said.error
        assert said.error.endswith("Wait for it and repeat the command")
        assert (place.files(), place.weights()) == (before, weights)
        assert place.do("clean", "--dry-run", *which).rc == 0, "looking is free"
        process.kill()
        process.wait()
    assert place.do("clean", "--yes", *which).rc == 0
    assert place.run.exists() == bool(which)


def test_clean_beside_a_command_that_looks_at_the_run(place: Place) -> None:
    before, weights = place.files(), place.weights()
    found = place.overview()  # as `export` has it while it works
    said = place.do("clean", "--yes")
    assert said.rc == 8
    assert f"the run {place.run} is being read by process {os.getpid()} " in said.error
    assert (place.files(), place.weights()) == (before, weights)
    assert place.do("clean", "--features").rc == 0, "that takes nothing of the run"
    del found
    assert place.do("clean", "--yes").rc == 0
    assert not place.run.exists()


def test_a_level_that_a_thread_reads_stays(place: Place) -> None:
    open_, done = threading.Event(), threading.Event()

    def reader() -> None:
        level = open_level(place.level(1, "train.plain"))
        open_.set()
        done.wait(60)
        level.read(0, len(level))

    thread = threading.Thread(target=reader)
    thread.start()
    open_.wait(60)
    before = place.files()
    for command in (("evict", "--layer", 1, "--force"), ("clean", "--layer", 1, "--features")):
        said = place.do(*command)  # pyright: ignore[reportArgumentType]
        assert said.rc == 8
        assert f"is being read by process {os.getpid()} on {socket.gethostname()} " in said.error
    for note in (place.store / "runs").iterdir():
        note.unlink()
    left = here("gc", "--store", place.store, "--delete", "--json").json["left"]
    assert [Path(path).name[:4] for path in left] == ["x_1-"]
    kept = {name: data for name, data in before.items() if name.startswith("x_1-")}
    assert place.files() == kept
    done.set()
    thread.join()
    assert here("gc", "--store", place.store, "--delete", "--json").json["left"] == []
    assert place.files() == {}


def test_a_run_that_needs_space_leaves_what_another_reads(tmp_path: Path) -> None:
    session = open_run(tmp_path, tiny(flip="false", layers=3, epochs=1))
    make(session, write=1)
    (x_1,) = (tmp_path / "store").glob("x_1-*")
    held = DISK.share(x_1 / "train.plain" / "COMMIT.json")
    said = list[str]()
    make(dataclasses.replace(session, report=Said(said)), write=2, evict=True)
    assert x_1.exists()
    assert any("x_1 stays" in line and "is being read by process" in line for line in said)
    del held


class Said(Reporter):
    """A reporter that keeps what is said."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_level_that_goes_before_it_is_opened_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_run(tmp_path, TEXT)
    make(session, write=1)
    nearest = features_of.nearest
    asked = list[int]()

    def evicted(*arguments: object, **how: object) -> int:
        found = nearest(*arguments, **how)  # pyright: ignore[reportArgumentType]
        if not asked:
            session.store.remove(1, session.run.nodes()[1].fingerprint)
        asked.append(found)
        return found

    monkeypatch.setattr(features_of, "nearest", evicted)
    assert features_of.features(session, 1, "train").base == 0
    assert asked == [1, 0]
    with pytest.raises(LevelAbsent):
        features_of.features(session, 1, "train", base=1)


def test_who_waits_says_so_once_and_ends_with_ctrl_c(place: Place) -> None:
    with holding(place.run / "LOCK") as holder:
        words = ("sweep", *place.options, "--layer", 1, "--vary", "schedule.lr=0.05")
        with start(place.root, *words) as process:
            try:
                assert process.stderr
                line = next(line for line in process.stderr if "waiting until it is done" in line)
                assert f"process {holder.pid} " in line
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=60)
            finally:
                process.kill()
    assert process.returncode == 130
    assert "waiting" not in err
    assert err.startswith("Error: stopped")
    assert not (place.run / "sweep_1").exists()


def test_a_refused_beginning_leaves_no_directory(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "tiny.toml").write_text(TEXT)
    assert place.do("train", "--layer", 1, "--gpu-memory", "1KB").rc == 5
    assert not place.run.exists()
