"""Greedy training from cached features against fresh augmentation, on all of CIFAR-10.

Claim: `cifar10-small` (three layers, k = 2) trained from cached canvases reaches an ensemble test
accuracy of at least 74 % in under 25 minutes on two CPU cores, each layer better than the one
before; and stays close to the same recipe with fresh draws in every epoch.

Method: one process per mode, `cli.py run`, in an empty directory, one after the other, on the same
images; wall time and peak memory are the whole process's, reading the images included; peak memory
counts mapped pages of the levels, which the kernel can take back. n = 1 seed per mode (--seed).
The machine, versions and every accuracy are in the result file.

    python benchmarks/cifar_small.py --data imagefolder:PATH/cifar10-jpeg.tar.xz
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checkout import ROOT

RECIPES = {
    "canvas": "cifar10-small",
    "fresh": str(ROOT / "benchmarks" / "cifar10-small-fresh.toml"),
}


def run(recipe: str, data: str, seed: int, place: Path) -> dict[str, Any]:
    """One run in an empty directory; what it cost and what it reached."""
    options = ["--data", data, "--seed", str(seed), "--run", "run", "--store", "features"]
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "run", recipe, *options], cwd=place
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{recipe} ended with status {status}")
    seconds = time.monotonic() - begun
    report = json.loads((place / "run" / "report.json").read_text("utf-8"))
    return {
        "wall_seconds": round(seconds, 1),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "load_averages_at_the_end": list(os.getloadavg()),
        **summary(report),
    }


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What a table needs of a report."""
    keys = ("name", "mode", "seed", "created", "device", "compute", "machine", "versions")
    layers = [
        {
            "layer": layer["layer"],
            "test_top1": layer["test"]["top1"],
            "ensemble_top1": layer["ensemble"]["probabilities"]["top1"],
            "ensemble_logits_top1": layer["ensemble"]["logits"]["top1"],
            "train_loss": layer["train"]["loss"],
            "solve_seconds": round(layer["solve_seconds"], 1),
            "images_per_second": round(layer["samples_per_second"], 1),
            "write_seconds": round(sum(level["seconds"] or 0 for level in layer["levels"]), 1),
            "bytes": sum(level["bytes"] for level in layer["levels"]),
            "epochs": layer["epochs"],
        }
        for layer in report["layers"]
    ]
    return {key: report[key] for key in keys} | {
        "data": {k: report["data"][k] for k in ("source", "digest", "train", "test")},
        "recipe": report["recipe"],
        "layers": layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="imagefolder:… of CIFAR-10")
    parser.add_argument("--mode", choices=list(RECIPES), action="append", help="default: both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    for mode in options.mode or list(RECIPES):
        with tempfile.TemporaryDirectory(prefix="cifar-small-") as place:
            result = run(RECIPES[mode], options.data, options.seed, Path(place))
        path = options.out / f"cifar10-small-{mode}-seed{options.seed}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        last = result["layers"][-1]
        print(
            f"{mode}: layer 3 {100 * last['test_top1']:.2f} %, ensemble "
            f"{100 * last['ensemble_top1']:.2f} %, {result['wall_seconds'] / 60:.1f} min -> {path}"
        )


if __name__ == "__main__":
    main()
