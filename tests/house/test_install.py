"""What is installed is one name, ``strata``; and a checkout never runs the code of another one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from command import environment, recipe
from root import ROOT, project_files

from strata.pipeline.recipe.builtin import names

pytestmark = pytest.mark.slow

SEEN = """
import os as _os
with open(_os.environ["STRATA_SEEN"], "a") as _seen:
    _seen.write(f"{_os.getpid()} {__file__}\\n")
"""
"""Appended to the package: every process that imports it says so."""


def run(cwd: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """A process without the tests' path; it must succeed."""
    env = {name: text for name, text in environment().items() if name != "PYTHONPATH"}
    env |= {"PYTHONWARNINGS": "ignore", **more}
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkout: the tracked files, and the link by which it finds itself."""
    root = tmp_path_factory.mktemp("copied") / "checkout"
    for name in project_files():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "typings").mkdir(exist_ok=True)
    (root / "typings/strata").symlink_to("..")
    return root


# ---- the wheel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in; before others on the path, as in a new venv."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    shutil.copytree(copied, source, symlinks=True, dirs_exist_ok=True)  # setuptools builds in place
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
    run(wheels, *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source)
    (wheel,) = wheels.glob("*.whl")
    run(wheels, *pip, "install", "--no-deps", "--no-index", "--target", site, wheel)
    return site


def test_the_only_new_name_is_strata(site: Path) -> None:
    (about,) = site.glob("strata-*.dist-info")
    assert {path.name for path in site.iterdir()} == {"strata", about.name, "bin"}
    assert [path.name for path in (site / "bin").iterdir()] == ["strata"]


def test_files_of_those_names_in_the_working_directory_disturb_nothing(
    site: Path, tmp_path: Path
) -> None:
    for name in ("store", "stages", "pipeline", "cli", "cli_options", "root"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is not ours')\n")
    code = "import strata.store.level.level as level; print(level.__file__)"
    found = run(tmp_path, "-c", code, PYTHONPATH=str(site)).stdout.strip()
    assert found == str(site / "strata/store/level/level.py")
    run(tmp_path, site / "bin/strata", "status", PYTHONPATH=str(site))


def test_recipes_and_templates_are_in_it(site: Path, tmp_path: Path) -> None:
    def strata(*words: object) -> str:
        return run(tmp_path, site / "bin/strata", *words, PYTHONPATH=str(site)).stdout

    assert list(json.loads(strata("recipes", "--json"))) == names()
    tiny = recipe(tmp_path, network__layers=1, network__downsample=[], schedule__epochs=1)
    strata("run", tiny)
    strata("report", tiny)
    assert (tmp_path / "runs/tiny/0/report.html").exists()


# ---- two checkouts, one environment -------------------------------------------------------------


@pytest.fixture(scope="module")
def other(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose processes leave their mark. This one is what the environment has."""
    root = tmp_path_factory.mktemp("other") / "checkout"
    shutil.copytree(copied, root, symlinks=True)
    with (root / "__init__.py").open("a") as file:
        file.write(SEEN)
    return root


def seen(path: Path) -> dict[int, str]:
    """Processes, and where each had ``strata`` from."""
    lines = (line.split(" ", 1) for line in path.read_text().splitlines())
    return {int(pid): name for pid, name in lines}


def only_of(root: Path, places: Iterable[str]) -> bool:
    return {os.path.realpath(name) for name in places} == {os.path.realpath(root / "__init__.py")}


def test_a_command_and_its_workers_run_the_code_beside_it(other: Path, tmp_path: Path) -> None:
    """A worker with other code would be refused."""
    tiny, log = recipe(tmp_path, network__layers=1, network__downsample=[]), tmp_path / "seen"
    words = ("materialize", tiny, "--layer", 1, "--workers", 1)
    done = run(tmp_path, other / "cli.py", *words, STRATA_SEEN=str(log))
    assert "1 workers at tcp://127.0.0.1:" in done.stderr
    assert len(seen(log)) >= 2, "the command and its worker"
    assert only_of(other, seen(log).values())


def test_so_do_ranks(other: Path, tmp_path: Path) -> None:
    tiny, log = recipe(tmp_path, network__layers=1, network__downsample=[]), tmp_path / "seen"
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", other / "cli.py")
    run(tmp_path, *words, "train", tiny, "--layer", 1, STRATA_SEEN=str(log))
    assert len(seen(log)) == 2
    assert only_of(other, seen(log).values())
