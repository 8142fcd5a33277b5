"""Transformers trained block by block from cached tokens: of text, and of images.

Claim: the test loss of a language model of characters (nats, next character) falls with every one
of four blocks, for every seed; and every level has as many bytes as planned.

Method: for every seed two runs, each a process with a store of its own and one thread. `text`:
int32 characters of this project's docs, 1,600 rows of 32 to train on and 320 to test with, one
in six; a label for each token; k = 1; 3 epochs a block. `images`: the recipe digits-vit. The
loss, top-1 and seconds of each block are those of the run's report: seconds of the steps of SGD and
of reading. Bytes are of all levels that a run writes. No other figure is claimed of `images`, nor
that it is better with depth.

    python benchmarks/tokens.py [--seeds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import ONE_THREAD, RESULTS, keep, strata

from checkout import ROOT

sys.path.append(str(ROOT / "tests/support"))
import texts  # pyright: ignore[reportMissingImports]


def run(place: Path, network: str, seed: int) -> dict[str, Any]:
    """Figures of one run, block by block."""
    place.mkdir()
    recipe = "digits-vit"
    if network == "text":
        texts.written(place)
        recipe = "tiny.toml"
    where = "--run", "run", "--store", "features", "--seed", seed
    strata(place, "run", recipe, *where, environment=ONE_THREAD)
    planned = strata(place, "plan", recipe, *where, environment=ONE_THREAD)["depths"]
    layers = json.loads((place / "run/report.json").read_text("utf-8"))["layers"]
    nbytes = [sum(level["bytes"] for level in layer["levels"]) for layer in layers[:-1]]
    found = {
        "network": network,
        "seed": seed,
        "loss": [round(layer["test"]["loss"], 4) for layer in layers],
        "top1": [round(100 * layer["test"]["top1"], 2) for layer in layers],
        "seconds": [round(layer["solve_seconds"], 1) for layer in layers],
        "bytes": nbytes,
        "as_planned": nbytes == [depth["bytes"] for depth in planned[1:-1]],
    }
    print(found, flush=True)
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each network and block the mean over the seeds, the lowest and the highest."""
    rows = list[dict[str, Any]]()
    for network in ("text", "images"):
        own = [one for one in runs if one["network"] == network]
        for j in range(4):
            row: dict[str, Any] = {"network": network, "block": j + 1, "n": len(own)}
            for name in ("loss", "top1", "seconds"):
                values = [one[name][j] for one in own]
                mean = round(sum(values) / len(values), 4)
                row[name] = {"mean": mean, "from": min(values), "to": max(values)}
            rows.append(row)
    return rows


def holds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What of the claim holds, and by how much the loss falls with a block at the least."""
    losses = [one["loss"] for one in runs if one["network"] == "text"]
    least = min(a - b for one in losses for a, b in pairwise(one))
    return {
        "falls": least > 0,
        "least": round(least, 4),
        "bytes": all(one["as_planned"] for one in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        runs = [
            run(Path(place, f"{network}-{seed}"), network, seed)
            for network in ("text", "images")
            for seed in range(asked.seeds)
        ]
    result = {"holds": holds(runs), "blocks": summary(runs), "runs": runs}
    keep(result, asked.out, show=False)


if __name__ == "__main__":
    main()
