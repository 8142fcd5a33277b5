"""Features in few bits: what they cost in accuracy, and what they save on disk.

Claim: `cifar10-small` trained from uint8 features comes within 0.3 points of float16 ones, mean of
the same seeds; packed with zstd, its features take at most 1/7 of float32 in uint8, and at most
1/14 in uint4.

Method: `cli.py run` for every seed and precision, those of a seed at the same moment with one
thread each, raw, all runs of a seed sharing images, initial weights, order and augmentation. Bytes
are those of the levels x_1 and x_2 (training canvases) of one seed, written again in the
profile zstd, every file of them counted: uint8 from the uint8 run, uint4 from the float16 run with
scales that are chosen as a run chooses them. The accuracy of uint4 is not measured here.

    python benchmarks/precision.py --data imagefolder:PATH/cifar10.tar.xz [--seeds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from feed_levels import write_level
from measuring import RESULTS, keep

from checkout import ROOT
from strata.pipeline.recipe.builtin import load
from strata.stages.features.calibrate import calibrate
from strata.store.feature_store import open_level
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey, geometry
from strata.store.level.level import Level
from strata.store.write.writer import LevelWriter

COMPARED = ("float16", "uint8")
POINTS = 0.3
AT_MOST = {"uint8": 1 / 7, "uint4": 1 / 14}
"""Bytes on disk over those of float32."""
SAMPLE, SHARD_BYTES = 4096, 64 << 20
Rows = Callable[[int, int], np.ndarray]


def start(place: Path, precision: str, seed: int, data: str) -> Any:
    """A run with one thread and a directory of its own; all share the features' store."""
    recipe = place / f"cifar10-small-{precision}.toml"
    text = (ROOT / "pipeline/recipe/builtin/cifar10-small.toml").read_text("utf-8")
    recipe.write_text(text.replace('precision = "float16"', f'precision = "{precision}"'), "utf-8")
    run = place / f"run-{precision}-{seed}"
    options = ["--run", str(run), "--store", str(place / "features"), "--seed", str(seed)]
    line = [sys.executable, str(ROOT / "cli.py"), "run", str(recipe), *options, "--data", data]
    log = (place / f"{run.name}.log").open("w", encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, stdout=log, stderr=log, env=environment)


def finish(process: Any) -> None:
    if status := process.wait():
        raise SystemExit(f"{process.args} ended with status {status}")


def one_seed(place: Path, seed: int, data: str) -> dict[str, Any]:
    """Test accuracies in percent of every layer, and of the ensemble of all, by precision."""
    for process in [start(place, p, seed, data) for p in COMPARED]:
        finish(process)
    found: dict[str, Any] = {"seed": seed}
    for precision in COMPARED:
        report = json.loads((place / f"run-{precision}-{seed}/report.json").read_text("utf-8"))
        layers = report["layers"]
        found[precision] = {
            "layers": [round(100 * layer["test"]["top1"], 2) for layer in layers],
            "ensemble": round(100 * layers[-1]["ensemble"]["probabilities"]["top1"], 2),
        }
    return found


def sizes(place: Path) -> dict[str, Any]:
    """By precision and level: bytes with zstd, over those of its values as float32."""
    found: dict[str, dict[str, Any]] = {"uint8": {}, "uint4": {}}
    for directory in sorted((place / "features").glob("x_[12]-*/train.*")):
        level = open_level(directory)
        name = f"x_{level.key.depth} {level.key.view}"
        if level.geometry.precision == "uint8":
            shape = dataclasses.replace(level.geometry, profile="zstd")
            found["uint8"][name] = share(place, level, shape, level.read)
        else:
            found["uint4"][name] = share(place, level, *coded(level))
    return found


def coded(level: Level) -> tuple[Geometry, Rows]:
    """A level's rows in uint4, by scales that are chosen as a run chooses them."""
    percentile = load("cifar10-small")[1].cache.percentile

    def values(begin: int, end: int) -> torch.Tensor:
        return torch.from_numpy(level.read(begin, end)).float()

    sample = (values(at, at + SAMPLE // 16) for at in range(0, SAMPLE, SAMPLE // 16))
    quantiser = calibrate(sample, "uint4", percentile).quantiser
    shape = geometry(len(level), level.geometry.sample, "uint4", SHARD_BYTES, "zstd")
    return shape, lambda begin, end: quantiser.encode(values(begin, end)).numpy()


def share(place: Path, level: Level, shape: Geometry, rows: Rows) -> float:
    lineage = [{"of": "a benchmark", "rows": shape.rows}]
    key = LevelKey(level.key.depth, fingerprint(lineage[0]), "train", level.key.view)
    packed = write_level(LevelWriter(place / "packed", key, shape, lineage), rows)
    found = on_disk(packed.directory) / (shape.rows * math.prod(shape.sample) * 4)
    shutil.rmtree(place / "packed")
    return round(found, 5)


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def clear(place: Path) -> None:
    """Keep the images, and nothing above them."""
    for directory in (place / "features").glob("x_[1-9]-*"):
        shutil.rmtree(directory)


def measure(place: Path, seeds: int, data: str) -> dict[str, Any]:
    """Takes up where it was stopped: runs do, and what is known of a seed is kept."""
    known = place / "known.json"
    found: dict[str, Any] = {"accuracy": []}
    if known.exists():
        found = json.loads(known.read_text("utf-8"))
    for seed in range(len(found["accuracy"]), seeds):
        found["accuracy"].append(one_seed(place, seed, data))
        if "sizes" not in found:
            found["sizes"] = sizes(place)
        known.write_text(json.dumps(found), "utf-8")
        print(json.dumps(found["accuracy"][-1]), file=sys.stderr, flush=True)
        clear(place)
    return result(found["accuracy"][:seeds], found["sizes"])


def result(accuracy: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    gaps = [a["uint8"]["layers"][-1] - a["float16"]["layers"][-1] for a in accuracy]
    ensemble = [a["uint8"]["ensemble"] - a["float16"]["ensemble"] for a in accuracy]
    shares = {precision: max(levels.values()) for precision, levels in found.items()}
    return {
        "accuracy": accuracy,
        "points_uint8_minus_float16": summary(gaps),
        "points_of_the_ensemble": summary(ensemble),
        "bytes_over_float32": found,
        "ratio_bytes_to_float32": shares,
        "holds": {
            "accuracy": abs(statistics.mean(gaps)) <= POINTS,
            **{precision: share <= AT_MOST[precision] for precision, share in shares.items()},
        },
    }


def summary(gaps: list[float]) -> dict[str, Any]:
    return {
        "of_each_seed": [round(gap, 2) for gap in gaps],
        "mean": round(statistics.mean(gaps), 3),
        "standard_error": round(statistics.stdev(gaps) / len(gaps) ** 0.5, 3),
    }


def workplace(kept: Path | None) -> Any:
    if kept is not None:
        return contextlib.nullcontext(kept)
    return tempfile.TemporaryDirectory(prefix="precision-", dir=Path.cwd())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="imagefolder:… of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--work", type=Path, help="keep runs here, and go on with those there")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with workplace(options.work) as place:
        found = measure(Path(place).absolute(), options.seeds, options.data)
    keep(found, options.out, show=True)


if __name__ == "__main__":
    main()
