"""How separable is x_j at each depth, of networks solved layer by layer and end to end? (Figure 3)

Claim: as in the paper's Sec. 4.2, what a linear classifier gets out of x_j of a network of k = 1
rises from layer to layer; with k = 2 and 3 the last layers are better inputs to a CNN with two
hidden layers than those of k = 1.

Method: the form of the paper's study, five layers without downsampling, a quarter of its smallest
width (M = 16 for 64, M~ = 64 for 256), behind a stem that halves the images; k = 1 without batch
norm, k = 2 and 3 with, as the recipes have it. Every seed anew: `cli.py run` on the first 10,000
training images of CIFAR-10 (JPEG), 5 epochs a layer, one thread; then `cli.py probe` of every
depth, linear and CNN-2. The same of `cli.py baseline`, with batch norm, for 15 epochs. Test
accuracy on 5,000 images; intervals are 95 % of Student's t over the seeds. What is in the result
file is not run again.

    STRATA_TEST_DATA=FOLDER python benchmarks/separability.py [--seeds 3] [--at-once 2] [--out FILE]
        [--figure FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from augmentation import interval, text
from cifar_images import images
from measuring import ONE_THREAD, RESULTS, as_they_finish, keep, strata

from checkout import ROOT
from strata.pipeline.recipe.builtin import text_of
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.results.figures import draw
from strata.pipeline.results.separability import probes

TRAIN, TEST = 10_000, 5_000
HIDDEN, LAYERS = 64, 5
"""M~, and J."""
WHOLE = "end to end"
NETWORKS = ("k = 1", "k = 2", "k = 3", WHOLE)
EPOCHS = {WHOLE: 15}
"""Of a layer 5, otherwise."""
KINDS = {"linear": ("linear",), "cnn-2": ("cnn", "--p", 2)}
FIGURE = ROOT / "docs/separability.svg"
Case = tuple[str, int]
"""Network and seed."""


def recipe(place: Path, network: str) -> Path:
    """separability-small with other epochs, k and batch norm."""
    _, content, _ = text_of("separability-small")
    k = 1 if network == WHOLE else int(network[-1])
    content = content.replace("epochs = 3", f"epochs = {EPOCHS.get(network, 5)}")
    if network != "k = 1":
        content = content.replace("batch_norm = false", "batch_norm = true")
    hidden = "" if k == 1 else f"width = {HIDDEN}\nbias = true\n"
    content = re.sub(r"(?m)^k = 1\n", f"k = {k}\n{hidden}", content)
    made = parse(content, network)
    assert (len(made.layers), made.auxiliary.k) == (LAYERS, k)
    path = place / "recipe.toml"
    path.write_text(content, "utf-8")
    return path


def run(place: Path, data: Path, case: Case) -> dict[str, Any]:
    """Test accuracies in percent: by the network's own classifiers, and by probes."""
    network, seed = case
    here = place / f"{network}-{seed}".replace(" ", "")
    here.mkdir()
    made = recipe(here, network)
    line = [made, "--run", here / "run", "--store", here / "features", "--seed", seed]
    line += ["--data", f"npz:{data}", "--accept-data"]
    if network == WHOLE:
        answer = strata(Path(), "baseline", *line, environment=ONE_THREAD)
        own = [answer["result"]["test"]["top1"]]
    else:
        strata(Path(), "run", *line, environment=ONE_THREAD)
        report = json.loads((here / "run/report.json").read_text("utf-8"))
        own = [layer["test"]["top1"] for layer in report["layers"]]
    found = {"own": [round(100 * each, 2) for each in own]}
    of = ("--of", "baseline") if network == WHOLE else ()
    for kind, options in KINDS.items():
        probed = strata(Path(), "probe", *line, *of, "--kind", *options, environment=ONE_THREAD)
        mine = [probe for probe in probed["probes"] if probe["kind"] == kind]
        found[kind] = [round(100 * probe["test"]["top1"], 2) for probe in mine]
        assert len(mine) == LAYERS, probed
    shutil.rmtree(here)
    return found


# ---- what the runs say --------------------------------------------------------------------------


def by_depth(runs: dict[str, Any], network: str, kind: str) -> list[tuple[float, ...]]:
    """Per depth, one accuracy for each seed."""
    mine = [found[kind] for name, found in runs.items() if name.startswith(f"{network},")]
    return list(zip(*mine, strict=True))


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    curves = {
        network: {
            kind: [interval(list(depth)) for depth in by_depth(runs, network, kind)]
            for kind in KINDS
        }
        for network in NETWORKS
    }
    return {"curves": curves, "holds": holds(curves)}


def holds(curves: dict[str, Any]) -> dict[str, bool]:
    if not all(curves[network]["linear"] for network in NETWORKS):
        return {}
    linear = [point["mean"] for point in curves["k = 1"]["linear"]]
    last = [curves[network]["cnn-2"][-1]["mean"] for network in NETWORKS[:3]]
    return {
        "linear rises for k = 1": linear == sorted(linear),
        "last layers of k = 2 and 3 above k = 1 for CNN-2": min(last[1:]) > last[0],
    }


def table(curves: dict[str, Any]) -> list[str]:
    """Rows of docs/probes.md."""
    rows = []
    for kind in KINDS:
        for network, mine in curves.items():
            rows.append(f"| {kind} | {network} | {' | '.join(map(text, mine[kind]))} |")
    return rows


def figure(runs: dict[str, Any]) -> str:
    """Linear and CNN-2 against depth, as `report` draws it; bars: deviation over the seeds."""
    curves = [
        {
            "of": network,
            "images": None,
            "kind": kind,
            "points": [point(j, d) for j, d in enumerate(by_depth(runs, network, kind), 1)],
        }
        for network in NETWORKS
        for kind in KINDS
    ]
    return draw(probes, {"probes": [one for one in curves if one["points"]]})


def point(depth: int, percents: tuple[float, ...]) -> dict[str, Any]:
    spread = statistics.stdev(percents) / 100 if len(percents) > 1 else None
    return {"depth": depth, "test": statistics.fmean(percents) / 100, "spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "separability.json")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    runs = json.loads(options.out.read_text("utf-8"))["runs"] if options.out.exists() else {}
    every = [(network, seed) for seed in range(options.seeds) for network in NETWORKS]
    todo = [(network, seed) for network, seed in every if f"{network}, seed {seed}" not in runs]
    with tempfile.TemporaryDirectory(prefix="separability-", dir=Path.cwd()) as scratch:
        place = Path(scratch)
        data = images(place, TRAIN, TEST)
        for case, found in as_they_finish(lambda c: run(place, data, c), todo, options.at_once):
            network, seed = case
            runs[f"{network}, seed {seed}"] = found
            keep(summary(runs) | {"runs": runs}, options.out, show=False)
            print(network, seed, found, file=sys.stderr, flush=True)
    options.figure.write_text(figure(runs) + "\n", "utf-8")


if __name__ == "__main__":
    main()
