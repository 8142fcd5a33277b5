"""What goes wrong for users: an exit code for scripts, one line for people, nothing lost."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import PETS, Result, depths, noise, pets, recipe, shards, strata
from runs import inside

from strata.store.files.publish import sealed, unseal

RUN = "runs/tiny/0"
Arguments = list[str]


Prepare = Callable[[Path], Arguments]
"""Makes a directory ready for a command that must fail, and gives its arguments."""


def asks(*arguments: str, **changes: Any) -> Prepare:
    """The command with the tiny recipe, changed as said."""

    def prepare(cwd: Path) -> Arguments:
        return [arguments[0], recipe(cwd, **changes), *arguments[1:]]

    return prepare


def small(cwd: Path, **changes: Any) -> str:
    return recipe(cwd, **{"network__layers": 2, "schedule__epochs": 1, **changes})


def on_pets(spoil: Callable[[Path], object], *arguments: str) -> Prepare:
    """Training on drawn class folders after something was done to them."""

    def prepare(cwd: Path) -> Arguments:
        spoil(pets(cwd / "pets"))
        return ["train", recipe(cwd, **PETS), "--layer", "1", *arguments]

    return prepare


def truncate(folder: Path) -> None:
    path = folder / "train/dog/2.JPG"
    path.write_bytes(path.read_bytes()[:-60])


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def only_tested(folder: Path) -> None:
    shutil.copytree(folder / "test/cat", folder / "test/emu")


def wrong_label(cwd: Path) -> Arguments:
    labels = {"y_train": np.array([0, 1, 0, 7, 1, 0, 1, 0]), "y_test": np.array([0, 1, 1, 0])}
    images = {"x_train": noise(1, 8, 12, 12, 3), "x_test": noise(2, 4, 12, 12, 3)}
    np.savez(cwd / "images.npz", allow_pickle=False, **images, **labels)
    return ["train", recipe(cwd, **PETS), "--layer", "1", "--data", "npz:images.npz"]


def flipped(pattern: str, byte: int, *looking: str) -> Prepare:
    """One bit of a file of a complete run is wrong when something is done with the run."""

    def prepare(cwd: Path) -> Arguments:
        (path,) = cwd.glob(pattern)
        data = bytearray(path.read_bytes())
        data[byte] ^= 1
        path.write_bytes(data)
        return [*(looking or ("materialize", "--layer", "2")), small(cwd)]

    return prepare


def again(*arguments: str, **changes: Any) -> Prepare:
    """A command on the complete run, with a recipe of other values."""
    return lambda cwd: [*arguments, small(cwd, **changes), "--run", RUN]


MISSPELT = ("'schedule.epoch'", "Did you mean 'epochs'?")
WEIGHTS = f"{RUN}/layer_2/weights.safetensors"
COMMIT = "features/x_1-*/train.plain/COMMIT.json"
# name, exit code, words, prepare; the second table is of directories that hold a complete run
FRESH: list[tuple[str, int, tuple[str, ...], Prepare]] = [
    ("unknown recipe", 3, ("'digit'", "Did you mean 'digits'?"), lambda _: ["plan", "digit"]),
    ("no such file", 3, ("gone.toml", "No such file"), lambda _: ["plan", "gone.toml"]),
    ("misspelt key", 3, ("recipe tiny", *MISSPELT), asks("plan", schedule__epoch=3)),
    ("wrong type", 3, ("epochs' must be an integer", "'m'"), asks("plan", schedule__epochs="m")),
    ("out of bounds", 3, ("momentum' is 1.5", "[0, 1)"), asks("plan", schedule__momentum=1.5)),
    ("one view", 3, ("views' is 1", "allow_single_view"), asks("plan", augment__views=1)),
    ("layer 9", 2, ("layer 9", "tiny", "1 … 3"), asks("train", "--layer", "9")),
    ("tiny disk budget", 5, ("1.0 MB", "14.6 MB"), asks("run", "--disk-budget", "1MB")),
    ("no data folder", 4, ("there is no directory", "pets"), on_pets(shutil.rmtree)),
    ("empty data folder", 4, ("pets has no folder train/",), on_pets(emptied)),
    ("class only in test", 4, ("class emu is only in the test split",), on_pets(only_tested)),
    ("truncated image", 4, ("dog/2.JPG", "1 broken", "--skip-broken"), on_pets(truncate)),
    ("label out of range", 4, ("train sample", "label 7", "outside 0..1"), wrong_label),
    ("no GPU", 7, ("--device cuda", "cpu"), asks("run", "--device", "cuda")),
    ("evaluate without a run", 8, (RUN, "strata run tiny"), asks("evaluate")),
    ("report without a run", 8, (RUN, "strata run tiny"), asks("report")),
    ("clean without a run", 8, (RUN, "strata run tiny"), asks("clean", "--yes")),
]
SOLVED: list[tuple[str, int, tuple[str, ...], Prepare]] = [
    ("other recipe", 8, (RUN, "network.width", "16", "--run"), again("run", network__width=16)),
    ("other seed", 8, (RUN, "seed", "--run"), again("train", "--layer", "1", "--seed", "1")),
    ("weights", 10, ("layer_2/weights.safetensors", "digest"), flipped(WEIGHTS, -1)),
    ("commit", 10, ("train.plain/COMMIT.json is damaged",), flipped(COMMIT, 400)),
]


# ---- stories of several commands ----------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A truncated image is left out on request; later another one is changed."""
    cwd = tmp_path_factory.mktemp("broken")
    arguments = on_pets(truncate, "--json")(cwd)
    said: dict[str, Any] = {"skipped": inside(cwd, *arguments, "--skip-broken")}
    said["report"] = inside(cwd, "report", "tiny.toml", "--json")
    said["again"] = inside(cwd, *arguments)
    shutil.copy(cwd / "pets/train/cat/1.png", cwd / "pets/train/cat/3.png")
    said["changed"] = inside(cwd, *arguments, "--skip-broken")
    return said


@pytest.fixture(scope="module")
def diverging(solved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The learning rate of the complete run is raised, seal and all, before layer 2 goes again."""
    cwd = shutil.copytree(solved, tmp_path_factory.mktemp("diverging"), dirs_exist_ok=True)
    steep = small(cwd, schedule__lr=1e30)
    shutil.copy(cwd / steep, cwd / RUN / "recipe.toml")
    facts = unseal(cwd / RUN / "run.json")
    facts["science"]["schedule"]["lr"] = 1e30
    (cwd / RUN / "run.json").write_bytes(sealed(facts))
    shutil.rmtree(cwd / RUN / "layer_2")
    said: dict[str, Any] = {"run": inside(cwd, "run", "tiny.toml", "--json")}
    said["status"] = inside(cwd, "status", "tiny.toml", "--json")
    # A rate that explodes in the second epoch; the first has a loss to be told.
    # Every step makes the weights about four times as large: infinite in the second epoch.
    grows = {"schedule__kind": "step", "schedule__every": 2, "schedule__weight_decay": 60.0}
    late = recipe(cwd, "late", **grows)
    said["late"] = strata(cwd, "run", late, "--json")
    said["evaluate"] = inside(cwd, "evaluate", late, "--json")
    return said


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store on a file system of its own, too small twice and then large enough."""
    cwd = tmp_path_factory.mktemp("full")
    store = cwd / "disk"
    store.mkdir()
    if os.geteuid() != 0 or _mount("-t", "tmpfs", "-o", "size=64k", "none", store).returncode:
        return {}
    arguments = ["materialize", small(cwd), "--layer", "1", "--store", "disk", "--json"]
    try:
        said: dict[str, Any] = {"images": inside(cwd, *arguments)}
        said["left"] = [str(p) for p in store.rglob("*") if p.name.startswith((".tmp", "c."))]
        _mount("-o", "remount,size=40m", store)
        said["features"] = inside(cwd, *arguments)
        said["depths"] = depths(store)
        _mount("-o", "remount,size=200m", store)
        said["larger"] = inside(cwd, *arguments)
        said["shards"] = shards(store, "x_1-*")
    finally:
        subprocess.run(["umount", "--lazy", store], check=True)
    return said


def _mount(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True)


# ---- each in a directory of its own --------------------------------------------------------------


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a run of two layers is complete, with x_1. To be copied."""
    cwd = tmp_path_factory.mktemp("solved")
    assert inside(cwd, "run", small(cwd), "--json").rc == 0
    return cwd


def refused(cwd: Path, name: str, rc: int, words: tuple[str, ...], prepare: Prepare) -> None:
    """The first case of every exit code is a process."""
    first = next(case[0] for case in (*FRESH, *SOLVED) if case[1] == rc)
    result = (strata if name == first else inside)(cwd, *prepare(cwd), "--json")
    assert result.rc == rc, result.err
    assert result.err == result.error + "\n"
    assert result.out == ""
    assert [word for word in words if word not in result.error] == [], result.error


def named(cases: list[tuple[str, int, tuple[str, ...], Prepare]]) -> pytest.MarkDecorator:
    found = [pytest.param(*case, id=case[0]) for case in cases]
    return pytest.mark.parametrize(("name", "rc", "words", "prepare"), found)


@named(FRESH)
def test_an_error_is_a_code_and_one_line(
    tmp_path: Path, name: str, rc: int, words: tuple[str, ...], prepare: Prepare
) -> None:
    refused(tmp_path, name, rc, words, prepare)


@named(SOLVED)
def test_so_is_an_error_of_a_complete_run(
    solved: Path, tmp_path: Path, name: str, rc: int, words: tuple[str, ...], prepare: Prepare
) -> None:
    shutil.copytree(solved, tmp_path, dirs_exist_ok=True)
    refused(tmp_path, name, rc, words, prepare)


USAGE = [
    pytest.param(["train", "digits"], "Missing option '--layer'", id="no layer"),
    pytest.param(["fly"], "No such command 'fly'", id="no such command"),
    pytest.param(["plan", "--disk-budget", "much"], "'much' is not a size", id="no size"),
    pytest.param(["run", "--device", "tpu"], "'tpu' is not one of", id="no such device"),
]


@pytest.mark.parametrize(("arguments", "told"), USAGE)
def test_wrong_usage_is_code_2(tmp_path: Path, arguments: Arguments, told: str) -> None:
    result = inside(tmp_path, *arguments)
    assert result.rc == 2
    assert result.err.startswith("Usage:")
    assert told in result.error


def test_broken_images_can_be_left_out_and_are_counted(broken_images: dict[str, Any]) -> None:
    assert "solve layer 1" in broken_images["skipped"].json["done"]
    data = broken_images["report"].json["data"]
    assert (data["train"], data["test"], data["broken_count"]) == (7, 4, 1)
    assert data["broken"][0].startswith("train/dog/2.JPG: ")
    assert broken_images["again"].json["done"] == [], "what was read once is not asked for again"


def test_changed_images_are_another_run(broken_images: dict[str, Any]) -> None:
    changed: Result = broken_images["changed"]
    assert changed.rc == 8
    assert "the images of imagefolder:pets are not those" in changed.error
    assert "--run" in changed.error


def test_a_diverged_layer_leaves_the_layers_below(diverging: dict[str, Any]) -> None:
    assert diverging["run"].rc == 9
    assert "in epoch 1; the last finite loss was" in diverging["run"].error
    assert "layer 2" in diverging["run"].error
    assert "'schedule.lr' (1e+30)" in diverging["run"].error
    states = [layer["state"] for layer in diverging["status"].json["layers"]]
    assert states == ["solved", "absent"]


def test_a_loss_that_explodes_later_is_told_with_the_last_good(
    diverging: dict[str, Any],
) -> None:
    late: Result = diverging["late"]
    assert late.rc == 9
    assert "layer 1" in late.error
    good = late.error.split("in epoch 2; the last finite loss was ")[1].split(". ")[0]
    assert math.isfinite(float(good))


def test_nothing_solved_is_nothing_to_evaluate(diverging: dict[str, Any]) -> None:
    told: Result = diverging["evaluate"]
    assert told.rc == 8
    assert "no layer is solved in runs/late/0" in told.error


def test_a_full_disk_is_told_in_numbers_and_mended_by_space(full_disk: dict[str, Any]) -> None:
    if not full_disk:
        pytest.skip("mounting a small file system needs root")
    assert full_disk["images"].rc == 6
    assert "x_0" in full_disk["images"].error
    assert "needs 91,988 bytes" in full_disk["images"].error
    assert "are free" in full_disk["images"].error
    assert full_disk["left"] == []
    assert full_disk["features"].rc == 6
    assert "x_1 in disk needs 76,523,188 bytes" in full_disk["features"].error
    assert "--store" in full_disk["features"].error
    assert full_disk["depths"] == ["x_0"], "refused before anything was written"
    assert full_disk["larger"].json["done"] == ["write x_1"]
    assert sum(map(len, full_disk["shards"].values())) == 9_414_324
