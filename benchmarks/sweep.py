"""Eight problems on one read against eight separate solves.

Claim: where making a batch of x_{j-1} dominates, `sweep` with eight variants takes at most 0.6 of
the time of eight sweeps with one variant each: (packed) a level in zstd that is decoded as it is
wanted, and a small problem with k = 1; (recomputed) layers 1 to 3 computed again in every batch,
and a small problem with k = 1 at layer 4. (raw) is the case in which a batch costs next to nothing,
a raw level in the page cache under a problem with k = 2: nothing is claimed of it.

Method: `pipeline.sweep.sweep` itself, in one process, so that imports do not count; both ways in
every round, in turn, results removed between them; a ratio is the median over the rounds of
together / apart. Variants differ in the seed of their initial weights. Whatever a solve does is in
it: opening the level, test images, the training risk, weights written and synced. Random images,
two epochs, no test accuracy in between. The weights of both ways must be the same to the bit. Two
CPU cores; n = 5 rounds, of raw 3.

    python benchmarks/sweep.py [--cases CASE …] [--quick] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import CPU, RESULTS, keep, ratio, seconds

from pipeline import algorithm, device, rundir, swept
from pipeline.session import Session
from pipeline.sweep import sweep
from pipeline.variants import Variant, variants
from store.feature_store import Store

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
downsample = [{p}]
[auxiliary]
k = {k}
width = {width}
[schedule]
kind = "one-cycle"
epochs = 2
batch = 128
lr = 0.05
precision = "float32"
test_every = 0
[cache]
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
    cached: bool = True
    tier: str = "auto"
    problem_width: int | None = None
    """M of layer j itself; None: the recipe's."""
    rounds: int = 5

    def vary(self, seeds: Sequence[int]) -> list[str]:
        width = [f"width={self.problem_width}"] if self.problem_width else []
        return [*width, f"seed={','.join(map(str, seeds))}"]


CASES = {
    "packed": Case(2, 64, 1, profile="zstd", tier="disk", problem_width=4),
    "recomputed": Case(4, 32, 1, cached=False, problem_width=16),
    "raw": Case(2, 32, 2, rounds=3),
}
CLAIMED = ("packed", "recomputed")


def make_run(place: Path, case: Case, train: int) -> Session:
    """A run with all there that layer j is solved from."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", train), ("test", 256)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 10
    np.savez(place / "images.npz", **arrays)
    text = RECIPE.format(
        train=train, j=case.j, width=case.width, k=case.k, p=case.j - 1, profile=case.profile
    )
    facts = {"compute": "float32", **device.facts(CPU)}
    run = rundir.create(place / "run", "sweep", text, 0, f"npz:{place / 'images.npz'}", facts)
    session = Session(run, Store(place / "store"), CPU, tier=case.tier)
    algorithm.prepare(session, case.j, cached=None if case.cached else ())
    return session


def both_ways(session: Session, j: int, wanted: Sequence[Variant]) -> tuple[float, float, bool]:
    """Seconds together and apart, and whether the weights are the same."""
    together = seconds(lambda: sweep(session, j, wanted))
    found = made(session, j, wanted)
    apart = seconds(lambda: [sweep(session, j, [variant]) for variant in wanted])
    return together, apart, found == made(session, j, wanted)


def made(session: Session, j: int, wanted: Sequence[Variant]) -> list[bytes]:
    """The weights of every variant; they are removed."""
    places = [swept.place(session.run, j, variant.name) for variant in wanted]
    found = [(path / name).read_bytes() for path in places for name in swept.FILES[:2]]
    shutil.rmtree(session.run.sweep_directory(j))
    return found


def measure(case: Case, *, train: int, rounds: int) -> dict[str, Any]:
    """One case: a ratio, and what it is made of."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        session = make_run(Path(place), case, train)
        wanted = variants(session.run.recipe, case.j, case.vary(range(TOGETHER)), 0)
        both_ways(session, case.j, wanted[:1])  # allocators and the page cache are warm
        found = [both_ways(session, case.j, wanted) for _ in range(rounds)]
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
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="1,024 images, one round: no result")
    parser.add_argument("--json", action="store_true", help="show the result")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sweep.json")
    options = parser.parse_args()
    device.keep_freed_memory()
    train = 1024 if options.quick else 2048
    path = options.out or (None if options.quick else RESULTS / "sweep.json")
    result: dict[str, Any] = {"claim": AT_MOST, "cases": {}}
    for name in options.cases:
        case = CASES[name]
        found = measure(case, train=train, rounds=1 if options.quick else case.rounds)
        result["cases"][name] = {**found, "holds": holds(name, found)}
        print(f"{name}: {found['ratio_together_to_apart']}", file=sys.stderr)
        keep(result, path, show=options.json and name == options.cases[-1])


if __name__ == "__main__":
    main()
