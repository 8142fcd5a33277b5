"""Images on their way into x_0: how their values are scaled, and files that change meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from command import PETS, Result, noise, pets, recipe
from PIL import Image
from runs import inside

from strata.pipeline.materialize import images
from strata.pipeline.run import record
from strata.stages.data.sources import Source
from strata.store.feature_store import Store

RUN = ("run", "tiny.toml", "--run", "r", "--store", "s", "--skip-broken")


def scans(folder: Path, make: Callable[[int], Image.Image], suffix: str = "tif") -> Path:
    """The class folders of `pets`, with images of `make`, brighter by class."""
    for split, count in (("train", 4), ("test", 2)):
        for brightness, kind in enumerate(("cat", "dog")):
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                make(brightness).save(folder / split / kind / f"{i}.{suffix}")
    return folder


def facts(place: Path) -> dict[str, Any]:
    return record.read(place / "r/data.json")  # pyright: ignore


def x_0(place: Path) -> np.ndarray:
    """Every value of the training images."""
    (level,) = (place / "s").glob("x_0-*/train*")
    return np.asarray(zarr.open_array(level / "x", mode="r")[:])


def test_floats_of_0_to_1_reach_x_0(tmp_path: Path) -> None:
    scans(tmp_path / "pets", lambda k: Image.fromarray(np.full((12, 12), 0.3 + 0.3 * k, "f4")))
    recipe(tmp_path, **PETS | {"data__channels": 1, "data__mean": [0.5], "data__std": [0.25]})
    done = inside(tmp_path, *RUN)
    assert done.rc == 0, done.err
    assert "converted 12 images: float of 0…1, value × 255" in done.err
    assert facts(tmp_path)["scales"] == {"float": 1}
    assert facts(tmp_path)["converted"] == {"float of 0…1, value × 255": 12}
    assert np.unique(x_0(tmp_path)).tolist() == [76, 153]


def test_colour_that_becomes_grey_is_told(tmp_path: Path) -> None:
    pets(tmp_path / "pets")
    recipe(tmp_path, **PETS | {"data__channels": 1, "data__mean": [0.5], "data__std": [0.25]})
    assert "converted 12 images: colour to grey" in inside(tmp_path, *RUN).err
    assert facts(tmp_path)["converted"] == {"colour to grey": 12}
    recipe(tmp_path, "rgb", **PETS)
    told = inside(tmp_path, "run", "rgb.toml", "--run", "rgb", "--store", "s")
    assert told.rc == 0, "the survey in the store is that of any recipe"
    assert "converted" not in told.err


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done after the survey, before the images are read."""

    def arrange(do: Callable[[], object]) -> None:
        whole = images._write_split

        def late(session: Any, source: Source, split: str, found: Any) -> None:
            if split == "train":
                do()
            whole(session, source, split, found)

        monkeypatch.setattr(images, "_write_split", late)

    return arrange


def _flip(file: Path, at: int) -> None:
    """Change one byte in place."""
    body = bytearray(file.read_bytes())
    body[at] ^= 1
    file.write_bytes(body)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "No such file or directory"),
    "empty": (lambda file: file.write_bytes(b""), "the file is empty"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:60]), ""),
    "another": (
        lambda file: Image.fromarray(noise(99, 12, 12, 3)).save(file),
        "it holds something else now",
    ),
}


def named(found: Result) -> str:
    """The reason told for the file that has changed."""
    assert found.rc == 4, found.err
    before, told, reason = found.error.partition(
        "train/dog/1.png has changed since the images were looked through: "
    )
    assert before == "Error: "
    assert told
    return reason


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_after_the_survey_is_named(
    tmp_path: Path, between: Any, how: str
) -> None:
    change, told = CHANGES[how]
    file = pets(tmp_path / "pets") / "train/dog/1.png"
    recipe(tmp_path, **PETS)
    between(lambda: change(file))
    assert told in named(inside(tmp_path, *RUN))


def test_so_is_one_in_a_tar(tmp_path: Path, between: Any) -> None:
    body = (pets(tmp_path / "pets") / "train/dog/1.png").read_bytes()
    tar = Path(shutil.make_archive(str(tmp_path / "pets"), "tar", tmp_path / "pets"))
    recipe(tmp_path, **PETS | {"data__source": "imagefolder:pets.tar"})
    between(lambda: _flip(tar, tar.read_bytes().index(body) + 50))
    assert named(inside(tmp_path, *RUN))


def test_a_survey_of_before_there_were_scales_is_made_again(tmp_path: Path) -> None:
    pets(tmp_path / "pets")
    recipe(tmp_path, **PETS)
    assert inside(tmp_path, *RUN).rc == 0
    (memo,) = (tmp_path / "s/sources").glob("*.json")
    files = Store(tmp_path / "s").files
    body = images.unseal(memo, files)
    old = {k: v for k, v in body.items() if k not in ("scales", "sums", "converted", "sha256")}
    memo.unlink()
    images.replace(memo.parent, memo.name, images.sealed(old), files)
    shutil.rmtree(next((tmp_path / "s").glob("x_0-*")))
    assert inside(tmp_path, *RUN).rc == 0
    assert "sums" in images.unseal(memo, files)
