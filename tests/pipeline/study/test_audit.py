"""The command `audit`: what is right is found equal to the bit, and what is not is found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import PETS, Result, pets, recipe
from networks import beside, named
from PIL import Image
from root import ROOT
from runs import Place, here, inside, made, tiny

from strata.pipeline.run import record, weights
from strata.pipeline.run.session import Session
from strata.store.errors import LevelConflict

sys.path[:0] = [str(ROOT / "benchmarks")]

import audit as forging  # noqa: E402

PRUNED = 'profile = "lz4"\n[compress]\nkeep = 0.5\nepochs = 1\nlr = 0.1\n'
BOUND = "300 of 300 equal: with 95 % confidence fewer than 1 % of rows differ"


def levels(said: Result) -> list[dict[str, Any]]:
    return json.loads(said.out)["levels"]


def right(said: Result) -> list[str]:
    """The levels that were audited; all are equal."""
    assert said.rc == 0, said.out + said.err
    found = levels(said)
    assert not any(one["different"] or one["beside"] or one["first"] for one in found)
    return [one["level"] for one in found]


# ---- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "views"),
    [
        pytest.param(tiny(views="2", precision="uint4"), ("v0", "v1"), id="4-bit views"),
        pytest.param(tiny(precision="bfloat16"), ("plain", "flipped"), id="bfloat16 canvas"),
        pytest.param(tiny(views="0", precision="float32"), (), id="fresh"),
        pytest.param(
            tiny(precision="uint8")
            + 'profile = "lz4"\n[compress]\nkeep = 0.5\nepochs = 1\nlr = 0.1',
            ("plain", "flipped"),
            id="pruned, 8-bit, packed",
        ),
        pytest.param(named(), ("plain", "flipped"), id="residual blocks of a file"),
    ],
)
def test_every_level_is_equal_to_the_bit(tmp_path: Path, text: str, views: tuple[str, ...]) -> None:
    place = made(beside(tmp_path / "place"), 2, text)
    expected = ["x_0 train", "x_0 test"]
    for j in (1, 2):
        expected += [*(f"x_{j} train.{view}" for view in views), f"x_{j} test"]
    assert right(place.do("audit", "--json", "--rows", 90)) == expected


def test_levels_that_only_probes_read(tmp_path: Path) -> None:
    place = made(tmp_path / "place", 1, tiny(views="0", layers=2, precision="float32"))
    assert place.do("probe", "--layer", 1, "--materialize").rc == 0
    assert "x_1 train" in right(place.do("audit", "--json", "--rows", 90))


def test_what_sees_jpeg_copies_is_left_out(tmp_path: Path) -> None:
    """Which are made by ffcv, from x_0."""
    pets(tmp_path / "pets")
    recipe(tmp_path, **PETS, data__jpeg=90)
    assert inside(tmp_path, "materialize", "tiny.toml", "--layer", 1).rc == 7  # x_0 is written
    said = inside(tmp_path, "audit", "tiny.toml", "--json")
    assert right(said) == ["x_0 train", "x_0 test"]
    assert "only x_0 is audited" in inside(tmp_path, "audit", "tiny.toml").out


def test_what_it_says(sound: Place) -> None:
    before = sound.files()
    said = sound.do("audit")
    assert said.rc == 0
    lines = said.out.splitlines()
    for level in ("x_0 train", "x_2 train.plain"):
        assert f"{level}: {BOUND}; labels and order of all rows are right" in lines
    assert sound.files() == before
    all_of_them = sound.do("audit", "--rows", 5000, "--layer", 1).out.splitlines()
    assert [line.partition(":")[0] for line in all_of_them] == [
        *("x_0 train", "x_0 test", "x_1 train.plain", "x_1 test")
    ]
    said = "these are all rows; labels and order of all rows are right"
    assert f"x_1 test: 360 of 360 equal: {said}" in all_of_them


@pytest.mark.parametrize(("rows", "share"), [(60, "4.88"), (100, "2.96"), (1000, "0.3")])
def test_the_bound_of_other_numbers_of_rows(sound: Place, rows: int, share: str) -> None:
    assert 1 - (1 - float(share) / 100) ** rows >= 0.95
    assert f"fewer than {share} % of rows" in sound.do("audit", "--rows", rows, "--layer", 1).out


def test_what_it_leaves_out_is_said(place: Place) -> None:
    (place.level(1, "test") / "COMMIT.json").unlink()
    said = place.do("audit", "--json", "--rows", 1)
    assert "x_1 test" not in right(said)
    assert json.loads(said.out)["left_out"] == ["x_1 test is partial, and left out"]


def test_levels_of_weights_that_the_run_had_are_named(place: Place) -> None:
    """One weight was changed, and every record of the run made to fit."""
    name = place.level(1, "test").parent.name
    layer = place.run / "layer_1"
    tensors, _ = weights.read(layer / "weights.safetensors")
    forging.one_ulp(next(one for one in tensors.values() if one.ndim == 4))
    weights.write(layer / "weights.safetensors", tensors)
    body = record.read(layer / "layer.json") | {"weights": weights.digest(tensors)}
    record.vouch(layer / "layer.json", body)
    said = place.do("audit", "--rows", 1)
    assert said.rc == 0
    assert f"{name} is of earlier weights, and left out: `explain -l 1`" in said.out
    assert "x_1 test:" not in said.out


def test_a_draw_can_be_repeated_and_is_another_each_time(sound: Place) -> None:
    drawn = [json.loads(sound.do("audit", "--json", "--rows", 1).out)["draw"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert json.loads(sound.do("audit", "--json", "--draw", 7, "--rows", 1).out)["draw"] == 7


def test_nothing_is_there_yet(tmp_path: Path, base: Place) -> None:
    assert here("audit", "digits", "--run", tmp_path / "run", "--store", tmp_path).rc == 8
    said = base.do("audit", "--layer", 2)
    assert said.rc == 8
    assert "materialize" in said.error
    assert base.do("audit", "--layer", 9).rc == 2


# ---- images -------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A run on class folders, with x_1."""
    pets(tmp_path / "pets")
    recipe(tmp_path, **PETS)
    assert inside(tmp_path, "materialize", "tiny.toml", "--layer", 1).rc == 0
    return tmp_path


def test_an_edited_image_is_named_by_its_file(folders: Path) -> None:
    path = folders / "pets/train/dog/1.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[2, 3, 1] ^= 1
    Image.fromarray(pixels).save(path)
    said = inside(folders, "audit", "tiny.toml")
    assert said.rc == 10
    assert "train/dog/1.png), channel 1, y 2, x 3:" in said.out
    assert f"{pixels[2, 3, 1] ^ 1}, should be {pixels[2, 3, 1]}" in said.out
    assert "so it is not the weights; images were changed since" in said.error


def test_images_that_lie_elsewhere_are_read_there(folders: Path) -> None:
    (folders / "pets").rename(folders / "animals")
    assert inside(folders, "audit", "tiny.toml").rc == 4
    right(inside(folders, "audit", "tiny.toml", "--json", "--data", "imagefolder:animals"))


def test_another_number_of_images_is_refused(folders: Path) -> None:
    shutil.copy(folders / "pets/train/cat/0.JPG", folders / "pets/train/cat/00.JPG")
    said = inside(folders, "audit", "tiny.toml")
    assert said.rc == 8
    assert "the source has 13 images" in said.error


@pytest.mark.parametrize("remembered", [True, False])
def test_images_that_were_broken_are_left_out_here_too(tmp_path: Path, remembered: bool) -> None:
    (pets(tmp_path / "pets") / "train/cat/2.JPG").write_bytes(b"no image")
    recipe(tmp_path, **PETS)
    assert inside(tmp_path, "materialize", "tiny.toml", "--layer", 1, "--skip-broken").rc == 0
    if not remembered:
        shutil.rmtree(tmp_path / "features/sources")
    found = right(inside(tmp_path, "audit", "tiny.toml", "--json"))
    assert found == ["x_0 train", "x_0 test", "x_1 train.plain", "x_1 test"]


# ---- what is wrong ------------------------------------------------------------------------------

TRAIN, TEST = 200, 20


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """Runs that are forged; every test gives back what it took."""
    root, draw = tmp_path_factory.mktemp("forged"), np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        arrays[f"x_{split}"] = draw.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 10
    np.savez(root / "images.npz", **arrays)
    made = forging.made
    return {
        name: made(root / name, root / "images.npz", name, TRAIN, TEST)
        for name in ("float32", "uint4")
    }


@pytest.mark.parametrize("kind", forging.MUTANTS)
def test_a_mutant_is_found_and_named(sessions: dict[str, Session], kind: str) -> None:
    precision, depth, view, spoil = forging.MUTANTS[kind]
    session = sessions[precision]
    key = session.key(depth, "train", view)
    true, wrong = forging.whole(session, key), spoil(session, key)
    different = np.flatnonzero((true != wrong).reshape(TRAIN, -1).any(1))
    assert len(different) > 0.3 * TRAIN
    assert forging.caught(session, key, TRAIN, 0) is None
    forging.forge(session, key, wrong)
    found = forging.caught(session, key, TRAIN, 0)
    forging.forge(session, key, true)
    assert found is not None
    assert found["different"] == different.tolist()
    at = found["first"]
    assert at["row"] == different[0]
    assert at["stored"] != at["expected"]


def test_all_labels_are_compared_whatever_is_drawn(sessions: dict[str, Session]) -> None:
    assert list(forging.labelled(sessions["float32"], 3)) == [True] * 3


def test_mutants_are_caught_as_often_as_predicted(sessions: dict[str, Session]) -> None:
    """Of 200 rows 20 are drawn: of a tenth altered, about nine of ten mutants are caught."""
    found = [was for _, _, was in forging.mutants(sessions, (0.1,), 20, 4)]
    expected = forging.predicted(0.1, 20)
    assert abs(np.mean(found) - expected) < 2 * forging.interval(expected, len(found))


def test_a_level_without_its_last_row_is_refused(sessions: dict[str, Session]) -> None:
    session = sessions["float32"]
    key = session.key(2, "train", "v1")
    true = forging.whole(session, key)
    forging.forge(session, key, true[:-1])
    with pytest.raises(LevelConflict, match=r"x_2 train.v1 has 199 rows .*, the images give 200"):
        forging.caught(session, key, 1, 0)
    forging.forge(session, key, true)
    assert forging.caught(session, key, TRAIN, 0) is None


def test_levels_below_are_not_looked_at(sessions: dict[str, Session]) -> None:
    """x_1 is wrong, and x_2, made when it was right, is still found right."""
    session = sessions["float32"]
    one, two = (session.key(depth, "train", "v0") for depth in (1, 2))
    true = forging.whole(session, one)
    forging.forge(session, one, true[::-1].copy())
    found = [forging.caught(session, key, TRAIN, 0) for key in (one, two)]
    forging.forge(session, one, true)
    assert [one is None for one in found] == [False, True]
