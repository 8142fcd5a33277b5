"""Which features are worth their disk: does `--cache auto` choose as a clock would?

Claim: the steps of a run with `--cache auto` take at most 5 % longer than those of the better of
`always` and `never`, and less than both where some depths pay and others do not. An epoch of layer
8 of a narrow network is at least 2.5 times as fast from its level as with every layer below
computed again. What was expected of each step: bytes within 2 %, peak of tensors within 15 %,
seconds within 25 % in the median over the steps.

Method: `cli.py calibrate`, then `cli.py run --cache always|never|auto`, each a process of its own
with a run and a store of its own, on images of CIFAR-10 (JPEG), in turn; `seconds` are those of
solving and writing, without reading the images into x_0. Where auto caches what `always` or `never`
do, it is that run, and is not timed again. With several rounds, seconds are medians. `slow disk`
runs in a control group (cgroup v1, root) that reads 25 MB/s and has little memory for page cache.

    STRATA_TEST_DATA=FOLDER python benchmarks/cache_or_recompute.py [SCENARIO …] [--rounds N]
        [--quick] [--work DIR] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, keep
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODES = ("always", "never", "auto")
READ_BYTES, MEMORY_BYTES = 25_000_000, 900_000_000
GROUPS = Path("/sys/fs/cgroup")
MOST_ABOVE, LEAST_FASTER = 1.05, 2.5


@dataclass(frozen=True)
class Scenario:
    """Changes of cifar10-small, and how it is run."""

    what: str
    changes: dict[str, str]
    images: int = 4_000
    slow_disk: bool = False


NARROW = {
    "layers": "8",
    "width": "32",
    "downsample": "[3]",
    "k": "1",
    "epochs": "4",
}
SCENARIOS = {
    "small": Scenario("three layers, k = 2, canvas", {}),
    "narrow": Scenario("eight narrow layers, k = 1, canvas", NARROW),
    "views": Scenario("eight narrow layers, four fixed views", NARROW | {"views": "4"}),
    "two epochs": Scenario("eight narrow layers, read twice", NARROW | {"epochs": "2"}),
    "slow disk": Scenario(
        "three layers from 25 MB/s, more than memory holds", {"epochs": "3"}, 8_000, True
    ),
}


# ---- images, recipes, processes -----------------------------------------------------------------


def images(place: Path, count: int) -> Path:
    """The first training and a tenth as many test images of every class, as one .npz."""
    path = place / f"cifar-{count}.npz"
    if path.exists():
        return path
    arrays: dict[str, list[Any]] = {f"{a}_{s}": [] for a in "xy" for s in ("train", "test")}
    most, classes = {"train": count // 10, "test": count // 100}, {}
    with tarfile.open(Path(os.environ["STRATA_TEST_DATA"]) / "cifar10-jpeg.tar.xz") as tar:
        for member in tar:
            found = re.search(r"(train|test)/([^/]+)/(\d+)\.jpg$", member.name)
            if not found or int(found[3]) >= most[found[1]]:
                continue
            data = tar.extractfile(member)
            assert data is not None
            split = found[1]
            arrays[f"x_{split}"].append(np.asarray(Image.open(BytesIO(data.read())).convert("RGB")))
            arrays[f"y_{split}"].append(classes.setdefault(found[2], len(classes)))
    np.savez(path, **{name: np.array(values) for name, values in arrays.items()})
    return path


def recipe(place: Path, name: str, scenario: Scenario) -> Path:
    text = (ROOT / "pipeline/recipes/cifar10-small.toml").read_text("utf-8")
    for key, value in scenario.changes.items():
        text, count = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value} ", text)
        assert count, key
    path = place / f"{name.replace(' ', '-')}.toml"
    path.write_text(text, "utf-8")
    return path


def strata(place: Path, *arguments: object, slow: bool = False) -> dict[str, Any]:
    """A command, its answer as JSON; in a group of its own where the disk is to be slow."""
    line = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments), "--json"]
    done = subprocess.run(
        line, capture_output=True, cwd=place, preexec_fn=enter_group if slow else None, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stderr.decode()[-2000:]}")
    return json.loads(done.stdout)


def make_groups() -> None:
    """What reads at READ_BYTES a second and holds MEMORY_BYTES, page cache included."""
    device = Path(tempfile.gettempdir()).stat().st_dev
    disk = f"{os.major(device)}:{os.minor(device)}"
    for kind, name, value in (
        ("blkio", "blkio.throttle.read_bps_device", f"{disk} {READ_BYTES}"),
        ("memory", "memory.limit_in_bytes", str(MEMORY_BYTES)),
    ):
        group = GROUPS / kind / "strata-benchmark"
        group.mkdir(exist_ok=True)
        (group / name).write_text(value, "ascii")


def enter_group() -> None:
    for kind in ("blkio", "memory"):
        (GROUPS / kind / "strata-benchmark/cgroup.procs").write_text(str(os.getpid()), "ascii")


# ---- one scenario -------------------------------------------------------------------------------


def one(place: Path, name: str, rounds: int, quick: bool) -> dict[str, Any]:
    scenario = SCENARIOS[name]
    count = scenario.images // (10 if quick else 1)
    data, made = images(place, count), recipe(place, name, scenario)
    rates = place / "rates"
    budget = ("--memory-budget", "200MB") if scenario.slow_disk else ()
    if scenario.slow_disk:
        make_groups()
    strata(place, "calibrate", made, "--store", rates, slow=scenario.slow_disk)
    machine = ("--machine", rates / "machine.toml", "--data", f"npz:{data}", *budget)

    def run(mode: str) -> dict[str, Any]:
        where = ("--run", place / mode, "--store", place / f"store-{mode}")
        strata(place, "run", made, *where, "--cache", mode, *machine, slow=scenario.slow_disk)
        found = strata(place, "report", made, *where)
        cached = sorted({p.name.split("-")[0] for p in (place / f"store-{mode}").glob("x_[1-9]*")})
        for leftover in (place / mode, place / f"store-{mode}"):
            shutil.rmtree(leftover)
        return {"cached": cached, "outcomes": found["outcomes"], "epochs": last_epochs(found)}

    return {"what": scenario.what, "images": count, **compared(run, rounds)}


def last_epochs(report: dict[str, Any]) -> list[float]:
    """Seconds of every epoch of the last layer."""
    return [epoch["seconds"] for epoch in report["layers"][-1]["epochs"]]


def compared(run: Callable[[str], dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Every mode in turn; auto only where it is neither of the others."""
    taken: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    same = None
    for number in range(rounds):
        for mode in MODES:
            if mode != "auto" or same is None:
                taken[mode].append(run(mode))
        if number == 0:
            chosen = taken["auto"][0]["cached"]
            same = next((m for m in MODES[:2] if taken[m][0]["cached"] == chosen), None)
    if same:
        taken["auto"] = taken[same]
    seconds = {mode: statistics.median(map(total, runs)) for mode, runs in taken.items()}
    better = min(seconds["always"], seconds["never"])
    fastest = [min(run["epochs"]) for mode in ("never", "always") for run in taken[mode][-1:]]
    return {
        "rounds": rounds,
        "seconds": {mode: round(value, 2) for mode, value in seconds.items()},
        "auto": {"caches": taken["auto"][0]["cached"], "is": same or "neither"},
        "auto_over_better": round(seconds["auto"] / better, 3),
        "last_layer_epoch_never_over_always": round(fastest[0] / fastest[1], 2),
        "expected": errors([run for runs in taken.values() for run in runs]),
    }


def total(run: dict[str, Any]) -> float:
    return sum(outcome["measured"]["seconds"] for outcome in run["outcomes"])


def errors(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far measured lies from expected: the median over the steps of seconds, else the worst."""
    off: dict[str, list[float]] = {"seconds": [], "bytes": [], "peak_bytes": []}
    for outcome in (outcome for run in runs for outcome in run["outcomes"]):
        for name, distances in off.items():
            expected, measured = outcome["expected"][name], outcome["measured"][name]
            if expected and measured:
                distances.append(abs(measured / expected - 1))
    return {
        "steps": len(off["seconds"]),
        "seconds_median": round(statistics.median(off["seconds"]), 3),
        "seconds_quartiles": [round(q, 3) for q in statistics.quantiles(off["seconds"])[::2]],
        "bytes_worst": round(max(off["bytes"], default=0.0), 4),
        "peak_worst": round(max(off["peak_bytes"]), 3),
    }


def rows(result: dict[str, Any]) -> Iterator[str]:
    """The table of docs/economics.md."""
    for found in result["scenarios"].values():
        times = " | ".join(f"{found['seconds'][mode]:.0f} s" for mode in MODES)
        told = found["auto"]["is"]
        how = ", ".join(found["auto"]["caches"]) or "none" if told == "neither" else f"as {told}"
        faster = found["last_layer_epoch_never_over_always"]
        off = found["expected"]
        yield (
            f"| {found['what']} | {times} | {how} | {faster:.1f} | "
            f"{100 * off['seconds_median']:.0f} % | {100 * off['peak_worst']:.1f} % |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few images; for trying it out")
    parser.add_argument("--work", type=Path, help="keeps the images from one call to the next")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or (None if options.quick else RESULTS / "cache_or_recompute.json")
    known = json.loads(out.read_text("utf-8")) if out and out.exists() else {}
    result = {"scenarios": known.get("scenarios", {})}
    result["asked"] = {"auto_over_better": MOST_ABOVE, "narrow_epoch": LEAST_FASTER}
    with tempfile.TemporaryDirectory(prefix="cache-or-recompute-") as scratch:
        place = options.work or Path(scratch)
        place.mkdir(exist_ok=True)
        for name in options.scenarios:
            result["scenarios"][name] = one(place.resolve(), name, options.rounds, options.quick)
            keep(result, out, show=options.json)


if __name__ == "__main__":
    main()
