"""Does a cache cost accuracy? Ways to augment from one, against fresh draws in every epoch.

Claim: on a small network, training from cached canvases in uint8 comes within 0.5 points of fresh
draws (last layer, mean of the same seeds), at no more than 3.2 times the bytes of one view.

Method: `cli.py run` for every way, precision and seed, one thread each, on the first 4,000 training
and 5,000 test images of CIFAR-10 (JPEG); three layers of 24, 48 and 48 channels, k = 2, 8 epochs
each. Runs of a seed share initial weights and the order of images. A gap is paired: a way minus
fresh of the same seed, with the 95 % interval of Student's t over the seeds. Fresh draws cache
nothing; every layer's output is rounded to float16 then. Bytes are those of the training levels of
one image, summed over x_1 and x_2. Three ways differ from another in their draws alone:
`-alternated` mirrors a sample in every other epoch, `4-random` draws the flip of every view, and
`fresh-stride-4` has the offsets only that a canvas has at x_2. Networks from canvases are tested a
second time, exported, on crops of the test images, without the canvas around them (`crops`). What
is in the result file is not run again.

    STRATA_TEST_DATA=FOLDER python benchmarks/augmentation.py [--seeds 5] [--only WAY]
        [--at-once 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar_images import images
from measuring import ONE_THREAD, RESULTS, as_they_finish, keep, strata
from scipy.stats import t as student

from checkout import ROOT
from strata.pipeline.feed.features import frozen_layer
from strata.pipeline.results.exported import ExportedNetwork
from strata.pipeline.run import rundir

TRAIN, TEST = 4_000, 5_000
NETWORK = {"width": "24", "epochs": "8", "test_every": "0"}
WAYS: dict[str, dict[str, str]] = {
    "fresh": {"views": "0"},
    "fresh-alternated": {"views": "0", "flips": '"alternated"'},
    "fresh-stride-4": {"views": "0", "stride": "4"},
    "1": {"views": "1"},
    "2": {"views": "2"},
    "4": {"views": "4"},
    "4-random": {"views": "4", "flips": '"random"'},
    "8": {"views": "8"},
    "canvas": {"views": '"canvas"'},
    "canvas-alternated": {"views": '"canvas"', "flips": '"alternated"'},
}
"""Keys of [augment]."""
PRECISIONS = ("uint8", "uint4", "float16")
MORE = 'allow_single_view = true\nflips = "auto"\nstride = 1'
ONCE = ("fresh-alternated", "fresh-stride-4", "4-random", "canvas-alternated")
"""In the first precision alone."""
FRESH = "float16"
POINTS, TIMES_ONE_VIEW = 0.5, 3.2


@dataclass(frozen=True)
class Case:
    """One run."""

    way: str
    """``fresh``, ``canvas``, or a number of fixed views."""
    precision: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.way} {self.precision} {self.seed}"


def cases(seeds: int, only: str | None) -> list[Case]:
    """Seed by seed within a precision, so that whatever has been run so far can be compared."""
    fresh = [way for way in WAYS if way.startswith("fresh")]
    found = [Case(way, FRESH, seed) for seed in range(seeds) for way in fresh]
    for precision in PRECISIONS:
        ways = [w for w in WAYS if w not in fresh and (w not in ONCE or precision == PRECISIONS[0])]
        found += [Case(way, precision, seed) for seed in range(seeds) for way in ways]
    return [case for case in found if only in (None, case.way)]


def recipe(place: Path, case: Case) -> Path:
    """cifar10-small, smaller, with another way to augment."""
    changes = NETWORK | WAYS[case.way] | {"precision": f'"{case.precision}"'}
    text = (ROOT / "pipeline/recipe/builtin/cifar10-small.toml").read_text("utf-8")
    text = text.replace("flip = true", "flip = true\n" + MORE)
    text = text.replace("epochs = 5", "epochs = 5\ntest_every = 1")
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value} ", text)
        assert count, key
    path = place / f"{case.way}-{case.precision}.toml"
    path.write_text(text, "utf-8")
    return path


def run(place: Path, data: Path, case: Case) -> dict[str, Any]:
    """In a store of its own, removed when the accuracies and bytes are known."""
    here = place / case.name.replace(" ", "-")
    here.mkdir()
    made = recipe(here, case)
    where = ("--seed", case.seed, "--run", "run", "--store", "features")
    strata(
        here, "run", made, *where, "--data", f"npz:{data}", "--accept-data", environment=ONE_THREAD
    )
    found = known(json.loads((here / "run/report.json").read_text("utf-8")))
    if case.way.startswith("canvas"):
        found["crops"] = on_crops(here / "run", data)
    shutil.rmtree(here)
    return found


@torch.no_grad()
def on_crops(directory: Path, data: Path) -> float:
    """Test accuracy in percent of a network whose layers see no canvas: the images as they are."""
    found = rundir.find(directory)
    assert found is not None
    cpu = torch.device("cpu")
    layers = [frozen_layer(found, j, cpu) for j in range(1, found.layers + 1)]
    network = ExportedNetwork(found, layers)
    plain = replace(found.recipe.augment, pad=0)
    network.recipe, network.canvas = replace(found.recipe, augment=plain), False
    with np.load(data) as arrays:
        x, y = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    parts = zip(x.permute(0, 3, 1, 2).split(500), y.split(500), strict=True)
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in parts)
    return round(100 * right / len(y), 2)


def known(report: dict[str, Any]) -> dict[str, Any]:
    layers = report["layers"]
    levels = [level for layer in layers for level in layer["levels"]]
    trained = [level["bytes"] for level in levels if level["level"].startswith("train")]
    return {
        "layers": [round(100 * layer["test"]["top1"], 2) for layer in layers],
        "ensemble": round(100 * layers[-1]["ensemble"]["probabilities"]["top1"], 2),
        "bytes_per_image": round(sum(trained) / TRAIN),
    }


# ---- what the runs say --------------------------------------------------------------------------


def interval(values: list[float]) -> dict[str, Any]:
    """Mean, and half the width of its 95 % interval; none from one seed."""
    n = len(values)
    half = None
    if n > 1:
        half = round(student.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5, 2)
    return {"mean": round(statistics.mean(values), 2), "plus_minus": half, "n": n}


def summary(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per way and precision: accuracies by depth, and the gap to fresh at the last layer."""
    found = []
    for way in WAYS:
        for precision in PRECISIONS:
            seeds = sorted(int(n.split()[2]) for n in runs if n.startswith(f"{way} {precision} "))
            if seeds:
                found.append(row(runs, way, precision, seeds))
    return found


def row(runs: dict[str, Any], way: str, precision: str, seeds: list[int]) -> dict[str, Any]:
    mine = [runs[f"{way} {precision} {seed}"] for seed in seeds]
    paired = [
        (runs[f"{way} {precision} {seed}"]["layers"][-1], fresh["layers"][-1])
        for seed in seeds
        if (fresh := runs.get(f"fresh {FRESH} {seed}"))
    ]
    depths = zip(*(m["layers"] for m in mine), strict=True)
    gaps = [ours - fresh for ours, fresh in paired]
    crops = [m["crops"] - m["layers"][-1] for m in mine if "crops" in m]
    return {
        "way": way,
        "precision": precision,
        "layers": [interval(list(depth)) for depth in depths],
        "ensemble": interval([m["ensemble"] for m in mine]),
        "minus_fresh": interval(gaps) if gaps and way != "fresh" else None,
        "bytes_per_image": mine[0]["bytes_per_image"],
    } | ({"crops_minus_canvas": interval(crops)} if crops else {})


def holds(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """The claim, once there are runs to judge it by."""
    found = {(r["way"], r["precision"]): r for r in rows}
    canvas, one = found.get(("canvas", "uint8")), found.get(("1", "uint8"))
    if not (canvas and one and canvas["minus_fresh"]):
        return {}
    return {
        "accuracy": canvas["minus_fresh"]["mean"] >= -POINTS,
        "bytes": canvas["bytes_per_image"] <= TIMES_ONE_VIEW * one["bytes_per_image"],
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of docs/augmentation.md."""
    return [
        f"| {r['way']} | {r['precision']} | {' | '.join(map(text, r['layers'][1:]))} | "
        f"{text(r['ensemble'])} | {text(r['minus_fresh'])} | {r['bytes_per_image'] / 1e3:.1f} kB |"
        for r in rows
        if r["layers"][0]["n"] > 1
    ]


def text(one: dict[str, Any] | None) -> str:
    return "" if one is None else f"{one['mean']:.1f} ± {one['plus_minus']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "augmentation.json")
    options = parser.parse_args()
    runs = json.loads(options.out.read_text("utf-8"))["runs"] if options.out.exists() else {}
    todo = [case for case in cases(options.seeds, options.only) if case.name not in runs]
    with tempfile.TemporaryDirectory(prefix="augmentation-") as scratch:
        place = Path(scratch)
        data = images(place, TRAIN, TEST)
        for case, found in as_they_finish(lambda c: run(place, data, c), todo, options.at_once):
            runs[case.name] = found
            keep_all(runs, options.out)


def keep_all(runs: dict[str, Any], out: Path) -> None:
    rows = summary(runs)
    found = {"train": TRAIN, "test": TEST, "ways": rows, "holds": holds(rows)}
    keep({**found, "runs": runs}, out, show=False)
    print(f"{len(runs)} runs in {out}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
