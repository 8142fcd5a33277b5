"""The paper's CIFAR-10 networks at full width on a GPU: from caches, with fresh draws, end to end.

Claim: k = 1, 2, 3 trained from cached canvases (uint8) reach the accuracy of the same recipe with
fresh draws to within one point, last layer and ensemble.

Method: the images of CIFAR-10 (JPEG), all of them; `cli.py run RECIPE --device cuda` for every way,
`cli.py baseline` end to end. From canvases and fixed views, x_1 is computed for every batch (one
narrow convolution; reading it would take longer, and twice the disk), the levels above are written,
read, and removed when the next one is there. `--epochs` shortens a layer's 50, and the 15 between
two steps of the rate with them. Several of these may run at once, on one GPU and one `--out`: then
what they tell of seconds is of no use, and is left out with `--together`. A call stops after
`--minutes` and the next one goes on where it was, from the run directories in `--work`, until it
says that everything is done. `--device cpu --epochs 1 --images 512` tries the same lines without a
GPU.

`limits` has, layer by layer, what the card could do at most: operations of a step over the rate of
a large matrix product, or bytes of its input and output, each moved once forward and once backward,
over the rate of a large copy, both measured here; and the share of it that was reached.

    STRATA_TEST_DATA=FOLDER python benchmarks/gpu/train_gpu.py k1-canvas k1-fresh … [--minutes 8]
        [--epochs 50] [--seed 0] [--work DIR] [--together] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cifar_images import images
from measuring import RESULTS, keep

from checkout import ROOT
from strata.pipeline.plan.costs import operations
from strata.pipeline.recipe.builtin import load, text_of
from strata.pipeline.run import rundir
from strata.store.files.lock import hold

VIEWS = {"canvas": '"canvas"', "fresh": "0", "8-views": "8", "end-to-end": "0"}
NAMES = [f"k{k}-{way}" for k in (1, 2, 3) for way in VIEWS]
CHANGES = {"k1-end-to-end": {"lr": "0.01"}}
"""Five layers without batch norm diverge in the first epoch at a rate of 0.1."""
EPOCHS, EVERY = 50, 15
"""Of the recipes."""
TIMES = ("seconds", "images_per_s", "limits")
MOST_LAYERS = 5
ENDS = ("layers", "ensembles")
STOP_SECONDS = 40
"""What a step may take to stop at Ctrl-C, its checkpoint included."""
Line = list[str]


@dataclass(frozen=True)
class Setting:
    """How all experiments of a call are run."""

    work: Path
    device: str
    seed: int
    epochs: int
    data: str
    together: bool

    def key(self, name: str) -> str:
        return f"{name}, {self.epochs} epochs, seed {self.seed}"

    def run(self, name: str) -> Path:
        return self.work / f"run-{name}-{self.seed}"

    def features(self, name: str) -> Path:
        return self.work / f"features-{name}-{self.seed}"


def recipe(name: str, setting: Setting) -> Path:
    """The built-in recipe with another way to augment; codes of 8 bits where that is cached."""
    k, _, way = name.partition("-")
    _, text, _ = text_of(f"cifar10-{k}")
    changes = {"views": VIEWS[way], "epochs": str(setting.epochs)} | CHANGES.get(name, {})
    changes["every"] = str(max(1, round(setting.epochs * EVERY / EPOCHS)))
    if VIEWS[way] != "0":
        changes["precision"] = '"uint8"'
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value} ", text)
        assert count, key
    path = setting.work / f"{name}.toml"
    path.write_text(text, "utf-8")
    return path


def lines(name: str, setting: Setting) -> Iterator[Line]:
    """The commands of an experiment, each of which goes on where it was stopped."""
    made = recipe(name, setting)
    here = ["--run", str(setting.run(name)), "--store", str(setting.features(name))]
    here += ["--seed", str(setting.seed)]
    where = [*here, "--data", setting.data, "--accept-data", "--device", setting.device]
    if name.endswith("end-to-end"):
        yield ["baseline", str(made), *where]
        return
    layers = len(load(str(made))[1].layers)
    for j in range(2, layers if VIEWS[name.partition("-")[2]] != "0" else 2):
        yield ["materialize", str(made), *where, "--layer", str(j), "--cache", "never"]
        if j > 2:
            yield ["evict", str(made), *here, "--layer", str(j - 1)]
    yield ["run", str(made), *where, "--cache", "never"]


def go_on(name: str, setting: Setting, until: float) -> bool:
    """Run until it is done or the time is up; whether it is done."""
    for line in lines(name, setting):
        command = [sys.executable, str(ROOT / "cli.py"), *line]
        process = subprocess.Popen(command, stdout=sys.stderr)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_SECONDS)
            return False
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return True


def result(name: str, setting: Setting) -> dict[str, Any]:
    """What the run directory says."""
    found = {"epochs": setting.epochs, "seed": setting.seed}
    run = setting.run(name)
    if name.endswith("end-to-end"):
        existing = rundir.find(run)
        found |= of_baseline((existing and existing.baseline("plain")) or {})
    else:
        found |= of_run(json.loads((run / "report.json").read_text("utf-8")))
        found["limits"] = limits(name, setting, found["images_per_s"])
    return {k: v for k, v in found.items() if not (setting.together and k in TIMES)}


def limits(name: str, setting: Setting, images_per_s: list[int]) -> list[dict[str, Any]]:
    """By layer: multiply-adds and bytes of a training step on an image, the images a second that
    allow them, and the share of those that was reached."""
    _, made = load(str(recipe(name, setting)))
    device = torch.device(setting.device)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    product, copy = ceilings(device, compute)
    found = []
    for j, reached in enumerate(images_per_s, start=1):
        side = made.augment.crop
        values = sum(math.prod(made.shape(depth, side)) for depth in (j - 1, j))
        work = 3 * operations(made, made.problems[j - 1])
        fresh = VIEWS[name.partition("-")[2]] == "0"
        for i in range(j - 1) if fresh or j == 2 else ():  # computed for every batch
            work += made.layers[i].operations(made.shape(i, side if fresh else made.canvas))
        nbytes = 2 * values * compute.itemsize
        most = min(product / work, copy / nbytes)
        facts = {"multiply_adds": work, "bytes": nbytes, "images_per_s_at_most": round(most)}
        found.append(facts | {"share": round(reached / most, 3)})
    return found


@cache
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Multiply-adds a second of a large product, and bytes a second of a large copy, read and
    written: the best of some."""
    side, rounds = (8192, 10) if device.type == "cuda" else (512, 3)
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.empty_like(a)

    def rate(work: Callable[[], Any], amount: float) -> float:
        return max(amount / timed(work, device) for _ in range(rounds))

    product = rate(lambda: torch.mm(a, a, out=b), float(side) ** 3)
    return product, rate(lambda: b.copy_(a), 2.0 * a.nbytes)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def of_baseline(record: dict[str, Any]) -> dict[str, Any]:
    return {k: record[k] for k in ("test", "seconds", "images_per_s", "peak_tensor_bytes")}


def of_run(report: dict[str, Any]) -> dict[str, Any]:
    layers = report["layers"]
    return {
        "layers": [layer["test"] for layer in layers],
        "ensembles": [layer["ensemble"]["probabilities"] for layer in layers],
        "ensembles_of_logits": [layer["ensemble"]["logits"] for layer in layers],
        "seconds": report["seconds"],
        "images_per_s": [round(layer["samples_per_second"]) for layer in layers],
        "peak_memory_bytes": [layer["peak_memory_bytes"] for layer in layers],
    }


def keep_result(out: Path, key: str, found: dict[str, Any], device: str) -> None:
    """Beside what other processes may be keeping there."""
    with hold(out.with_suffix(".lock"), str(out), lambda _: None):
        runs = known(out) | {key: found}
        keep({"runs": dict(sorted(runs.items()))}, out, show=False, on=torch.device(device))


def known(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text("utf-8"))["runs"] if out.exists() else {}


# ---- what the runs say --------------------------------------------------------------------------


def table(runs: dict[str, Any]) -> list[str]:
    """The rows of docs/paper.md: test accuracies in percent, by layer, and of the ensemble."""
    rows = ((f"{key.split(',')[0]}, seed {run['seed']}", run) for key, run in runs.items())
    return [f"| {name} | {' | '.join(cells(run))} |" for name, run in rows]


def cells(run: dict[str, Any]) -> list[str]:
    if "test" in run:
        return [*[""] * (MOST_LAYERS + 1), percent(run["test"])]
    layers = [percent(layer) for layer in run["layers"]]
    return [*layers, *[""] * (MOST_LAYERS - len(layers)), percent(run["ensembles"][-1]), ""]


def percent(accuracies: dict[str, float]) -> str:
    return f"{100 * accuracies['top1']:.2f}"


def gaps(runs: dict[str, Any], epochs: int, seed: int) -> dict[str, list[float]]:
    """Points of canvas minus fresh draws, last layer and ensemble, where both were run."""
    found = {}
    for k in (1, 2, 3):
        keys = [f"k{k}-{way}, {epochs} epochs, seed {seed}" for way in ("canvas", "fresh")]
        if all(key in runs for key in keys):
            canvas, fresh = ([runs[key][what][-1]["top1"] for what in ENDS] for key in keys)
            found[f"k{k}"] = [round(100 * (c - f), 2) for c, f in zip(canvas, fresh, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--images", type=int, default=50_000, help="a fifth as many for testing")
    parser.add_argument("--work", type=Path, default=Path("train-gpu"))
    parser.add_argument("--together", action="store_true", help="others run at the same time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data = f"npz:{images(work, options.images, options.images // 5)}"
    setting = Setting(work, options.device, options.seed, options.epochs, data, options.together)
    tried = options.images < 50_000 or options.device == "cpu"
    out = options.out or (work if tried else RESULTS) / "train_gpu.json"
    for name in options.names:
        if setting.key(name) in known(out):
            continue
        if not go_on(name, setting, until):
            raise SystemExit(f"{name} goes on with the next call")
        keep_result(out, setting.key(name), result(name, setting), options.device)
        shutil.rmtree(setting.features(name))
    print(f"everything is done: {out}")


if __name__ == "__main__":
    main()
