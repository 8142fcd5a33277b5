"""What does layer-wise compression (Sec. 4.3) cost on CIFAR-10 (JPEG), and what does it save?

Claim: removing half of the filters of every layer once it is solved, and fine-tuning what is left,
costs at most one point of test accuracy (last layer, mean over seeds, n = 3, paired) against the
same recipe without [compress]; and every level is as large as planned, about half.

Method: three ways for every seed, each a run of its own with a store of its own, one thread:
`compressed`, the recipe; `whole`, without [compress]; and `longer`, without it and with as many
epochs a layer as the compressed one has in all, fine-tuning included. The claim is about the first
two; the third says how much of what compression wins is only longer training. The baseline of each
pair has the same seed, so images, order and initial weights are the same. Intervals are 95 % of
Student's t over seeds. What is in the result file is not run again.

    STRATA_TEST_DATA=FOLDER python benchmarks/compression.py [--seeds 3] [--at-once 2]
        [--recipe cifar10-k3-compress-small] [--images N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from augmentation import interval
from cifar_images import archive, images
from measuring import ONE_THREAD, RESULTS, as_they_finish, keep, strata

import checkout  # noqa: F401
from strata.pipeline.recipe.builtin import load, text_of
from strata.pipeline.recipe.recipe import parse

WAYS = ("compressed", "whole", "longer")
MOST_POINTS = 1.0
"""That compression may cost."""


def recipe(place: Path, name: str, way: str) -> Path:
    """The recipe as a file; without its table [compress], where that is the way."""
    _, found = load(name)
    _, text, _ = text_of(name)
    assert found.compress is not None, f"{name} has no [compress]"
    if way != "compressed":
        text = re.sub(r"^\[compress\]\n[^\[]*", "", text, flags=re.MULTILINE)
    if way == "longer":
        total = found.schedule.epochs + found.compress.rounds * found.compress.epochs
        text = text.replace(f"epochs = {found.schedule.epochs}", f"epochs = {total}", 1)
    made = parse(text, way)
    assert (made.compress is None) == (way != "compressed"), way
    assert (made.schedule.epochs == found.schedule.epochs) == (way != "longer"), way
    path = place / f"{way}.toml"
    path.write_text(text, "utf-8")
    return path


def run(place: Path, name: str, source: str, way: str, seed: int) -> dict[str, Any]:
    """Test accuracies in percent, bytes of the levels that were read, and seconds of every step."""
    here = place / f"{way}-{seed}"
    here.mkdir()
    toml = recipe(here, name, way)
    store = ("--run", here / "run", "--store", here / "features", "--seed", seed)
    strata(Path(), "run", toml, *store, "--data", source, "--accept-data", environment=ONE_THREAD)
    planned = strata(Path(), "plan", toml, *store, environment=ONE_THREAD)  # for the images found
    report = json.loads((here / "run/report.json").read_text("utf-8"))
    layers = report["layers"]
    nbytes = [sum(level["bytes"] for level in layer["levels"]) for layer in layers[:-1]]
    found = {
        "layers": [round(100 * layer["test"]["top1"], 2) for layer in layers],
        "ensemble": round(100 * layers[-1]["ensemble"]["logits"]["top1"], 2),
        "bytes": nbytes,
        "as_planned": nbytes == [depth["bytes"] for depth in planned["depths"][1:-1]],
        "parameters": sum(layer["parameters"] for layer in layers),
        "seconds": round(report["seconds"], 1),
    }
    if way == "compressed":
        found["by_layer"] = [
            {k: round(100 * layer["compression"][k], 2) for k in ("solved", "removed", "tuned")}
            for layer in layers
        ]
    shutil.rmtree(here)
    return found


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the seeds that are through in every way."""
    seeds = sorted({name.split()[1] for name in runs}, key=int)
    seeds = [s for s in seeds if all(f"{way} {s}" in runs for way in WAYS)]
    if not seeds:
        return {}
    by_way = {way: [runs[f"{way} {s}"] for s in seeds] for way in WAYS}
    cost = {
        f"against {way}": interval(
            [
                a["layers"][-1] - b["layers"][-1]
                for a, b in zip(by_way["compressed"], by_way[way], strict=True)
            ]
        )
        for way in WAYS[1:]
    }
    less = [
        a / b
        for a, b in zip(by_way["compressed"][0]["bytes"], by_way["whole"][0]["bytes"], strict=True)
    ]
    return {
        "ways": {way: _way(found) for way, found in by_way.items()},
        "points": cost,
        "bytes_ratio": [round(ratio, 3) for ratio in less],
        "holds": {
            "accuracy": cost["against whole"]["mean"] >= -MOST_POINTS,
            "bytes": all(one["as_planned"] for found in by_way.values() for one in found),
        },
    }


def _way(runs: list[dict[str, Any]]) -> dict[str, Any]:
    columns = zip(*(one["layers"] for one in runs), strict=True)
    return {
        "layers": [interval(list(depth)) for depth in columns],
        "ensemble": interval([one["ensemble"] for one in runs]),
        "bytes": runs[0]["bytes"],
        "parameters": runs[0]["parameters"],
        "seconds": [one["seconds"] for one in runs],
    }


def table(found: dict[str, Any]) -> list[str]:
    """Rows of docs/compression.md."""
    rows = []
    for way in WAYS:
        one = found["ways"][way]
        cells = [f"{depth['mean']:.2f}" for depth in (*one["layers"], one["ensemble"])]
        megabytes = " + ".join(f"{nbytes / 1e6:,.0f}" for nbytes in one["bytes"])
        rows.append(f"| {way} | {' | '.join(cells)} | {megabytes} | {one['parameters']:,} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--recipe", default="cifar10-k3-compress-small")
    parser.add_argument("--images", type=int, help="of the training set; a fifth as many to test")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression.json")
    options = parser.parse_args()
    setting = {"recipe": options.recipe, "images": options.images}
    before = json.loads(options.out.read_text("utf-8")) if options.out.exists() else None
    if before and before["setting"] != setting:
        raise SystemExit(f"{options.out} has {before['setting']}: name another file with --out")
    runs = before["runs"] if before else {}
    todo = [(w, s) for s in range(options.seeds) for w in WAYS if f"{w} {s}" not in runs]
    with tempfile.TemporaryDirectory(prefix="compression-", dir=Path.cwd()) as scratch:
        place = Path(scratch)
        source = f"imagefolder:{archive()}"
        if options.images:
            source = f"npz:{images(place, options.images, options.images // 5)}"

        def one(case: tuple[str, int]) -> dict[str, Any]:
            return run(place, options.recipe, source, *case)

        for (way, seed), found in as_they_finish(one, todo, options.at_once):
            runs[f"{way} {seed}"] = found
            keep({"setting": setting, **summary(runs), "runs": runs}, options.out, show=False)
            print(way, seed, found, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
