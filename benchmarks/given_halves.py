"""A network trained on one half of the classes, and given to the other half: see given.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from cifar_images import images
from given_recipe import GIVEN, recipe, written
from measuring import seconds, strata

GIVEN_BLOCKS = 7
"""Of nine."""
RATES = 0.02, 0.03, 0.05, 0.08, 0.1
"""Learning rates of the five heads."""


def halves(place: Path, quick: bool) -> dict[str, Any]:
    """ResNet18: blocks 1 … 7 trained on five classes, given to the five others."""
    train, test, epochs, seeds = (200, 100, 2, 1) if quick else (5000, 1000, 5, 3)
    npz = images(place, train, test)
    facts = {"side": 64, "train": train // 2, "test": test // 2, "classes": 5, "views": 8}
    facts |= {"precision": "float16"}
    first, second = (half(npz, place / f"{name}.npz", name) for name in (0, 5))
    pretrain = place / "pretrain"
    pretrain.mkdir()
    more = {"images": first, "given": "", "epochs": 3 * epochs}
    trained = strata(pretrain, "baseline", recipe(pretrain, "torchvision:resnet18", **facts | more))
    (weights,) = pretrain.glob("runs/*/*/baseline/plain/weights.safetensors")
    more = {"images": second, "given": GIVEN.format(weights, GIVEN_BLOCKS), "epochs": epochs}
    path = recipe(place, "torchvision:resnet18", **facts | more)
    runs = [greedy(place, path, seed) for seed in range(seeds)]
    strata(place, "calibrate", path)
    planned = strata(place, "plan", path)["economics"]["reuse"]
    pairs = [[one_head(place, path, how, lr) for how in ("always", "never")] for lr in RATES]
    heads = dict(zip(("always", "never"), map(list, zip(*pairs, strict=True)), strict=True))
    writings = [written(place / f"run-always-{seed}", GIVEN_BLOCKS) for seed in range(seeds)]
    writing = statistics.median(writings)
    saved = statistics.median(never - always for always, never in pairs)
    gaps = [abs(one["always"] - one["never"]) for run in runs for one in run["top1"].values()]
    return {
        "images": {"train": train // 2, "test": test // 2},
        "pretrained_top1": trained["result"]["test"]["top1"],
        "runs": runs,
        "points": 100 * max(gaps),
        "write_seconds": writings,
        "head_seconds": heads,
        "five_heads": {"cache": writing + sum(heads["always"]), "again": sum(heads["never"])},
        "planned": planned,
        "heads": {"planned": planned["problems"], "measured": writing / saved},
        "off_by": planned["problems"] * saved / writing - 1,
    }


def half(npz: Path, path: Path, first: int) -> Path:
    """The images of five classes, from the ``first`` on."""
    found = {}
    with np.load(npz) as arrays:
        for split in ("train", "test"):
            y = arrays[f"y_{split}"]
            chosen = (y >= first) & (y < first + 5)
            found |= {f"x_{split}": arrays[f"x_{split}"][chosen], f"y_{split}": y[chosen] - first}
    np.savez(path, **found)
    return path


def own(cache: str, seed: int) -> list[Any]:
    """A run and a store of its own."""
    return ["--run", f"run-{cache}-{seed}", "--store", f"store-{cache}", "--seed", seed]


def greedy(place: Path, path: Path, seed: int) -> dict[str, Any]:
    """A linear probe of what is given, and two further layers; from the cache and without."""
    found: dict[str, Any] = {"top1": {f"x_{j}": {} for j in (8, 9)}}
    for cache in ("always", "never"):
        strata(place, "run", path, "--cache", cache, *own(cache, seed))
        layers = strata(place, "evaluate", path, *own(cache, seed))["layers"]
        for one in layers:
            found["top1"][f"x_{one['layer']}"][cache] = one["test"]["top1"]
    probed = strata(place, "probe", path, "--layer", GIVEN_BLOCKS, *own("always", seed))
    found["probe_top1"] = probed["probes"][-1]["test"]["top1"]
    return found


def one_head(place: Path, path: Path, cache: str, lr: float) -> float:
    """Seconds of layer 8 and its classifier at another learning rate: of the whole process, since
    what it reads, or computes again, to test and to choose the best epoch counts as well."""
    words = "sweep", path, "--layer", GIVEN_BLOCKS + 1, "--vary", f"schedule.lr={lr}"
    return seconds(lambda: strata(place, *words, "--cache", cache, *own(cache, 0)))
