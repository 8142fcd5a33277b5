"""One store for several runs and processes, at another path, or on a disk that is read-only."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import start
from runs import Place
from spoil import TEXT, flip, named
from together import holding, together

from strata.store.level.references import references

SHARD_ROWS = {"x_1 train.plain": 455, "x_0 train": 1437}
"""Rows in one shard, of the levels that are checked for being written twice."""


def times(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of everything below a directory."""
    found = ((path, path.stat()) for path in directory.rglob("*"))
    return {str(path): (stat.st_ino, stat.st_mtime_ns) for path, stat in found}


def without_x(place: Place, j: int) -> None:
    (directory,) = place.store.glob(f"x_{j}-*")
    shutil.rmtree(directory)


# ---- two runs, one store ------------------------------------------------------------------------


def test_a_second_run_writes_no_level(place: Place, sound: Place) -> None:
    second, levels = Place(place.root, "second"), {}
    for directory in place.store.glob("x_*"):
        levels |= times(directory)
    said = second.do("materialize", "--layer", 2)
    assert said.rc == 0
    assert "wrote " not in said.err
    assert {path: now for d in place.store.glob("x_*") for path, now in times(d).items()} == levels
    assert place.files() == sound.files()
    assert second.weights() == place.weights()
    again = second.do("materialize", "--layer", 2)
    assert "x_2: complete already" in again.err
    notes = {note.run: sorted(note.levels) for note in references(place.store)}
    depths = sorted(path.name for path in place.store.glob("x_*"))
    assert notes[str(second.run)] == depths


def test_a_store_at_another_path_is_the_same_store(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.store, tmp_path / "far/away/levels")
    shutil.rmtree(place.store)
    (tmp_path / "far/away/levels").rename(place.store.with_name("levels"))
    moved = Moved(place.root)
    before, weights = moved.files(), moved.weights()
    assert moved.do("verify", "--deep").rc == 0
    said = moved.do("materialize", "--layer", 2)
    assert said.out == "nothing to do: everything is there\n"
    shutil.rmtree(moved.run / "layer_2")
    assert moved.do("train", "--layer", 2).rc == 0
    assert (moved.files(), moved.weights()) == (before, weights)


class Moved(Place):
    @property
    def store(self) -> Path:
        return self.root / "levels"


# ---- a store that cannot be written -------------------------------------------------------------


@pytest.fixture
def read_only(place: Place) -> Iterator[Place]:
    """x_0 and x_1 on a read-only mount; layer 2 is not solved."""
    without_x(place, 2)
    shutil.rmtree(place.run / "layer_2")
    mount = ["mount", "--bind", str(place.store), str(place.store)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no bind mounts here: {done.stderr.strip()}")
    try:
        options = ["mount", "-o", "remount,ro,bind", str(place.store)]
        done = subprocess.run(options, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no read-only mounts here: {done.stderr.strip()}")
        yield place
    finally:
        # Lazily: a command that failed in this process may still have a shard mapped.
        subprocess.run(["umount", "--lazy", str(place.store)], check=True)


def test_a_read_only_store_serves_all_that_reads(read_only: Place, sound: Place) -> None:
    before = times(read_only.store)
    assert read_only.do("status").rc == 0
    assert read_only.do("verify", "--deep").rc == 0
    said = read_only.do("train", "--layer", 2)
    assert said.rc == 0, said.err
    assert read_only.weights() == sound.weights()
    assert read_only.do("explain", "--layer", 2).rc == 0
    assert times(read_only.store) == before


def test_a_read_only_store_refuses_what_writes_in_one_line(read_only: Place) -> None:
    before = times(read_only.store)
    said = read_only.do("materialize", "--layer", 2)
    assert said.rc == 11
    for words in (str(read_only.store), "read-only", "another --store"):
        assert words in said.error
    assert read_only.do("evict", "--layer", 1, "--force").rc == 11
    assert times(read_only.store) == before


def test_damage_on_a_read_only_store_is_named_and_stays(read_only: Place) -> None:
    before = times(read_only.store)
    subprocess.run(["mount", "-o", "remount,rw,bind", str(read_only.store)], check=True)
    path = read_only.level(1, "test") / "x/c.0.0.0.0"
    flip(path)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(read_only.store)], check=True)
    assert named(read_only.do("verify", "--deep", "--json")) == [str(path)]
    said = read_only.do("verify", "--deep", "--repair")
    assert said.rc == 11
    assert "read-only" in said.error
    assert times(read_only.store).keys() == before.keys()


# ---- waiting for another process ----------------------------------------------------------------


@pytest.mark.parametrize("whose", ["level", "run"])
def test_a_lock_is_waited_for_until_its_holder_dies(place: Place, sound: Place, whose: str) -> None:
    (x_1,) = place.store.glob("x_1-*")
    lock = place.store / f"locks/{x_1.name}.lock" if whose == "level" else place.run / "LOCK"
    shutil.rmtree(x_1)
    with holding(lock) as holder:
        words = ("materialize", *place.options, "--layer", 1)
        with start(place.root, *words) as process:
            try:
                assert process.stderr
                line = next(line for line in process.stderr if "waiting until it is done" in line)
                assert f"process {holder.pid} " in line
                assert ("x_1 " if whose == "level" else str(place.run)) in line
                assert not x_1.joinpath("train.plain/COMMIT.json").exists()
                assert process.poll() is None
                holder.kill()
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
    assert process.returncode == 0, err
    assert "done: write x_1" in out
    assert place.files() == sound.files()


# ---- at the same moment -------------------------------------------------------------------------


def rows_written(err: str) -> dict[str, int]:
    """Rows that a process says it wrote, by level."""
    found = re.findall(r"wrote (x_\d \S+): ([\d,]+) of", err)
    return {level: int(rows.replace(",", "")) for level, rows in found}


def by_one_process(root: Path) -> Place:
    """The same by one process, with as many threads as those at the same moment have."""
    root.mkdir()
    (root / "tiny.toml").write_text(TEXT)
    place = Place(root)
    assert together(("materialize", *place.options, "--layer", 1))[0].rc == 0
    return place


@pytest.mark.parametrize("processes", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shared", [pytest.param("run", marks=pytest.mark.slow), "store"])
def test_processes_at_the_same_moment(tmp_path: Path, shared: str, processes: int) -> None:
    """Every row is computed once, but for a shard that two finished at the same time."""
    (tmp_path / "tiny.toml").write_text(TEXT)
    names = ["run" if shared == "run" else f"run{i}" for i in range(processes)]
    places = [Place(tmp_path, name) for name in names]
    said = together(*(("materialize", *place.options, "--layer", 1) for place in places))
    assert [result.rc for result in said] == [0] * processes, [result.err for result in said]
    alone = by_one_process(tmp_path / "alone")
    assert places[0].files() == alone.files()
    assert not list(tmp_path.rglob(".tmp-*"))
    for level, shard_rows in SHARD_ROWS.items():
        rows = [rows_written(result.err).get(level, 0) for result in said]
        assert 1437 <= sum(rows) <= 1437 + shard_rows * (processes - 1)
    notes = {note.run for note in references(places[0].store)}
    assert notes == {str(place.run) for place in places}
    layers = {place.weights()["layer_1/weights.safetensors"] for place in places}
    assert layers == {alone.weights()["layer_1/weights.safetensors"]}
    assert places[-1].do("verify", "--deep").rc == 0
