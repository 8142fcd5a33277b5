"""What is wrong with a neighbour is told in one warning, and is the neighbour's alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Result
from runs import Place, here, tiny

from strata.store.files.publish import sealed, unseal

TEXT = tiny(flip="false", layers=1, downsample="[]", epochs=1)
Spoil = Callable[[Path], None]


def text(words: str) -> Spoil:
    return lambda path: nothing(path.write_text(words))


def nothing(_: object) -> None:
    """For a lambda."""


def not_utf8(path: Path) -> None:
    path.write_bytes("naïve".encode("utf-16"))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"x")


def dangling(path: Path) -> None:
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    path.symlink_to("nowhere")


def looped(path: Path) -> None:
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    path.symlink_to(path.name)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def of_another_version(path: Path) -> None:
    path.write_bytes(sealed({f"{key}2": value for key, value in unseal(path).items()}))


def of_another_shape(path: Path) -> None:
    path.write_bytes(sealed([unseal(path)]))


def of_other_types(path: Path) -> None:
    path.write_bytes(sealed({key: [value] for key, value in unseal(path).items()}))


def of_format_9(path: Path) -> None:
    path.write_bytes(sealed({**unseal(path), "format": 9}))


RECORD = (cut, directory, dangling, looped, of_another_version, of_another_shape, of_other_types)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run, ``runs/own``, and another seed beside it; each has its x_1 and a probe of it."""
    root = tmp_path_factory.mktemp("sound") / "place"
    (root / "runs").mkdir(parents=True)
    (root / "tiny.toml").write_text(TEXT)
    for seed, name in enumerate(("own", "other")):
        place = Place(root, f"runs/{name}", seed)
        for command, *more in (("materialize", "--layer", "1"), ("probe",), ("run",)):
            assert place.do(command, *more).rc == 0
    return Place(root, "runs/own")


@pytest.fixture
def place(sound: Place, tmp_path: Path) -> Place:
    return sound.copy(tmp_path / "place")


def told(said: Result) -> str:
    """The one warning of a command that has done its work."""
    assert said.rc == 0, said.err
    (warning,) = [line for line in said.err.splitlines() if line.startswith("Warning: ")]
    assert "Traceback" not in said.err
    return warning


# ---- runs ---------------------------------------------------------------------------------------

OF_RUNS: list[tuple[str, Spoil]] = [
    *(("run.json", spoil) for spoil in RECORD),
    *(("recipe.toml", spoil) for spoil in (text(""), text("no = TOML ="), not_utf8, directory)),
    *(("recipe.toml", spoil) for spoil in (Path.unlink, dangling, looped)),
    ("layer_1", file),
    *(("", spoil) for spoil in (file, dangling, looped)),
]


@pytest.mark.parametrize(("name", "spoil"), OF_RUNS)
def test_a_run_that_cannot_be_read_is_left_out_of_the_report(
    place: Place, name: str, spoil: Spoil
) -> None:
    spoil(place.root / "runs/other" / name)
    assert "runs/other" in told(place.do("report"))
    report = json.loads((place.run / "report.json").read_text())
    assert {point["runs"] for one in report["probes"] for point in one["points"]} == {1}


def test_so_it_is_of_the_report_that_ends_a_run(place: Place) -> None:
    (place.root / "runs/other/recipe.toml").write_text("")
    third = Place(place.root, "runs/third", seed=2)
    assert "runs/other" in told(third.do("run"))
    assert (third.run / "report.html").exists()
    said = place.do("report", "--json")
    assert len(said.json["left_out"]) == 1


def test_a_sound_neighbour_and_what_is_none_are_no_warning(place: Place) -> None:
    (place.root / "runs/notes.txt").write_text("lr 0.1 was better")
    (place.root / "runs/.DS_Store").write_bytes(b"\0")
    (place.root / "runs/@eaDir").mkdir()
    (place.root / "runs/figures").mkdir()
    said = place.do("report", "--json")
    assert (said.json["left_out"], said.err) == ([], "")
    assert {point["runs"] for one in said.json["probes"] for point in one["points"]} == {2}


@pytest.mark.parametrize("name", [".DS_Store", "@eaDir/x", "@eaDir/linear/x"])
@pytest.mark.parametrize("where", ["baseline", "sweep_final", "probe_1"])
def test_what_others_leave_in_a_run_is_none_of_ours(place: Place, where: str, name: str) -> None:
    before = place.do("status", "--json").json
    path = place.run / where / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0")
    assert place.do("status", "--json").json == before
    assert place.do("report").err == ""


# ---- levels and notes ---------------------------------------------------------------------------


def depth(place: Place, j: int) -> Path:
    """The directory of the neighbour's x_j."""
    own = {path.parent for path in place.store.glob("x_*/*")}
    nodes = place.overview().existing().nodes()
    (found,) = (
        p for p in own if p.name[:4] == f"x_{j}-" and nodes[j].fingerprint[:12] not in p.name
    )
    return found


@pytest.mark.parametrize("spoil", [file, dangling, looped])
def test_levels_that_cannot_be_read_are_left_out_of_a_listing(place: Place, spoil: Spoil) -> None:
    directory = depth(place, 1)
    spoil(directory)
    said = here("du", "--store", place.store, "--json")
    assert directory.name in told(said)
    assert [directory.name in one for one in said.json["left_out"]] == [True]
    assert len(said.json["levels"]) == 4
    said = here("gc", "--store", place.store, "--json")
    assert said.json["garbage"] == []
    assert place.do("status").err == place.do("verify").err == ""


@pytest.mark.parametrize("spoil", [directory, of_other_types, of_format_9])
def test_a_commit_that_is_none_is_told_in_the_listing(place: Place, spoil: Spoil) -> None:
    name = depth(place, 1).name
    spoil(place.store / name / "test/COMMIT.json")
    said = here("du", "--store", place.store, "--json")
    assert said.err == ""
    states = [one["state"] for one in said.json["levels"] if one["depth"] == name]
    assert sorted(states) == ["complete", "stale" if spoil is of_format_9 else "damaged"]
    assert place.do("verify").rc == 10
    assert place.do("report").err == ""


@pytest.mark.parametrize("name", ["x_1-abc", "x_old-0123456789ab", "x_1-0123456789ab.bak"])
def test_what_only_looks_like_levels_is_named_and_never_removed(place: Place, name: str) -> None:
    (place.store / name / "test").mkdir(parents=True)
    (place.store / name / "test/photo").write_bytes(b"1")
    for words in (("du",), ("gc",), ("gc", "--delete")):
        assert name in told(here(*words, "--store", place.store))
    assert (place.store / name / "test/photo").exists()


def test_explain_goes_on_to_the_next_lineage(place: Place) -> None:
    directory = depth(place, 1)
    (directory / "intent.json").unlink()
    (place.run / "layer_1/features.json").unlink()
    shutil.rmtree(next(path for path in place.store.glob("x_1-*") if path != directory))
    assert f"{directory.name}/intent.json" in told(place.do("explain", "--layer", 1))


@pytest.mark.parametrize("spoil", RECORD)
def test_a_note_that_cannot_be_read_is_left_out_where_nothing_is_removed(
    place: Place, spoil: Spoil
) -> None:
    notes = sorted((place.store / "runs").iterdir())
    spoil(notes[0])
    if spoil in (of_other_types,):
        return
    for words in (("du",), ("gc",)):
        assert notes[0].name in told(here(*words, "--store", place.store))
    before = place.files()
    said = here("gc", "--delete", "--store", place.store)
    assert said.rc in (10, 11)
    assert notes[0].name in said.error
    assert place.files() == before


def test_a_run_that_cannot_be_looked_at_is_not_gone(place: Place) -> None:
    copy, other = Place(place.root, "runs/own"), depth(place, 1)
    assert copy.do("materialize", "--layer", 1).rc == 0
    (copy.run / "run.json").rename(copy.run / "elsewhere.json")
    (copy.run / "run.json").symlink_to("/not/mounted/now/run.json")
    (x_1,) = {path for path in copy.store.glob("x_1-*") if path != other}
    found = here("gc", "--store", place.store, "--json").json["garbage"]
    assert str(x_1) not in {one["path"] for one in found}
