"""What was read is compared with what the recipe says, before anything is written or trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import PETS, Result, noise, pets, recipe
from runs import inside


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    pets(tmp_path / "pets")
    return tmp_path


def train(cwd: Path, *more: object, **changes: Any) -> Result:
    name = recipe(cwd, **{**PETS, **changes})
    return inside(cwd, "train", name, "--layer", 1, "--device", "cpu", *more)


def data(cwd: Path) -> dict[str, Any]:
    return json.loads((cwd / "runs/tiny/0/data.json").read_text("utf-8"))["body"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__train": 7}, ("train is 8, the recipe says 7", "set data.train = 8, or pass")),
        ({"data__test": 40}, ("test is 4, the recipe says 40", "set data.test = 4, or pass")),
        (
            {"data__train": 7, "data__test": 5},
            ("train is 8, the recipe says 7; test is 4, the", "data.train = 8, data.test = 4, or"),
        ),
        (
            {"data__classes": 3, "data__train": 12},
            ("has 2 classes, the recipe says 3", "set data.classes = 2, data.train = 8"),
        ),
    ],
)
def test_a_difference_stops_and_says_what_to_set(
    cwd: Path, changes: dict[str, int], told: tuple[str, ...]
) -> None:
    refused = train(cwd, **changes)
    assert refused.rc == 4
    assert all(words in refused.error for words in told)
    assert ("--accept-data" in refused.error) == ("data__classes" not in changes)
    assert not (cwd / "features").exists() or not list((cwd / "features").glob("x_*"))
    assert not (cwd / "runs/tiny/0/data.json").exists()
    # What the message says to edit may be edited: the same run goes on with it.
    assert train(cwd).rc == 0
    assert (data(cwd)["train"], data(cwd)["test"]) == (8, 4)


def test_accepted_once_is_accepted_for_the_run(cwd: Path) -> None:
    assert train(cwd, "--accept-data", data__train=7).rc == 0
    assert data(cwd)["train"] == 8
    shutil.rmtree(cwd / "features")
    assert train(cwd, data__train=7).rc == 0


def test_other_classes_cannot_be_accepted(cwd: Path) -> None:
    refused = train(cwd, "--accept-data", data__classes=3)
    assert refused.rc == 4
    assert "the data set has 2 classes, the recipe says 3" in refused.error


def test_thumbnails_are_no_images_and_what_is_left_out_is_told(cwd: Path) -> None:
    for i in range(3):
        place = cwd / f"pets/train/cat/@eaDir/{i}.JPG"
        place.mkdir(parents=True)
        shutil.copy(cwd / "pets/train/cat/0.JPG", place / "SYNOPHOTO_THUMB_M.jpg")
    (cwd / "pets/train/dog/notes.txt").write_text("two of each")
    reasons = {"no image": 1, "thumbnail or system file": 3}
    assert (
        "Left out: 1 no image, such as train/dog/notes.txt; 3 thumb"
        in train(cwd, data__train=11).error
    )
    said = train(cwd)
    assert said.rc == 0
    assert data(cwd)["left_out"] == reasons
    lines = said.err.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("images of imagefolder:pets"))
    table = [line.split() for line in lines[head : head + 4]]
    assert table[0][-2:] == ["found", "recipe"]
    assert table[1:] == [
        ["train", "8", "8"],
        ["test", "4", "4"],
        ["classes", "2", "2", "cat,", "dog"],
    ]
    assert "left out 1 (no image), such as train/dog/notes.txt" in lines
    thumbnail = "train/cat/@eaDir/0.JPG/SYNOPHOTO_THUMB_M.jpg"
    assert f"left out 3 (thumbnail or system file), such as {thumbnail}" in lines


@pytest.mark.parametrize("expected", [7, 8])
def test_broken_images_that_are_skipped_make_no_difference(cwd: Path, expected: int) -> None:
    """The recipe may count them or not."""
    (cwd / "pets/train/dog/2.JPG").write_bytes(b"not an image")
    said = train(cwd, "--skip-broken", data__train=expected)
    assert said.rc == 0, said.err
    assert (data(cwd)["train"], data(cwd)["broken_count"]) == (7, 1)
    assert "left out 1 broken images, the first: train/dog/2.JPG: not an image" in said.err
    refused = train(cwd, "--skip-broken", "--run", "other", data__train=9)
    assert refused.rc == 4
    assert "train is 8, the recipe says 9" in refused.error


def test_arrays_are_compared_as_well(cwd: Path) -> None:
    labels = np.arange(6) % 2
    arrays = {"x_train": noise(0, 6, 12, 12, 3), "y_train": labels}
    np.savez(cwd / "a.npz", **arrays, x_test=noise(1, 4, 12, 12, 3), y_test=labels[:4])
    refused = train(cwd, "--data", "npz:a.npz")
    assert refused.rc == 4
    assert "npz:a.npz is not what the recipe says: train is 6, the recipe says 8" in refused.error
    assert train(cwd, "--data", "npz:a.npz", data__train=6).rc == 0


def test_names_of_any_bytes_are_read_recorded_and_told(cwd: Path) -> None:
    """A class, a broken file, and the path of the images themselves."""
    for split in ("train", "test"):
        (cwd / "pets" / split / "cat").rename(cwd / "pets" / split / "caf\udce9")
    (cwd / "pets/train/dog/caf\udce9.jpg").write_text("broken")
    (cwd / "pets").rename(cwd / "p\udce9ts")
    said = train(cwd, "--skip-broken", "--data", "imagefolder:p\udce9ts")
    assert said.rc == 0, said.err
    assert data(cwd)["classes"] == ["caf\\xe9", "dog"]
    assert data(cwd)["broken"] == ["train/dog/caf\\xe9.jpg: not an image in a known format"]
    assert "nothing to do" in train(cwd).out
