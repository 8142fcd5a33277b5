"""Eight problems on one read against eight separate solves.

Claim: where making a batch of x_{j-1} dominates, `sweep` with eight variants takes at most 0.6 of
the time of eight sweeps with one variant each: (packed) a wide level of float32 in zstd that is
decoded as it is wanted, and a narrow problem with k = 1; (recomputed) layers 1 to 3 computed again
in every batch, and a narrow problem with k = 1 at layer 4; (disk) the level of packed, but raw, on
a disk of 25 MB/s. (raw) is the case in which a batch costs next to nothing, a raw level in the page
cache under a problem with k = 2: nothing is claimed of it.

Method: `strata.pipeline.study.sweep.sweep` itself, in one process, so that imports do not count;
both ways in every round, in turn, results removed between them; a ratio is the median over the
rounds of together / apart. Variants differ in the seed of their initial weights. Whatever a solve
does is in it: opening the level, test images, the training risk, weights written and synced. Random
images, two epochs, no test accuracy in between. The weights of both ways must be the same to the
bit. Two CPU cores; n = 5 rounds, of raw and disk 3. disk has one epoch, and the level is dropped
from the page cache before every solve; the process is in a control group (version 1, root;
scenarios.py).

    python benchmarks/sweep.py [CASE …] [--quick] [--json] [--out FILE]

Other cases that are in FILE already stay there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scenarios
from measuring import CPU, RESULTS, keep, ratio, seconds

import checkout  # noqa: F401
from strata.pipeline.options import Options
from strata.pipeline.plan import hardware
from strata.pipeline.plan.plan import steps_below
from strata.pipeline.recipe.variants import Variant, variants
from strata.pipeline.run import device, rundir
from strata.pipeline.run.rundir import WEIGHTS
from strata.pipeline.run.session import Session
from strata.pipeline.run.sweep_results import AUXILIARY
from strata.pipeline.study.sweep import sweep
from strata.pipeline.train import algorithm
from strata.store.feature_store import Store

RECIPE = """
[data]
source = "npz:images.npz"
classes = 10
channels = 3
size = 32
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
train = {train}
test = 256
[augment]
crop = 32
views = 1
[network]
layers = {j}
width = {width}
downsample = {downsample}
[auxiliary]
k = {k}
width = {width}
[schedule]
kind = "one-cycle"
epochs = {epochs}
batch = 128
lr = 0.05
precision = "float32"
test_every = 0
[cache]
precision = "{precision}"
profile = "{profile}"
"""
TOGETHER = 8
AT_MOST = 0.6


@dataclass(frozen=True)
class Case:
    """A level, or none, and a problem on it."""

    j: int
    width: int
    k: int
    profile: str = "raw"
    precision: str = "float16"
    """Of the level; steps are float32."""
    downsample: str = "[]"
    epochs: int = 2
    cached: bool = True
    tier: str = "auto"
    problem_width: int | None = None
    """M of layer j itself; None: the recipe's."""
    rounds: int = 5
    train: int = 2048
    slow_disk: bool = False

    def vary(self, seeds: Sequence[int]) -> list[str]:
        width = [f"width={self.problem_width}"] if self.problem_width else []
        return [*width, f"seed={','.join(map(str, seeds))}"]


CASES = {
    "packed": Case(2, 64, 1, profile="zstd", precision="float32", tier="disk", problem_width=4),
    "recomputed": Case(4, 32, 1, downsample="[3]", cached=False, problem_width=4),
    "disk": Case(
        2,
        64,
        1,
        precision="float32",
        epochs=1,
        tier="disk",
        problem_width=4,
        rounds=3,
        train=1024,
        slow_disk=True,
    ),
    "raw": Case(2, 32, 2, downsample="[1]", rounds=3),
}
CLAIMED = ("packed", "recomputed", "disk")


def make_run(place: Path, case: Case, train: int) -> Session:
    """A run with all there that layer j is solved from."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", train), ("test", 256)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 10
    np.savez(place / "images.npz", **arrays)
    text = RECIPE.format(**{**vars(case), "train": train})
    facts = {"compute": "float32", **device.facts(CPU)}
    run = rundir.create(place / "run", "sweep", text, 0, f"npz:{place / 'images.npz'}", facts)
    session = Session(run, Store(place / "store"), CPU, options=Options(tier=case.tier))
    algorithm.make(session, steps_below, j=case.j, cached=None if case.cached else ())
    return session


def both_ways(session: Session, case: Case, wanted: Sequence[Variant]) -> tuple[float, float, bool]:
    """Seconds together and apart, and whether the weights are the same."""

    def solve(some: Sequence[Variant]) -> None:
        if case.slow_disk:
            forget(session.store.root)
        sweep(session, case.j, some)

    together = seconds(lambda: solve(wanted))
    found = made(session, case.j, wanted)
    apart = seconds(lambda: [solve([variant]) for variant in wanted])
    return together, apart, found == made(session, case.j, wanted)


def forget(root: Path) -> None:
    """Drop a store from the page cache; all of it was synced."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def made(session: Session, j: int, wanted: Sequence[Variant]) -> list[bytes]:
    """The weights of every variant; they are removed."""
    places = [session.run.sweep_directory(j) / variant.name for variant in wanted]
    found = [(path / name).read_bytes() for path in places for name in (WEIGHTS, AUXILIARY)]
    shutil.rmtree(session.run.sweep_directory(j))
    return found


def measure(case: Case, *, quick: bool) -> dict[str, Any]:
    """One case: a ratio, and what it is made of."""
    train, rounds = (case.train // 4, 1) if quick else (case.train, case.rounds)
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        session = make_run(Path(place), case, train)
        wanted = variants(session.run.recipe, case.j, case.vary(range(TOGETHER)), 0)
        if case.slow_disk:
            scenarios.make_groups()
            scenarios.enter_disk()
        both_ways(session, case, wanted[:1])  # allocators and the page cache are warm
        found = [both_ways(session, case, wanted) for _ in range(rounds)]
        if case.slow_disk:
            scenarios.leave_disk()
    together, apart, same = zip(*found, strict=True)
    return {
        "variants": TOGETHER,
        "train_images": train,
        "seconds_together": [round(s, 3) for s in together],
        "seconds_apart": [round(s, 3) for s in apart],
        "ratio_together_to_apart": ratio(together, apart),
        "same_bits": all(same),
    }


def holds(name: str, found: dict[str, Any]) -> bool:
    slow = name in CLAIMED and found["ratio_together_to_apart"]["median"] > AT_MOST
    return found["same_bits"] and not slow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="few images, one round: no result")
    parser.add_argument("--json", action="store_true", help="show the result")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sweep.json")
    options = parser.parse_args()
    hardware.keep_freed_memory()
    path = options.out or (None if options.quick else RESULTS / "sweep.json")
    known = json.loads(path.read_text("utf-8")) if path and path.exists() else {}
    result: dict[str, Any] = {"claim": AT_MOST, "cases": known.get("cases", {})}
    for name in options.cases:
        case = CASES[name]
        found = measure(case, quick=options.quick)
        result["cases"][name] = {**found, "holds": holds(name, found)}
        print(f"{name}: {found['ratio_together_to_apart']}", file=sys.stderr)
        keep(result, path, show=options.json and name == options.cases[-1])


if __name__ == "__main__":
    main()
