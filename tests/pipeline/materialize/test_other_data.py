"""Data of every kind through a run: what a recipe leaves to it, splits, labels of numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from command import PETS, TINY, Result, noise, pets, recipe
from runs import inside, open_run

from strata.pipeline.feed.level_feed import feed
from strata.pipeline.run import rundir
from strata.stages.data import augment
from strata.store.feature_store import open_level
from strata.store.level.level import Level

LEFT = ("data.classes", "data.train", "data.test", "data.mean", "data.std")
ARRAYS: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if not key.startswith(("data", "augment"))},
    "network.layers": 1,
    "network.downsample": [],
    "schedule.epochs": 1,
    "schedule.batch": 4,
}


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    pets(tmp_path / "pets")
    return tmp_path


def small(cwd: Path, **changes: Any) -> str:
    """A recipe of the pets that leaves to them what it can, with changes."""
    name = recipe(cwd, **{**PETS, **changes})
    return without(cwd / name, LEFT)


def without(path: Path, keys: tuple[str, ...]) -> str:
    dropped = tuple(f"{key.partition('.')[2]} = " for key in keys)
    lines = [line for line in path.read_text().splitlines() if not line.startswith(dropped)]
    path.write_text("\n".join(lines) + "\n")
    return path.name


def arrays(cwd: Path, **data: Any) -> str:
    """A recipe of arrays in a.npz."""
    values = {**ARRAYS, "data.source": "npz:a.npz"} | {f"data.{k}": v for k, v in data.items()}
    tables: dict[str, list[str]] = {}
    for path, value in values.items():
        table, key = path.split(".")
        tables.setdefault(table, []).append(f"{key} = {json.dumps(value)}")
    text = "\n".join(f"[{table}]\n" + "\n".join(lines) for table, lines in tables.items())
    (cwd / "tiny.toml").write_text(text + "\n")
    return "tiny.toml"


def materialize(cwd: Path, name: str, *more: object) -> Result:
    return inside(cwd, "materialize", name, "--layer", 1, "--device", "cpu", *more)


def x_0(cwd: Path, split: str) -> Level:
    (place,) = (cwd / "features").glob(f"x_0-*/{split}")
    return open_level(place)


def science(cwd: Path) -> dict[str, Any]:
    found = rundir.find(cwd / "runs/tiny/0")
    assert found is not None
    return found.facts["science"]["data"]


# ---- what a recipe leaves to the data -----------------------------------------------------------


def test_numbers_that_are_left_out_are_found_once_and_kept(cwd: Path) -> None:
    name = small(cwd)
    planned = inside(cwd, "plan", name)
    assert planned.rc == 0, planned.err
    assert "looking at imagefolder:pets for what the recipe leaves to it: classes, train" in (
        planned.err
    )
    assert materialize(cwd, name).rc == 0
    kept = science(cwd)
    assert {key: kept[key] for key in ("classes", "train", "test")} == {
        "classes": 2,
        "train": 8,
        "test": 4,
    }
    assert kept["mean"] == pytest.approx([0.5] * 3, abs=0.03)
    assert kept["std"] == pytest.approx([0.27] * 3, abs=0.04)
    # With the images gone, what is known of them is the run's.
    shutil.move(cwd / "pets", cwd / "elsewhere")
    again = inside(cwd, "status", name, "--json")
    assert again.rc == 0, again.err
    assert "looking at" not in again.err
    fresh = inside(cwd, "plan", name, "--run", "other")
    assert fresh.rc == 4
    assert "there is no directory or tar pets" in fresh.error


def test_a_recipe_that_says_them_is_the_same_run(cwd: Path) -> None:
    assert materialize(cwd, small(cwd)).rc == 0
    kept = science(cwd)
    told = {f"data__{key}": kept[key] for key in ("classes", "train", "test", "mean", "std")}
    done = materialize(cwd, recipe(cwd, **{**PETS, **told}))
    assert done.rc == 0, done.err
    other = materialize(cwd, recipe(cwd, **{**PETS, **told, "data__mean": [0.4] * 3}))
    assert other.rc == 8
    assert "data.mean" in other.error


def test_a_table_of_layers_is_checked_once_the_classes_are_known(cwd: Path) -> None:
    refused = inside(cwd, "plan", small(cwd, network__layers=3, network__downsample=[1, 2]))
    assert refused.rc == 0, refused.err
    refused = inside(cwd, "plan", small(cwd, augment__crop=11))
    assert refused.rc == 0, refused.err
    wrong = small(cwd, augment__crop=11, network__layers=2, network__downsample=[1])
    refused = inside(cwd, "plan", wrong)
    assert refused.rc == 3
    assert "augment.crop is 11 pixels, which 2" in refused.error


# ---- a split ------------------------------------------------------------------------------------


def test_class_folders_with_a_split(cwd: Path) -> None:
    shutil.rmtree(cwd / "pets/test")
    for kind in ("cat", "dog"):
        (cwd / "pets/train" / kind).rename(cwd / "pets" / kind)
    (cwd / "pets/train").rmdir()
    name = small(cwd)
    refused = inside(cwd, "plan", name)
    assert refused.rc == 4
    assert "pets has no folder test/ or val/. Pass --split 0.2, or set data.split" in refused.error
    assert inside(cwd, "plan", name, "--split", "0.25").rc == 0
    assert materialize(cwd, name, "--split", "0.25").rc == 0
    assert (len(x_0(cwd, "train")), len(x_0(cwd, "test"))) == (6, 2)
    assert sorted(x_0(cwd, "test").array("label")) == [0, 1]
    assert science(cwd)["split"] == 0.25
    # The run has it: it need not be said again, and cannot be another.
    again = materialize(cwd, name)
    assert (again.rc, "nothing to do" in again.out + again.err) == (0, True)
    other = materialize(cwd, name, "--split", "0.5")
    assert other.rc == 8
    assert "data.split: was 0.25, is 0.5" in other.error


def test_a_split_in_the_recipe_is_that_of_the_flag(cwd: Path) -> None:
    shutil.rmtree(cwd / "pets/test")
    assert materialize(cwd, small(cwd), "--split", "0.25").rc == 0
    before = {path.name for path in (cwd / "features").glob("x_0-*")}
    name = small(cwd, data__split=0.25)
    assert materialize(cwd, name, "--run", "other").rc == 0
    assert {path.name for path in (cwd / "features").glob("x_0-*")} == before
    assert (
        materialize(cwd, small(cwd, data__split=0.25, data__split_seed=1), "--run", "third").rc == 0
    )
    assert len(list((cwd / "features").glob("x_0-*"))) == 2


def test_a_split_out_of_range_is_said(cwd: Path) -> None:
    assert materialize(cwd, small(cwd), "--split", "1.5").rc == 2
    refused = inside(cwd, "plan", small(cwd, data__split=1.0))
    assert refused.rc == 3
    assert "'data.split' is 1.0; it must be 0, or between 0 and 1" in refused.error


# ---- labels that are numbers, values of every kind ----------------------------------------------


@pytest.mark.parametrize("numbers", [1, 3])
def test_labels_that_are_numbers_reach_the_feed(cwd: Path, numbers: int) -> None:
    x = noise(0, 10, 8, 8)
    y = np.random.default_rng(0).random((10, numbers)).astype(np.float32)
    np.savez(cwd / "a.npz", x=x, y=y)
    name = recipe(cwd, data__classes=numbers, data__split=0.2, data__train=8, data__test=2)
    text = (cwd / name).read_text().replace('"digits"', json.dumps(f"npz:{cwd / 'a.npz'}"))
    level = open_run(cwd / "place", text).images()["train"]
    want = y[:, 0] if numbers == 1 else y
    for one in (False, True):  # read by its path, too
        level = open_level(next(cwd.glob("place/store/x_0-*/train"))) if one else level
        labels = level.array("label")
        assert labels.dtype == np.float32
        rows = level.read(0, len(level))[:, 0]
        at = [next(i for i in range(10) if (x[i] == row).all()) for row in rows]
        np.testing.assert_array_equal(labels, want[at])
    with feed(level, batch=4, ids=True) as batches:
        for pixels, found, _ in batches:
            assert found.dtype == torch.float32
            at = [next(i for i in range(10) if (x[i] == row).all()) for row in pixels[:, 0].numpy()]
            np.testing.assert_array_equal(found.numpy(), want[at])
    group = zarr.open_group(next(cwd.glob("place/store/x_0-*/train")), mode="r")
    label: Any = group["label"]
    assert label.metadata.dimension_names == ("sample", "number")[: want.ndim]
    assert np.isnan(label.fill_value)


def test_another_number_of_numbers_is_said(cwd: Path) -> None:
    np.savez(cwd / "a.npz", x=noise(0, 10, 8, 8), y=np.random.default_rng(0).random((10, 3)))
    name = recipe(cwd, data__source="npz:a.npz", data__classes=2, data__split=0.2)
    refused = materialize(cwd, name)
    assert refused.rc == 4
    assert "has 3 numbers in a label, the recipe says 2" in refused.error


def test_12_bands_of_16_bits(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (np.random.default_rng(0).random((12, 8, 8, 12)) * 65535).astype(np.uint16)
    np.savez(cwd / "a.npz", X=x, y=np.arange(12) % 3)
    name = arrays(cwd, shape=[12, 8, 8], dtype="uint16", split=0.25)
    done = materialize(cwd, name)
    assert done.rc == 0, done.err
    assert "converted 12 images: channels made the first axis" in done.err
    level = x_0(cwd, "train")
    rows = level.read(0, len(level))
    assert (rows.dtype, rows.shape) == (np.dtype("<u2"), (9, 12, 8, 8))
    kept = science(cwd)
    ids = level.array("sample_id")
    assert len(ids) == 9
    labels = level.array("label")
    for row, label in zip(rows, labels, strict=True):
        found = [i for i in range(12) if (x[i].transpose(2, 0, 1) == row).all()]
        assert len(found) == 1
        assert found[0] % 3 == label
    np.testing.assert_allclose(kept["mean"], [32767] * 12, rtol=0.2)
    monkeypatch.setattr("strata.pipeline.run.device.free_device_memory", lambda device: 1 << 30)
    for tier in ("memory", "device"):
        with feed(level, batch=3, tier=tier, ids=True) as batches:
            for one, _, own in batches:
                assert one.dtype == torch.uint16
                np.testing.assert_array_equal(
                    one.numpy(), rows[[ids.tolist().index(i) for i in own.tolist()]]
                )
    assert one.numpy().max() > 1 << 15
    found = augment.standardise(one, [0.0], [1.0])
    np.testing.assert_array_equal(found.numpy(), one.numpy().astype(np.float32))
    np.testing.assert_array_equal(augment.standardise(one.view(torch.int16), [0.0], [1.0]), found)


def test_data_of_a_file_goes_on_where_it_was(cwd: Path) -> None:
    """Read once, not again; what has changed since is not taken for it."""
    code = """
from pathlib import Path
from torchvision.datasets import ImageFolder
def make():
    with open("calls", "a") as calls:
        calls.write("x")
    return ImageFolder("pets/train"), ImageFolder("pets/test")
"""
    (cwd / "mine.py").write_text(code)
    name = small(cwd, data__source="python:mine.py:make")
    assert materialize(cwd, name).rc == 0
    asked = (cwd / "calls").stat().st_size
    again = materialize(cwd, name)
    assert (again.rc, "nothing to do" in again.out + again.err) == (0, True)
    assert (cwd / "calls").stat().st_size == asked
    shutil.rmtree(next((cwd / "features").glob("x_0-*")))
    assert materialize(cwd, name).rc == 0
    shutil.rmtree(next((cwd / "features").glob("x_0-*")))
    shutil.copy(cwd / "pets/train/cat/1.png", cwd / "pets/train/cat/2.JPG")
    changed = materialize(cwd, name)
    assert changed.rc in (4, 8)
    assert "changed since the images were looked through" in changed.error or "are not those" in (
        changed.error
    )
    # Nothing that was remembered stands in the way once it is said.
    fresh = materialize(cwd, name, "--run", "other")
    assert fresh.rc == 0, fresh.err
    broken = cwd / "pets/train/dog/3.png"
    broken.write_bytes(b"x")
    refused = materialize(cwd, name, "--run", "third", "--store", "third-store")
    assert refused.rc == 4
    assert "1 broken image of 12, the first: train/7 (" in refused.error
    skipped = materialize(cwd, name, "--run", "third", "--store", "third-store", "--skip-broken")
    assert skipped.rc == 0, skipped.err
    assert "left out 1 broken images, the first: train/7" in skipped.err
