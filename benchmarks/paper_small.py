"""Do small networks show what the paper shows? k = 1, 2, 3 on CIFAR-10 (JPEG), from canvases.

Claim: in the mean over seeds the small recipes keep the paper's order, k = 3 above k = 2 above
k = 1 (last layer); the ensemble, Σ 2^j z_j of logits or of probabilities, is at least as good as
the last layer; and for k = 1 what a linear classifier gets out of x_j rises with j. A difference is
told with its interval, over seeds: one that contains 0 is no difference to rely on.

Method: `cli.py run cifar10-k{1,2,3}-small` on all images, one thread, every seed a run of its own;
for k = 1 then `cli.py probe --kind linear`. Every run has a store of its own. Intervals
are 95 % of Student's t over seeds. What is in the result file is not run again.

    STRATA_TEST_DATA=FOLDER python benchmarks/paper_small.py [--seeds 3] [--at-once 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from augmentation import interval, text
from cifar_images import archive
from measuring import ONE_THREAD, RESULTS, as_they_finish, keep, strata

import checkout  # noqa: F401

KS = (1, 2, 3)
ENSEMBLES = ("logits", "probabilities")
PROBED = 1
"""k of the networks that a linear classifier is trained on."""


def run(place: Path, k: int, seed: int) -> dict[str, Any]:
    """Test accuracies in percent of every layer and of the last ensemble; probes for k = 1."""
    here = place / f"k{k}-{seed}"
    store = here / "features"
    line = [f"cifar10-k{k}-small", "--seed", seed, "--run", here / "run", "--store", store]
    line += ["--data", f"imagefolder:{archive()}"]
    strata(Path(), "run", *line, environment=ONE_THREAD)
    layers = json.loads((here / "run/report.json").read_text("utf-8"))["layers"]
    found: dict[str, Any] = {
        "layers": [round(100 * layer["test"]["top1"], 2) for layer in layers],
        **{of: round(100 * layers[-1]["ensemble"][of]["top1"], 2) for of in ENSEMBLES},
        "bytes": sum(level["bytes"] for layer in layers for level in layer["levels"]),
    }
    if k == PROBED:
        answer = strata(Path(), "probe", *line, "--kind", "linear", environment=ONE_THREAD)
        probes = answer["probes"]
        found["linear"] = [round(100 * probe["test"]["top1"], 2) for probe in probes]
    shutil.rmtree(here)
    return found


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    by_k = {k: [found for name, found in runs.items() if name.startswith(f"{k} ")] for k in KS}
    found = {f"k = {k}": of_one(mine) for k, mine in by_k.items() if mine}
    whole = all(by_k.values())
    return {
        "networks": found,
        "differences": differences(runs) if whole else {},
        "holds": holds(by_k) if whole else {},
    }


def differences(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """In points, seed by seed: of last layers, and of ensembles and the last layer below them."""
    seeds = sorted({name.split()[1] for name in runs})
    last = {k: [runs[f"{k} {seed}"]["layers"][-1] for seed in seeds] for k in KS}
    found = {
        f"k = {above} - k = {k}": _difference(last[above], last[k]) for k, above in pairwise(KS)
    }
    for k in KS:
        for of in ENSEMBLES:
            together = [runs[f"{k} {seed}"][of] for seed in seeds]
            found[f"k = {k}, {of} - last layer"] = _difference(together, last[k])
    return found


def _difference(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def of_one(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def over_seeds(name: str) -> list[dict[str, Any]]:
        return [interval(list(depth)) for depth in zip(*(r[name] for r in runs), strict=True)]

    row: dict[str, Any] = {"layers": over_seeds("layers"), "bytes": runs[0]["bytes"]}
    row["ensemble"] = {of: interval([r[of] for r in runs]) for of in ENSEMBLES}
    return row | ({"linear": over_seeds("linear")} if "linear" in runs[0] else {})


def holds(by_k: dict[int, list[dict[str, Any]]]) -> dict[str, bool]:
    last = [interval([r["layers"][-1] for r in by_k[k]])["mean"] for k in KS]
    linear = [one["mean"] for one in of_one(by_k[PROBED])["linear"]]
    return {
        "order": last == sorted(last),
        **{f"ensemble of {of}": _above(by_k, of, last) for of in ENSEMBLES},
        "linear separability rises": linear == sorted(linear),
    }


def _above(by_k: dict[int, list[dict[str, Any]]], of: str, last: list[float]) -> bool:
    means = [interval([r[of] for r in by_k[k]])["mean"] for k in KS]
    return all(mean >= one for mean, one in zip(means, last, strict=True))


def table(found: dict[str, Any]) -> list[str]:
    """Rows of docs/paper.md."""
    rows = []
    for k in KS:
        one = found["networks"][f"k = {k}"]
        depths = [*one["layers"], *[None] * (5 - len(one["layers"]))]
        cells = [text(depth) for depth in (*depths, *(one["ensemble"][of] for of in ENSEMBLES))]
        rows.append(f"| k = {k} | {' | '.join(cells)} |")
    linear = [text(depth) for depth in found["networks"][f"k = {PROBED}"]["linear"]]
    return [*rows, f"| k = {PROBED}, linear | {' | '.join(linear)} | | |"]


def told(found: dict[str, Any]) -> list[str]:
    """Differences, as docs/paper.md has them."""
    return [
        f"| {name} | {one['mean']:+.2f} ± {one['plus_minus']:.2f} |"
        for name, one in found["differences"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "paper_small.json")
    options = parser.parse_args()
    runs = json.loads(options.out.read_text("utf-8"))["runs"] if options.out.exists() else {}
    todo = [(k, s) for s in range(options.seeds) for k in KS if f"{k} {s}" not in runs]
    with tempfile.TemporaryDirectory(prefix="paper-small-", dir=Path.cwd()) as scratch:
        place = Path(scratch)
        for (k, seed), found in as_they_finish(lambda one: run(place, *one), todo, options.at_once):
            runs[f"{k} {seed}"] = found
            keep(summary(runs) | {"runs": runs}, options.out, show=False)
            print(k, seed, found, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
