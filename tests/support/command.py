"""The command line as its users meet it: a process, in a directory of its own, on the CPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from root import CLI

TIMEOUT = 300
"""Seconds until a command counts as hung; on a busy machine some take two minutes."""

TINY: dict[str, Any] = {
    "data.source": "digits",
    "data.classes": 10,
    "data.channels": 1,
    "data.size": 8,
    "data.mean": [0.306],
    "data.std": [0.376],
    "data.train": 1437,
    "data.test": 360,
    "augment.pad": 2,
    "augment.crop": 8,
    "augment.views": "canvas",
    "network.layers": 3,
    "network.width": 8,
    "network.downsample": [1],
    "network.batch_norm": True,
    "network.bias": False,
    "auxiliary.k": 2,
    "auxiliary.width": 8,
    "auxiliary.batch_norm": True,
    "auxiliary.bias": False,
    "schedule.kind": "one-cycle",
    "schedule.epochs": 2,
    "schedule.batch": 64,
    "schedule.lr": 0.1,
    "schedule.precision": "float32",
    "cache.precision": "float32",
    "cache.shard_mb": 1,
}
"""Three layers on the digits, a few tenths of a second each."""


PETS: dict[str, Any] = {
    "data__source": "imagefolder:pets",
    "data__classes": 2,
    "data__channels": 3,
    "data__size": 12,
    "data__mean": [0.5] * 3,
    "data__std": [0.25] * 3,
    "data__train": 8,
    "data__test": 4,
    "augment__crop": 12,
    "augment__pad": 0,
    "network__layers": 1,
    "network__downsample": [],
    "schedule__epochs": 1,
    "schedule__batch": 4,
}
"""Changes for :func:`recipe`: one layer on small drawn images in class folders."""


def recipe(folder: Path, name: str = "tiny", **changes: Any) -> str:
    """Write TINY with changes (``schedule__epochs=3``) as NAME.toml; returns the file's name."""
    values = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    tables: dict[str, list[str]] = {}
    for path, value in values.items():
        table, key = path.split(".")
        tables.setdefault(table, []).append(f"{key} = {json.dumps(value)}")
    text = "\n".join(f"[{table}]\n" + "\n".join(lines) for table, lines in tables.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text + "\n")
    return f"{name}.toml"


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pets(folder: Path) -> Path:
    """Class folders of cats and dogs: four of each to train on, two to test with."""
    for number, (split, kind) in enumerate(itertools.product(("train", "test"), ("cat", "dog"))):
        (folder / split / kind).mkdir(parents=True)
        for i in range(4 if split == "train" else 2):
            image = Image.fromarray(noise(10 * number + i, 12, 12, 3))
            image.save(folder / split / kind / f"{i}.{'png' if i % 2 else 'JPG'}")
    return folder


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    rc: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.rc == 0, f"exit code {self.rc}: {self.err}"
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error, which must be the only one."""
        lines = [line for line in self.err.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        assert "Traceback" not in self.err
        return lines[0]


def environment() -> dict[str, str]:
    """One thread and no GPU, so that bytes can be compared; a warning is an error there too."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"}
    return {**os.environ, **fixed}


def start(cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    """The command under way; its stderr is a pipe."""
    return subprocess.Popen(
        [sys.executable, str(CLI), *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def strata(cwd: Path, *arguments: object) -> Result:
    """Run the command to its end. Raises TimeoutExpired if that takes too long."""
    with start(cwd, *arguments) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    return Result(process.returncode, out, err)


def shards(store: Path, pattern: str = "x_*") -> dict[str, bytes]:
    """Every shard file of the levels whose directories match: path → bytes."""
    found = sorted(store.glob(f"{pattern}/*/x/c.*"))
    return {str(path.relative_to(store)): path.read_bytes() for path in found}


def depths(store: Path) -> list[str]:
    """``["x_0", "x_1"]``: the depths a store holds, one entry for each lineage."""
    return sorted(path.name.split("-")[0] for path in store.glob("x_*"))
