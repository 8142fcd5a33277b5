"""du, gc and evict: what a store holds, what of it nobody uses, and what can be made again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from command import Result, strata
from runs import Place, here, made
from spoil import TEXT, flip
from together import holding

from strata.store.feature_store import used_bytes
from strata.store.files.files import Files
from strata.store.files.publish import TEMPORARY, replace, sealed, unseal
from strata.store.level.references import Reference, reference


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two runs in one store: they share x_0, and each has its x_1 and x_2."""
    place = made(tmp_path_factory.mktemp("sound") / "place", 2, TEXT)
    assert other(place).do("materialize", "--layer", 2).rc == 0
    return place


@pytest.fixture
def place(sound: Place, tmp_path: Path) -> Place:
    """Copied; the notes of the runs name the copies, as the runs would have written them."""
    copy = sound.copy(tmp_path / "place")
    for note in list((copy.store / "runs").iterdir()):
        body = unseal(note)
        note.unlink()
        refer(copy, copy.root / Path(body["run"]).name, body["levels"])
    return copy


ROW_BYTES = {"x_0": 8 * 8, "x_1": 8 * 12 * 12 * 2, "x_2": 16 * 6 * 6 * 2}


def other(place: Place) -> Place:
    return Place(place.root, "other", seed=1)


def refer(place: Place, run: Path, levels: list[str], host: str | None = None) -> Path:
    """A run's note in the store."""
    note = reference(run, [])
    note = Reference(str(run.resolve()), host or note.host, tuple(levels))
    body = {"run": note.run, "host": note.host, "levels": list(levels)}
    replace(place.store / "runs", note.name, sealed(body))
    return place.store / "runs" / note.name


def depths(place: Place) -> set[str]:
    return {path.name for path in place.store.glob("x_*")}


def own(place: Place, *js: int) -> set[str]:
    """The directories of a run's x_j."""
    nodes = place.overview().existing().nodes()
    return {f"x_{j}-{nodes[j].fingerprint[:12]}" for j in js}


def gc(place: Place, *arguments: object) -> Any:
    return here("gc", "--store", place.store, "--json", *arguments).json


def listed(found: Any) -> set[str]:
    return {Path(entry["path"]).name for entry in found["garbage"]}


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def lock_of(place: Place, depth: str) -> Path:
    return place.store / "locks" / f"{depth}.lock"


# ---- gc -----------------------------------------------------------------------------------------


def test_nothing_is_garbage_while_runs_use_it(place: Place) -> None:
    assert gc(place) == {"garbage": [], "left": []}
    before = place.files()
    said = here("gc", "--store", place.store, "--delete")
    assert (said.out, place.files()) == ("nothing to collect: runs refer to every level\n", before)


def test_levels_of_a_run_that_is_gone(place: Place) -> None:
    gone, kept = own(other(place), 1, 2), own(place, 0, 1, 2)
    shutil.rmtree(other(place).run)
    found = gc(place)
    assert listed(found) == gone
    for entry in found["garbage"]:
        assert entry["bytes"] == bytes_of(Path(entry["path"]))
        assert entry["why"] == f"used by {other(place).run}, which is gone"
    assert depths(place) == gone | kept, "only listed"
    said = here("gc", "--store", place.store, "--delete")
    assert said.rc == 0
    assert "removed " in said.out
    assert depths(place) == kept
    assert len(list((place.store / "runs").iterdir())) == 1
    assert place.do("verify", "--deep").rc == 0
    assert gc(place)["garbage"] == []


def test_a_level_that_a_live_run_shares_stays(place: Place) -> None:
    """x_0 is of both; and a third run found all of the second's levels complete."""
    third, only_first = Place(place.root, "third", seed=1), own(place, 1, 2)
    before = place.files()
    assert third.do("materialize", "--layer", 2).rc == 0
    assert place.files() == before
    shutil.rmtree(other(place).run)
    shutil.rmtree(place.run)
    assert listed(gc(place, "--delete")) == only_first
    assert depths(place) == own(third, 0, 1, 2)


def test_a_level_that_nobody_ever_noted(place: Place) -> None:
    for note in (place.store / "runs").iterdir():
        note.unlink()
    found = gc(place)
    assert listed(found) == depths(place)
    assert {entry["why"] for entry in found["garbage"]} == {"no run refers to it"}


def test_a_run_that_only_looks_whether_all_is_there_is_noted(place: Place) -> None:
    shutil.rmtree(place.store / "runs")
    assert place.do("materialize", "--layer", 2, "--json").json["done"] == []
    assert listed(gc(place)) == own(other(place), 1, 2)


def test_a_run_of_another_host_is_taken_to_be_alive(place: Place) -> None:
    gone = own(other(place), 1, 2)
    shutil.rmtree(other(place).run)
    refer(place, Path("/elsewhere/run"), sorted(gone), host="another host")
    assert gc(place, "--delete") == {"garbage": [], "left": []}
    assert gone <= depths(place)
    assert len(list((place.store / "runs").iterdir())) == 2, "only the note of the run that is gone"


def test_a_note_that_cannot_be_read_stops_what_removes(place: Place) -> None:
    shutil.rmtree(other(place).run)
    note = refer(place, place.run, sorted(own(place, 0, 1, 2)))
    flip(note)
    before = place.files()
    commands = ("gc", "--delete", "--store", place.store), ("evict", *place.options, "--layer", 1)
    for arguments in commands:
        said = here(*arguments)
        assert said.rc == 10
        assert str(note) in said.error
        assert "`materialize` of that run writes it again" in said.error
    assert place.files() == before
    assert place.do("materialize", "--layer", 2).rc == 0
    assert listed(gc(place)) == depths(place) - own(place, 0, 1, 2), "the note was written again"


def test_what_repairs_set_aside(place: Place) -> None:
    shard = place.store / next(iter(own(place, 1))) / "test" / "x/c.0.0.0.0"
    nbytes = shard.stat().st_size
    flip(shard)
    assert place.do("verify", "--deep", "--repair").rc == 0
    (entry,) = gc(place)["garbage"]
    assert (entry["why"], entry["bytes"]) == ("set aside by a repair", nbytes)
    assert Path(entry["path"]).parent.name == "quarantine"
    found = here("du", "--store", place.store, "--json").json
    assert found["quarantine_bytes"] == nbytes
    assert gc(place, "--delete")["left"] == []
    assert not list((place.store / "quarantine").iterdir())


def test_a_level_that_somebody_writes_is_left(place: Place) -> None:
    one, two = sorted(own(other(place), 1, 2))
    shutil.rmtree(other(place).run)
    with holding(lock_of(place, one)):
        said = here("gc", "--store", place.store, "--delete")
        assert said.rc == 0
        assert f"left, because it is in use: {place.store / one}" in said.out
        assert one in depths(place)
        assert two not in depths(place)
        said = here("gc", "--store", place.store, "--delete")
        assert f"left, because it is in use: {place.store / one}" in said.out
        assert "gc --delete" not in said.out, "that is what was done"
        assert gc(place)["garbage"], "it can be found again"
    assert gc(place, "--delete")["left"] == []
    assert one not in depths(place)


# ---- evict --------------------------------------------------------------------------------------


def evict(place: Place, j: int, *arguments: object) -> Result:
    return place.do("evict", "--layer", j, *arguments)


def test_what_was_evicted_is_made_again_byte_for_byte(place: Place) -> None:
    before, nbytes = place.files(), bytes_of(next(place.store.glob(next(iter(own(place, 1))))))
    assert evict(place, 1, "--json").json == {"freed": nbytes}
    assert not own(place, 1) & depths(place)
    again = evict(place, 1)
    assert (again.rc, "nothing to evict" in again.error) == (8, True)
    assert place.do("materialize", "--layer", 1).rc == 0
    assert place.files() == before
    said = evict(place, 2)
    assert "`materialize --layer 2` makes it again" in said.out
    assert place.do("materialize", "--layer", 2).rc == 0
    assert place.files() == before


@pytest.mark.parametrize("name", ["weights.safetensors", "auxiliary.safetensors", "layer.json"])
@pytest.mark.parametrize("spoil", [flip, Path.unlink])
def test_nothing_is_evicted_that_damaged_weights_would_make(place: Place, name, spoil) -> None:
    """Those of a layer below, too."""
    before = place.files()
    spoil(place.run / "layer_1" / name)
    said = evict(place, 2)
    unsolved = (name, spoil) == ("layer.json", Path.unlink)
    assert said.rc == (8 if unsolved else 10)
    assert ("layer 2 is not solved" if unsolved else f"layer_1/{name}") in said.error
    assert place.files() == before


def test_nothing_is_evicted_without_the_images(place: Place) -> None:
    (place.store / next(iter(own(place, 0))) / "train/COMMIT.json").unlink()
    before = place.files()
    said = evict(place, 1)
    assert said.rc == 8
    assert "x_0 is not complete" in said.error
    assert place.files() == before


def test_nothing_is_evicted_that_another_run_uses(place: Place) -> None:
    third = Place(place.root, "third")
    assert third.do("train", "--layer", 1).rc == 0
    said = evict(place, 1)
    assert said.rc == 8
    assert str(third.run) in said.error
    assert "--force" in said.error
    assert own(place, 1) <= depths(place)
    assert evict(place, 1, "--force").rc == 0
    assert not own(place, 1) & depths(place)
    assert place.do("materialize", "--layer", 1).rc == 0
    shutil.rmtree(third.run)
    assert evict(place, 1).rc == 0, "a run that is gone uses nothing"


def test_nothing_is_evicted_that_somebody_writes(place: Place) -> None:
    (one,) = own(place, 1)
    with holding(lock_of(place, one)) as process:
        said = evict(place, 1)
    assert said.rc == 8
    assert f"process {process.pid} " in said.error
    assert one in depths(place)


def test_evict_of_what_is_not_there(place: Place) -> None:
    assert evict(place, 9).rc == 2
    assert evict(place, 0).rc == 2
    nobody = Place(place.root, "nobody")
    assert evict(nobody, 1).rc == 8
    assert place.do("train", "--layer", 1).rc == 0
    (place.run / "layer_2/layer.json").unlink()
    assert "layer 2 is not solved" in evict(place, 2).error


# ---- du -----------------------------------------------------------------------------------------


def test_du_counts_what_lies_on_disk(place: Place) -> None:
    found = here("du", "--store", place.store, "--json").json
    assert found["total_bytes"] == bytes_of(place.store)
    assert found["quarantine_bytes"] == 0
    assert 0 < found["free_bytes"] < shutil.disk_usage(place.store).total
    directories = sorted(path for path in place.store.glob("x_*/*") if path.is_dir())
    assert [place.store / e["depth"] / e["level"] for e in found["levels"]] == directories
    both = (other(place), place)
    for entry, directory in zip(found["levels"], directories, strict=True):
        assert entry["bytes"] == bytes_of(directory)
        assert entry["rows"] == (1437 if "train" in entry["level"] else 360)
        assert entry["state"] == "complete"
        users = [str(p.run) for p in both if entry["depth"] in own(p, 0, 1, 2)]
        assert sorted(entry["runs"]) == users
        assert entry["value_bytes"] == entry["rows"] * ROW_BYTES[entry["depth"][:3]]


def test_du_shows_what_is_partial_and_what_is_damaged(place: Place) -> None:
    (one,), (two,) = own(place, 1), own(place, 2)
    (place.store / one / "test/COMMIT.json").unlink()
    flip(place.store / two / "test/COMMIT.json")
    found = here("du", "--store", place.store, "--json").json["levels"]
    states = {(e["depth"], e["level"]): e["state"] for e in found if e["state"] != "complete"}
    assert states == {(one, "test"): "partial", (two, "test"): "damaged"}
    cells = map(str.strip, here("du", "--store", place.store).out.split("│"))
    assert {"partial", "damaged"} <= set(cells)


class Vanishing(Files):
    """A temporary file goes after it was listed, as when a writer links it to its name."""

    def size(self, path: Path) -> int:
        if path.name.startswith(TEMPORARY):
            path.unlink()
        return super().size(path)


def test_bytes_are_counted_while_somebody_writes(place: Place) -> None:
    directory = place.level(0, "train")
    nbytes = bytes_of(directory)
    (directory / f"{TEMPORARY}1").write_bytes(bytes(100))
    assert used_bytes(directory, Vanishing()) == nbytes


@pytest.mark.parametrize("command", ["du", "gc"])
def test_a_store_that_does_not_exist(tmp_path: Path, command: str) -> None:
    said = here(command, "--store", tmp_path / "none")
    assert said.rc == 8
    assert f"there is no store in {tmp_path / 'none'}. Name one with --store" in said.error
    assert not (tmp_path / "none").exists()


def test_they_are_commands_of_a_process_too(place: Place) -> None:
    gone = own(other(place), 1, 2)
    shutil.rmtree(other(place).run)
    assert listed(strata(place.root, "gc", "--store", "store", "--json").json) == gone
    assert strata(place.root, "evict", *place.options, "--layer", 1).rc == 0
    assert strata(place.root, "du", "--store", "store").rc == 0
