"""A small run inside the test's process: a session on the digits, with any recipe text."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from command import Result

from strata import cli
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.options import Options
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.run import overview, rundir
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.session import Session
from strata.stages.solve.solve import Solver
from strata.store.feature_store import Store

TINY = """
[data]
source = "digits"
classes = 10
channels = 1
size = 8
mean = [0.3]
std = [0.4]
train = 1437
test = 360
[augment]
pad = 2
crop = 8
flip = {flip}
views = {views}
[network]
layers = {layers}
width = 8
downsample = {downsample}
batch_norm = true
bias = false
[auxiliary]
k = 2
width = 8
batch_norm = true
[schedule]
kind = "one-cycle"
epochs = {epochs}
batch = 64
lr = 0.1
keep = "{keep}"
precision = "float32"
[cache]
precision = "{precision}"
shard_mb = 1
block = 64
"""

DEFAULTS = {
    "flip": "true",
    "views": '"canvas"',
    "layers": 3,
    "downsample": "[1]",
    "epochs": 2,
    "keep": "last",
    "precision": "float16",
}


def tiny(**changes: object) -> str:
    """TOML of a tiny recipe."""
    return TINY.format(**{**DEFAULTS, **changes})


def open_run(place: Path, text: str, *, device: str = "cpu", compute: str = "float32") -> Session:
    """A session with x_0 written."""
    directory = place / "run"
    run = rundir.find(directory)
    if run is None:
        facts = {"compute": compute, "device": device, "machine": {}, "versions": {}}
        recipe = parse(text, "tiny", place)
        run = rundir.create(directory, "tiny", text, 0, None, facts, recipe)
    session = Session(run, Store(place / "store"), torch.device(device))
    ensure_images(session)
    return session


def stopped_after(session: Session, steps: int, work: Callable[[], object]) -> None:
    """Do some work of a session, which is stopped, as by Ctrl-C, once so many steps are taken."""
    real, taken = Solver.train_on, list[int]()

    def counted(solver: Any, *batch: Any) -> None:
        real(solver, *batch)
        taken.append(1)
        session.stop.asked = len(taken) == steps

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Solver, "train_on", counted)
        with pytest.raises(KeyboardInterrupt):
            work()


def curve(session: Session, j: int) -> list[tuple[float, ...]]:
    lines = (session.run.layer_directory(j) / "epochs.jsonl").read_text().splitlines()
    table = [json.loads(line) for line in lines]
    return [(t["train_loss"], t["train_top1"], t["test_top1"]) for t in table]


def here(*arguments: object) -> Result:
    """A command inside this process, where no second is lost to imports."""
    said = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if said.exception and not isinstance(said.exception, SystemExit):
        raise said.exception
    return Result(said.exit_code, said.stdout, said.stderr)


def inside(cwd: Path, *arguments: object) -> Result:
    """A command in a directory, as :func:`command.strata` runs it, but inside this process."""
    with contextlib.chdir(cwd):
        return here(*arguments)


@dataclass(frozen=True)
class Place:
    """A directory with a recipe, a run and a store, and the commands on them."""

    root: Path
    run_name: str = "run"
    seed: int = 0

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def run(self) -> Path:
        return self.root / self.run_name

    @property
    def options(self) -> tuple[object, ...]:
        """What every command that looks at the run is given."""
        recipe = self.root / "tiny.toml"
        return recipe, "--run", self.run, "--store", self.store, "--seed", self.seed

    def do(self, command: str, *arguments: object) -> Result:
        return here(command, *self.options, *arguments)

    def level(self, depth: int, name: str) -> Path:
        """The directory of the one level of that name."""
        (found,) = self.store.glob(f"x_{depth}-*/{name}")
        return found

    def overview(self) -> Overview:
        recipe = str(self.root / "tiny.toml")
        return overview.find(Options(recipe, self.run, self.store, seed=self.seed))

    def copy(self, root: Path) -> Place:
        shutil.copytree(self.root, root)
        return Place(root, self.run_name, self.seed)

    def files(self) -> dict[str, bytes]:
        """Every file of the levels and of what was read of the images, without what lies beside."""
        found = (p for p in self.store.rglob("*") if p.is_file())
        kept = {str(path.relative_to(self.store)): path for path in found}
        beside = ("quarantine/", "locks/", "runs/")
        return {n: p.read_bytes() for n, p in sorted(kept.items()) if not n.startswith(beside)}

    def weights(self) -> dict[str, bytes]:
        """The solved layers, by file."""
        found = sorted(self.run.glob("layer_*/*.safetensors"))
        return {str(path.relative_to(self.run)): path.read_bytes() for path in found}


def made(root: Path, layer: int, text: str) -> Place:
    """A place whose run has written x_1 … x_layer."""
    root.mkdir(exist_ok=True)
    (root / "tiny.toml").write_text(text)
    place = Place(root)
    assert place.do("materialize", "--layer", layer).rc == 0
    return place
