"""Features in few bits: what they cost in accuracy, and what they save on disk.

Claim: `cifar10-small` trained from uint8 features comes within 0.3 points of float16 ones, mean of
the same seeds; packed with zstd, its features take at most 1/7 of float32 in uint8, and at most
1/14 in uint4.

Method: `cli.py run` for every seed and precision, those of a seed at the same moment with one
thread each, raw, all runs of a seed sharing images, initial weights, order and augmentation. Bytes
are those of the levels x_1 and x_2 (training canvases) of one seed, written again in the profile
zstd, every file of them counted. uint4 is materialised, for its bytes, and not compared.

    python benchmarks/precision.py --data imagefolder:PATH/cifar10.tar.xz [--seeds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import RESULTS, keep

from store.fingerprint import fingerprint
from store.layout import LevelKey
from store.level import Level
from store.opening import open_level
from store.writer import LevelWriter

ROOT = Path(__file__).resolve().parent.parent
COMPARED = ("float16", "uint8")
POINTS = 0.3
AT_MOST = {"uint8": 1 / 7, "uint4": 1 / 14}
"""Bytes on disk over those of float32."""


def start(
    place: Path, precision: str, seed: int, command: list[str], data: str, threads: int
) -> Any:
    """A process with a run directory of its own; all share the features' store."""
    recipe = place / f"cifar10-small-{precision}.toml"
    text = (ROOT / "pipeline/recipes/cifar10-small.toml").read_text("utf-8")
    recipe.write_text(text.replace('precision = "float16"', f'precision = "{precision}"'), "utf-8")
    run = place / f"run-{precision}-{seed}"
    options = ["--run", str(run), "--store", str(place / "features"), "--seed", str(seed)]
    line = [sys.executable, str(ROOT / "cli.py"), *command, str(recipe), *options, "--data", data]
    log = (place / f"{run.name}.log").open("w", encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(line, stdout=log, stderr=log, env=environment)


def finish(process: Any) -> None:
    if status := process.wait():
        raise SystemExit(f"{process.args} ended with status {status}")


def one_seed(place: Path, seed: int, data: str) -> dict[str, Any]:
    """Test accuracies in percent of every layer, and of the ensemble of all, by precision."""
    for process in [start(place, p, seed, ["run"], data, 1) for p in COMPARED]:
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


def levels(place: Path) -> list[Level]:
    """The training levels above x_0."""
    found = sorted((place / "features").glob("x_[12]-*/train.*"))
    return [open_level(directory) for directory in found]


def packed_bytes(place: Path) -> dict[str, Any]:
    """Bytes of every level: raw, and with zstd, over those of its values as float32."""
    found = {}
    for level in levels(place):
        shape = dataclasses.replace(level.geometry, profile="zstd")
        lineage = [{"of": "a benchmark", "rows": level.geometry.rows}]
        key = LevelKey(level.key.depth, fingerprint(lineage[0]), "train", level.key.view)
        writer = LevelWriter(place / "packed", key, shape, lineage)
        with writer.locked():
            ranges = {shard: shape.shard_range(shard) for shard in writer.missing()}
            writer.fill((shard, level.read(*ends)) for shard, ends in ranges.items())
            packed = writer.commit(None)
        float32 = shape.rows * shape.sample[0] * shape.sample[1] * shape.sample[2] * 4
        found[f"x_{level.key.depth} {level.key.view}"] = {
            "float32_bytes": float32,
            "raw": round(on_disk(level.directory) / float32, 5),
            "zstd": round(on_disk(packed.directory) / float32, 5),
        }
    shutil.rmtree(place / "packed")
    return found


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def clear(place: Path) -> None:
    """Keep the images, and nothing above them."""
    for directory in (place / "features").glob("x_[1-9]-*"):
        shutil.rmtree(directory)


def bytes_of(place: Path, precision: str, data: str) -> dict[str, Any]:
    clear(place)
    finish(start(place, precision, 0, ["materialize", "--layer", "2"], data, 2))
    return packed_bytes(place)


def measure(place: Path, seeds: int, data: str) -> dict[str, Any]:
    accuracy = []
    for seed in range(seeds):
        accuracy.append(one_seed(place, seed, data))
        print(json.dumps(accuracy[-1]), file=sys.stderr, flush=True)
        clear(place)
    sizes = {precision: bytes_of(place, precision, data) for precision in ("uint8", "uint4")}
    gaps = [a["uint8"]["layers"][-1] - a["float16"]["layers"][-1] for a in accuracy]
    ensemble = [a["uint8"]["ensemble"] - a["float16"]["ensemble"] for a in accuracy]
    shares = {p: max(level["zstd"] for level in sizes[p].values()) for p in sizes}
    return {
        "accuracy": accuracy,
        "points_uint8_minus_float16": summary(gaps),
        "points_of_the_ensemble": summary(ensemble),
        "bytes_over_float32": sizes,
        "ratio_bytes_to_float32": shares,
        "holds": {
            "accuracy": abs(statistics.mean(gaps)) <= POINTS,
            **{precision: shares[precision] <= AT_MOST[precision] for precision in shares},
        },
    }


def summary(gaps: list[float]) -> dict[str, Any]:
    return {
        "of_each_seed": [round(gap, 2) for gap in gaps],
        "mean": round(statistics.mean(gaps), 3),
        "standard_error": round(statistics.stdev(gaps) / len(gaps) ** 0.5, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="imagefolder:… of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="precision-", dir=Path.cwd()) as place:
        result = measure(Path(place), options.seeds, options.data)
    keep(result, options.out, show=True)


if __name__ == "__main__":
    main()
