"""verify --deep looks at every file of a store, also at those that are of no level."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Place
from spoil import early_flip, exchange, flip, named

from strata.store.files.files import DISK
from strata.store.level.level import COMMIT
from strata.store.write.contents import STRANGE, TABLE, beside_levels, kind


def only(place: Place, folder: str) -> Path:
    (path,) = (place.store / folder).glob("*.json")
    return path


@pytest.mark.parametrize("folder", ["runs", "sources"])
@pytest.mark.parametrize("fault", [flip, early_flip])
def test_a_flipped_bit_in_a_record_is_found_and_mended(
    place: Place, folder: str, fault: Callable[[Path], None]
) -> None:
    if folder == "runs":  # that of the run that this is a copy of
        only(place, folder).unlink()
        assert place.do("materialize", "--layer", 2).rc == 0
    path = only(place, folder)
    was = path.read_bytes()
    fault(path)
    assert place.do("verify").rc == 0
    said = place.do("verify", "--deep", "--json")
    assert said.rc == 10
    assert named(said) == [str(path)]
    mended = place.do("verify", "--deep", "--repair")
    assert mended.rc == 0, mended.out
    if folder == "runs":
        assert path.read_bytes() == was
    else:
        assert f"removed {path}, which is written again when it is needed" in mended.out
    assert place.do("verify", "--deep").rc == 0
    assert place.do("run").rc == 0


def test_the_note_of_another_run_is_left_to_that(place: Place) -> None:
    path = place.store / "runs/0123456789ab.json"
    shutil.copy(only(place, "runs"), path)
    said = place.do("verify", "--deep", "--repair")
    assert said.rc == 10
    assert f"damaged: {path}: it is the record of another" in said.out
    assert path.exists()


def test_every_file_of_a_sound_store_is_in_the_table(sound: Place) -> None:
    assert {kind(name) for name in DISK.listed(sound.store)} == {"level", "record", "kept"}
    assert beside_levels(sound.store) == ([], ())
    assert json.loads(sound.do("verify", "--deep", "--json").out)["strange"] == []


NAMES = {
    "notes.txt": "",
    "runs/notes.json": "",
    "sources/0123456789ab.json.bak": "",
    "x_1/train/zarr.json": "",
    "LEVEL/thumbs.db": "",
    "LEVEL/x/c.0": "",
    "LEVEL/other/zarr.json": "",
    ".tmp-0123": "temporary",
    "runs/.tmp-0123": "temporary",
    "LEVEL/.tmp-0123": "temporary",
    "calibration-0123/x_0-0123456789ab/train/zarr.json": "temporary",
}


@pytest.mark.parametrize(("name", "found"), NAMES.items())
def test_what_does_not_belong_there_is_listed_and_is_no_damage(
    place: Place, name: str, found: str
) -> None:
    level = place.level(1, "train.plain").relative_to(place.store).as_posix()
    path = place.store / name.replace("LEVEL", level)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"{}")
    said = place.do("verify", "--deep", "--json")
    assert said.rc == 0, said.out
    assert json.loads(said.out)["strange"] == [{"path": str(path), "what": STRANGE[found]}]
    shown = place.do("verify", "--deep").out
    assert f"does not belong here: {path}: {STRANGE[found]}" in shown
    assert json.loads(place.do("verify", "--json").out)["strange"] == []


def test_what_repairs_set_aside_and_locks_are_no_strangers(place: Place) -> None:
    flip(place.level(1, "test") / "x/c.0.0.0.0")
    assert place.do("verify", "--deep", "--repair").rc == 0
    assert list((place.store / "quarantine").iterdir())
    assert beside_levels(place.store) == ([], ())


def test_a_level_that_is_not_finished_is_looked_at_too(place: Place) -> None:
    level = place.level(2, "train.plain")
    was = place.files()
    (level / COMMIT).unlink()
    (level / "receipts/.tmp-0123").write_bytes(b"")  # of the writer that was killed
    assert place.do("verify", "--deep").rc == 0
    early_flip(level / "x/c.0.0.0.0")
    said = place.do("verify", "--deep", "--json")
    assert said.rc == 10
    assert named(said) == [str(level / "x/c.0.0.0.0")]
    assert place.do("verify", "--deep", "--repair").rc == 0
    assert place.files() == was


def test_two_records_that_changed_places_are_both_named(place: Place) -> None:
    paths = [only(place, "runs"), only(place, "sources")]
    exchange(*paths)
    assert named(place.do("verify", "--deep", "--json")) == sorted(map(str, paths))


def test_the_patterns_are_those_of_files_that_there_are() -> None:
    """A line that nothing meets would let strangers pass."""
    names = ["x_0-0123456789ab/intent.json", "x_0-0123456789ab/train/COMMIT.json"]
    names += ["runs/0123456789ab.json", "sources/0123456789ab.json", "locks/x_1-0123456789ab.lock"]
    names += ["x_0-0123456789ab/train.jpeg90.beton", "x_0-0123456789ab/test/receipts/000000.json"]
    names += ["x_1-0123456789ab/train.v0/.tmp-0"]
    met = [kind(name) for name in names]
    assert "" not in met
    assert {found for _, found in TABLE} == set(met)
