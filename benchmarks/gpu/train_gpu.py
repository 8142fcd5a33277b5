"""The paper's CIFAR-10 networks at full width on a GPU: from caches, with fresh draws, end to end.

Claim: k = 1, 2, 3 trained from cached canvases (uint8, held on the device) reach the accuracy of
the same recipe with fresh draws to within one point, last layer and ensemble.

Method: `cli.py run RECIPE --device cuda --tier device` for each way; `end-to-end` is `cli.py
baseline`. Images are those of the tar of CIFAR-10 (JPEG) in STRATA_TEST_DATA. A call stops after
`--minutes` and the next one goes on where it was, from the run directories in `--work`, until it
says that everything is done. `seconds` add up what steps took, whatever the number of calls.
`--device cpu --epochs 1 --images 512` tries the same lines without a GPU.

    STRATA_TEST_DATA=FOLDER python benchmarks/gpu/train_gpu.py k1-canvas k1-fresh … [--minutes 8]
        [--seed 0] [--work DIR] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from cifar_images import images  # noqa: E402
from measuring import RESULTS, keep  # noqa: E402

VIEWS = {"canvas": '"canvas"', "fresh": "0", "8-views": "8", "end-to-end": "0"}
NAMES = [f"k{k}-{way}" for k in (1, 2, 3) for way in VIEWS]
STOP_SECONDS = 40
"""What a step may take to stop at Ctrl-C, its checkpoint included."""


@dataclass(frozen=True)
class Setting:
    """How all experiments of a call are run."""

    work: Path
    device: str
    seed: int
    epochs: int | None
    """Instead of the recipe's; for trying it out."""
    data: str


def recipe(name: str, setting: Setting) -> Path:
    """The built-in recipe with another way to augment; codes of 8 bits where that is cached."""
    k, _, way = name.partition("-")
    text = (ROOT / f"pipeline/recipes/cifar10-{k}.toml").read_text("utf-8")
    changes = {"views": VIEWS[way]}
    if VIEWS[way] != "0":
        changes["precision"] = '"uint8"'
    if setting.epochs is not None:
        changes["epochs"] = str(setting.epochs)
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value} ", text)
        assert count, key
    path = setting.work / f"{name}.toml"
    path.write_text(text, "utf-8")
    return path


def go_on(name: str, setting: Setting, until: float) -> dict[str, Any] | None:
    """Run until it is done or the time is up; the result, None where the time was up."""
    verb = "baseline" if name.endswith("end-to-end") else "run"
    run = setting.work / f"run-{name}-{setting.seed}"
    made = recipe(name, setting)
    line = [sys.executable, str(ROOT / "cli.py"), verb, str(made), "--run", str(run)]
    line += ["--store", str(setting.work / f"features-{name}"), "--seed", str(setting.seed)]
    line += ["--device", setting.device, "--data", setting.data]
    line += ["--tier", "device"] if setting.device == "cuda" and verb == "run" else []
    process = subprocess.Popen(line, stdout=sys.stderr)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.5)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_SECONDS)
        return None
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} ended with status {process.returncode}")
    shown = subprocess.run([*line, "--json"], capture_output=True, check=True)
    if verb == "baseline":
        return of_baseline(json.loads(shown.stdout)["result"])
    return of_run(json.loads((run / "report.json").read_text("utf-8")))


def of_baseline(record: dict[str, Any]) -> dict[str, Any]:
    return {k: record[k] for k in ("test", "seconds", "images_per_s", "peak_tensor_bytes")}


def of_run(report: dict[str, Any]) -> dict[str, Any]:
    layers = report["layers"]
    return {
        "layers": [layer["test"] for layer in layers],
        "ensembles": [layer["ensemble"]["probabilities"] for layer in layers],
        "seconds": report["seconds"],
        "images_per_s": [round(layer["samples_per_second"]) for layer in layers],
        "peak_memory_bytes": [layer["peak_memory_bytes"] for layer in layers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int, help="so many only, a fifth as many for testing")
    parser.add_argument("--work", type=Path, default=Path("train-gpu"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    tar = Path(os.environ["STRATA_TEST_DATA"]).absolute() / "cifar10-jpeg.tar.xz"
    data = f"imagefolder:{tar}"
    if options.images:
        data = f"npz:{images(work, options.images, options.images // 5)}"
    setting = Setting(work, options.device, options.seed, options.epochs, data)
    tried = options.images or options.epochs or options.device == "cpu"
    out = options.out or (work if tried else RESULTS) / "train_gpu.json"
    for name in options.names:
        found = json.loads(out.read_text("utf-8"))["runs"] if out.exists() else {}
        if f"{name} {options.seed}" in found:
            continue
        result = go_on(name, setting, until)
        if result is None:
            raise SystemExit(f"{name} goes on with the next call")
        keep_result(out, {**found, f"{name} {options.seed}": result}, options.device)
    print(f"everything is done: {out}")


def keep_result(out: Path, runs: dict[str, Any], device: str) -> None:
    import torch

    keep({"runs": runs}, out, show=False, on=torch.device(device))


if __name__ == "__main__":
    main()
