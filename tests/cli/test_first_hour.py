"""What other people brought in their first hour, and the right answer to each.

Every case is a thing that somebody did, with small drawn images: the command is run as they typed
it, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from command import PETS, Result, environment, pets, recipe, start, strata
from PIL import Image
from root import CLI

RUN = ("--run", "r")


def on_pets(cwd: Path, source: str = "imagefolder:pets", **changes: object) -> Result:
    """``run`` of one layer on a folder of cats and dogs, or on what stands in its place."""
    return strata(cwd, "run", recipe(cwd, **{**PETS, **changes}), "--data", source, *RUN)


def found(cwd: Path) -> dict[str, int]:
    """How many images of each split the run was made of."""
    record = json.loads((cwd / "r/data.json").read_text())
    body = record.get("body", record)
    return {split: body[split] for split in ("train", "test")}


def packed(cwd: Path, name: str, folder: str = "pets", mode: str = "w") -> str:
    with tarfile.open(cwd / name, mode) as tar:  # type: ignore[call-overload]
        tar.add(cwd / folder, folder)
    return f"imagefolder:{name}"


def digits(cwd: Path, **changes: object) -> str:
    return recipe(
        cwd, **{"network__layers": 1, "network__downsample": [], "schedule__epochs": 1, **changes}
    )


def test_clean_while_another_process_trains(tmp_path: Path) -> None:
    small = digits(tmp_path, network__layers=2, schedule__epochs=60)
    with start(tmp_path, "run", small, *RUN) as process:
        for _ in range(600):
            if list(tmp_path.glob("features/x_1-*/*/COMMIT.json")):
                break
            time.sleep(0.1)
        cleaned = strata(tmp_path, "clean", small, *RUN, "--yes")
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert cleaned.rc in (0, 8), cleaned.err
    assert cleaned.rc == 0 or "r" in cleaned.error
    assert cleaned.rc == 0 or (tmp_path / "r/report.html").exists()


def test_a_linked_class_in_a_folder_and_in_its_tar(tmp_path: Path) -> None:
    shutil.move(pets(tmp_path / "pets") / "test/cat", tmp_path / "pets/pool")
    (tmp_path / "pets/test/cat").symlink_to("../pool")
    answers = []
    for source in ("imagefolder:pets", packed(tmp_path, "pets.tar")):
        result = on_pets(tmp_path, source)
        answers.append(found(tmp_path) if result.rc == 0 else result.error)
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
    same = answers[0] == answers[1] == {"train": 8, "test": 4}
    assert same or "pets/test/cat" in str(answers[1])


def test_thumbnails_of_a_nas_are_no_images(tmp_path: Path) -> None:
    for path in sorted(pets(tmp_path / "pets").glob("train/*/*")):
        thumbnail = path.parent / "@eaDir" / path.name / "SYNOPHOTO_THUMB_M.jpg"
        thumbnail.parent.mkdir(parents=True)
        shutil.copy(path, thumbnail)
    result = on_pets(tmp_path)
    assert result.rc == 0, result.err
    assert found(tmp_path) == {"train": 8, "test": 4}
    assert "thumbnail" in result.err


def test_float_images_from_0_to_1_keep_their_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(pets(tmp_path / "pets").glob("*/*/*")):
        values = rng.random((12, 12), np.float32) * 0.3 + (0.6 if "dog" in str(path) else 0.1)
        path.unlink()
        Image.fromarray(values).save(path.with_suffix(".tif"))
    result = on_pets(tmp_path)
    assert result.rc == 0, result.err
    import zarr

    from strata.store.level.level import Level  # noqa: F401

    (level,) = (tmp_path / "features").glob("x_0-*/train*")
    images = np.asarray(zarr.open_array(level / "x", mode="r")[:])
    assert images.min() >= 20
    assert images.max() > 200
    assert "float" in result.err


def test_a_class_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = pets(tmp_path / "pets") / split if split == "train" else tmp_path / "pets" / split
        Path(folder, "cat").rename(folder / os.fsdecode(b"caf\xe9"))
    result = on_pets(tmp_path)
    assert result.rc == 0 or (result.rc == 4 and "caf" in result.error)
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("schedule.lr", ("lr = 0.1", "lr = inf")),
        ("schedule.weight_decay", ("lr = 0.1", "lr = 0.1\nweight_decay = nan")),
        ("data.mean", ("mean = [0.306]", "mean = [nan]")),
        ("data.std", ("std = [0.376]", "std = [inf]")),
    ],
)
def test_values_that_are_not_finite_are_refused_by_plan(
    tmp_path: Path, key: str, change: tuple[str, str]
) -> None:
    path = tmp_path / digits(tmp_path)
    path.write_text(path.read_text().replace(*change))
    result = strata(tmp_path, "plan", path.name)
    assert result.rc == 3
    assert key in result.error
    assert path.name in result.error


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_packed_tar_and_a_full_temporary_directory(tmp_path: Path) -> None:
    pets(tmp_path / "pets")
    source, disk = packed(tmp_path, "pets.tar.xz", mode="w:xz"), tmp_path / "t"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (disk / "fill").write_bytes(bytes(60_000))
        command = [sys.executable, str(CLI), "run", recipe(tmp_path, **PETS), "--data", source]
        env = {**environment(), "TMPDIR": str(disk)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert result.rc == 6
    assert str(disk) in result.error
    assert "TMPDIR" in result.error


def test_names_in_brackets_are_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # or a long name is folded
    pets(tmp_path / "pets")
    small = recipe(tmp_path, **PETS)
    for run in ("runs/[ablation] lr", "runs/x[/y]z"):
        assert strata(tmp_path, "run", small, "--run", run).rc == 0
        listed = strata(tmp_path, "du")
        assert listed.rc == 0
        assert "Traceback" not in listed.err
        assert run.rpartition("/")[2] in listed.out


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [("ascii", ["recipes"]), ("ascii", ["plan", "digits"]), ("latin-1", ["sweep", "--help"])],
)
def test_a_terminal_that_is_not_utf_8(tmp_path: Path, encoding: str, arguments: list[str]) -> None:
    env = {**environment(), "PYTHONIOENCODING": encoding}
    command = [sys.executable, str(CLI), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0
    assert done.stdout
    assert b"Traceback" not in done.stderr


def test_a_zip_is_to_be_unpacked(tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "pets"), "zip", pets(tmp_path / "pets"))
    result = on_pets(tmp_path, "imagefolder:pets.zip")
    assert result.rc == 4
    assert "zip" in result.error.lower()
    assert "unpack" in result.error.lower()


def test_a_damaged_run_beside_it_ends_no_report(tmp_path: Path) -> None:
    small = digits(tmp_path)
    assert strata(tmp_path, "run", small, "--run", "runs/good").rc == 0
    shutil.copytree(tmp_path / "runs/good", tmp_path / "runs/other")
    (tmp_path / "runs/other/recipe.toml").write_text("")
    result = strata(tmp_path, "report", small, "--run", "runs/good")
    assert result.rc == 0, result.err
    assert "runs/other" in result.err


NETWORKS = {
    "prints": "print('hello')\nfrom torch import nn\n"
    "def blocks():\n    print('there')\n    return [nn.Conv2d(1, 8, 3, padding=1)]\n",
    "lazy": "from torch import nn\ndef blocks():\n    return [nn.LazyConv2d(8, 3, padding=1)]\n",
    "ends": "import sys\nsys.exit('bye')\n",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_file_prints_is_lazy_or_ends_the_process(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(NETWORKS[name])
    path = tmp_path / digits(tmp_path)
    rest = path.read_text().split("[auxiliary]")
    head = rest[0].split("[network]")[0]
    path.write_text(f'network = "{name}.py:blocks"\n{head}[auxiliary]{rest[1]}')
    result = strata(tmp_path, "plan", path.name, "--json")
    if name == "prints":
        assert result.json
        assert "hello" in result.err
    else:
        assert result.rc == 3
        assert f"{name}.py" in result.error


def test_stdout_that_is_closed_or_full_ends_no_finished_work(tmp_path: Path) -> None:
    small = digits(tmp_path)
    line = f'"{sys.executable}" "{CLI}" %s {small} --run r %s'
    for command, where in (("run", ">&-"), ("status", "> /dev/full")):
        done = subprocess.run(
            line % (command, where),
            shell=True,
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "Traceback" not in done.stderr
        assert (tmp_path / "r/report.html").exists()
        assert done.returncode != 1


@pytest.mark.parametrize("packs", [True, False])
def test_two_folders_above_the_images_are_named(tmp_path: Path, packs: bool) -> None:
    (tmp_path / "data").mkdir()
    shutil.move(pets(tmp_path / "pets"), tmp_path / "data/set")
    source = packed(tmp_path, "x.tar", "data") if packs else "imagefolder:data"
    result = on_pets(tmp_path, source)
    if result.rc == 0:
        assert found(tmp_path) == {"train": 8, "test": 4}
    else:
        assert result.rc == 4
        assert "set" in result.error
