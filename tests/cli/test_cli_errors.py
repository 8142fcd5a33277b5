"""What goes wrong for users: an exit code for scripts, one line for people, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import PETS, Result, depths, noise, pets, recipe, shards, strata

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
    np.savez(cwd / "images.npz", **images, **labels)
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


def broken_images(cwd: Path) -> dict[str, Any]:
    """A truncated image is left out on request; later another one is changed."""
    arguments = on_pets(truncate, "--json")(cwd)
    said: dict[str, Any] = {"skipped": strata(cwd, *arguments, "--skip-broken")}
    said["report"] = strata(cwd, "report", "tiny.toml", "--json")
    said["again"] = strata(cwd, *arguments)
    shutil.copy(cwd / "pets/train/cat/1.png", cwd / "pets/train/cat/3.png")
    said["changed"] = strata(cwd, *arguments, "--skip-broken")
    return said


def diverging(cwd: Path) -> dict[str, Any]:
    """The learning rate of the complete run is raised, seal and all, before layer 2 goes again."""
    steep = small(cwd, schedule__lr=1e30)
    shutil.copy(cwd / steep, cwd / RUN / "recipe.toml")
    facts = unseal(cwd / RUN / "run.json")
    facts["science"]["schedule"]["lr"] = 1e30
    (cwd / RUN / "run.json").write_bytes(sealed(facts))
    shutil.rmtree(cwd / RUN / "layer_2")
    said: dict[str, Any] = {"run": strata(cwd, "run", "tiny.toml", "--json")}
    said["status"] = strata(cwd, "status", "tiny.toml", "--json")
    # A rate that explodes in the second epoch; the first has a loss to be told.
    late = recipe(cwd, "late", schedule__kind="step", schedule__every=1, schedule__decay=1e30)
    said["late"] = strata(cwd, "run", late, "--json")
    said["evaluate"] = strata(cwd, "evaluate", late, "--json")
    return said


def full_disk(cwd: Path) -> dict[str, Any]:
    """A store on a file system of its own, too small twice and then large enough."""
    store = cwd / "disk"
    store.mkdir()
    if os.geteuid() != 0 or _mount("-t", "tmpfs", "-o", "size=64k", "none", store).returncode:
        return {}
    arguments = ["materialize", small(cwd), "--layer", "1", "--store", "disk", "--json"]
    try:
        said: dict[str, Any] = {"images": strata(cwd, *arguments)}
        said["left"] = [str(p) for p in store.rglob("*") if p.name.startswith((".tmp", "c."))]
        _mount("-o", "remount,size=40m", store)
        said["features"] = strata(cwd, *arguments)
        said["depths"] = depths(store)
        _mount("-o", "remount,size=200m", store)
        said["larger"] = strata(cwd, *arguments)
        said["shards"] = shards(store, "x_1-*")
    finally:
        subprocess.run(["umount", store], check=True)
    return said


def _mount(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True)


# ---- all of it, two at a time, each in a directory of its own -----------------------------------


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a run of two layers is complete, with x_1. To be copied."""
    cwd = tmp_path_factory.mktemp("solved")
    assert strata(cwd, "run", small(cwd), "--json").rc == 0
    return cwd


@pytest.fixture(scope="module")
def said(solved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    def directory(name: str, like: Path | None) -> Path:
        place = tmp_path_factory.mktemp(name.replace(" ", "-"))
        return place if like is None else shutil.copytree(like, place, dirs_exist_ok=True)

    def run(prepare: Prepare, cwd: Path) -> Result:
        return strata(cwd, *prepare(cwd), "--json")

    with ThreadPoolExecutor(2) as pool:
        work: dict[str, Callable[[], Any]] = {
            story.__name__: partial(story, directory(story.__name__, like))
            for story, like in ((diverging, solved), (broken_images, None), (full_disk, None))
        }
        for cases, like in ((FRESH, None), (SOLVED, solved)):
            for name, _, _, prepare in cases:
                work[name] = partial(run, prepare, directory(name, like))
        yield {name: pool.submit(task) for name, task in work.items()}


CASES = [pytest.param(*case[:3], id=case[0]) for case in (*FRESH, *SOLVED)]


@pytest.mark.parametrize(("name", "rc", "words"), CASES)
def test_an_error_is_a_code_and_one_line(
    said: dict[str, Future], name: str, rc: int, words: tuple[str, ...]
) -> None:
    result: Result = said[name].result()
    assert result.rc == rc, result.err
    assert result.err == result.error + "\n"
    assert result.out == ""
    assert [word for word in words if word not in result.error] == [], result.error


USAGE = [
    pytest.param(["train", "digits"], "Missing option '--layer'", id="no layer"),
    pytest.param(["fly"], "No such command 'fly'", id="no such command"),
    pytest.param(["plan", "--disk-budget", "much"], "'much' is not a size", id="no size"),
    pytest.param(["run", "--device", "tpu"], "'tpu' is not one of", id="no such device"),
]


@pytest.mark.parametrize(("arguments", "told"), USAGE)
def test_wrong_usage_is_code_2(tmp_path: Path, arguments: Arguments, told: str) -> None:
    result = strata(tmp_path, *arguments)
    assert result.rc == 2
    assert result.err.startswith("Usage:")
    assert told in result.error


def test_broken_images_can_be_left_out_and_are_counted(said: dict[str, Future]) -> None:
    story = said["broken_images"].result()
    assert "solve layer 1" in story["skipped"].json["done"]
    data = story["report"].json["data"]
    assert (data["train"], data["test"], data["broken_count"]) == (7, 4, 1)
    assert data["broken"][0].startswith("train/dog/2.JPG: ")
    assert story["again"].json["done"] == [], "what was read once is not asked for again"


def test_changed_images_are_another_run(said: dict[str, Future]) -> None:
    changed: Result = said["broken_images"].result()["changed"]
    assert changed.rc == 8
    assert "the images of imagefolder:pets are not those" in changed.error
    assert "--run" in changed.error


def test_a_diverged_layer_leaves_the_layers_below(said: dict[str, Future]) -> None:
    story = said["diverging"].result()
    assert story["run"].rc == 9
    assert "in epoch 1; the last finite loss was" in story["run"].error
    assert "layer 2" in story["run"].error
    assert "'schedule.lr' (1e+30)" in story["run"].error
    states = [layer["state"] for layer in story["status"].json["layers"]]
    assert states == ["solved", "absent"]


def test_a_loss_that_explodes_later_is_told_with_the_last_good_one(said: dict[str, Future]) -> None:
    late: Result = said["diverging"].result()["late"]
    assert late.rc == 9
    assert "layer 1" in late.error
    good = late.error.split("in epoch 2; the last finite loss was ")[1].split(". ")[0]
    assert 0 < float(good) < 10


def test_nothing_solved_is_nothing_to_evaluate(said: dict[str, Future]) -> None:
    told: Result = said["diverging"].result()["evaluate"]
    assert told.rc == 8
    assert "no layer is solved in runs/late/0" in told.error


def test_a_full_disk_is_told_in_numbers_and_mended_by_space(said: dict[str, Future]) -> None:
    story = said["full_disk"].result()
    if not story:
        pytest.skip("mounting a small file system needs root")
    assert story["images"].rc == 6
    assert "x_0" in story["images"].error
    assert "needs 91,988 bytes" in story["images"].error
    assert "are free" in story["images"].error
    assert story["left"] == []
    assert story["features"].rc == 6
    assert "x_1 in disk needs 76,523,188 bytes" in story["features"].error
    assert "--store" in story["features"].error
    assert story["depths"] == ["x_0"], "refused before anything was written"
    assert story["larger"].json["done"] == ["write x_1"]
    assert sum(map(len, story["shards"].values())) == 9_414_324
