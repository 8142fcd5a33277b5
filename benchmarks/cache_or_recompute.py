"""Which features are worth their disk: does `--cache auto` choose as a clock would?

Claim: the steps of a run with `--cache auto` take at most 5 % longer than those of the better of
`always` and `never`, and less than both where some depths pay and others do not. An epoch of layer
8 of a narrow network is at least 2.5 times as fast from its level as with every layer below
computed again. What was expected of each step: bytes within 2 %, peak of tensors within 15 %,
seconds within 25 % in the median over the steps.

Method: `cli.py calibrate`, then `cli.py run --cache auto|always|never`, each a process of its own
with a run and a store of its own, on images of CIFAR-10 (JPEG), in turn; `seconds` are those of
solving and writing, without reading the images into x_0. Where auto caches what `always` or `never`
do, it is that run, and that way is not run again. With several rounds, each begins with another
way, and seconds are medians.

`problems` then solves eight more problems at each depth, `cli.py sweep --vary seed=…`, a process
for each, and adds the seconds of their epochs. `jpeg` enlarges the images to 256×256 and reads them
with `--loader ffcv`, which decodes them for every batch; writing its file is part of layer 1, in
every mode. `mixed` runs in a control group (cgroup v1, root) that reads 25 MB/s and has little
memory for page cache; what it really read is in the result.

    STRATA_TEST_DATA=FOLDER python benchmarks/cache_or_recompute.py [SCENARIO …] [--rounds N]
        [--quick] [--work DIR] [--json] [--out FILE]

Other scenarios that are in FILE already stay there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import scenarios
from cifar_images import images
from measuring import RESULTS, keep, strata
from scenarios import EVERY, SCENARIOS

import checkout  # noqa: F401

MODES = ("always", "never", "auto")
MOST_ABOVE, LEAST_FASTER = 1.05, 2.5


# ---- one scenario -------------------------------------------------------------------------------


def one(place: Path, name: str, rounds: int, quick: bool, device: str = "auto") -> dict[str, Any]:
    scenario = EVERY[name]
    slow, count = scenario.slow_disk, scenario.images // (10 if quick else 1)
    more = min(1, scenario.problems) if quick else scenario.problems
    data, made = images(place, count, count // 10), scenarios.recipe(place, name, count)
    enter = scenarios.enter_group if slow else None
    if slow:
        scenarios.make_groups()
    on_disk = scenarios.enter_disk if slow else None
    on_device = ["--device", device]
    strata(place, "calibrate", made, "--store", place / "rates", *on_device, enter=on_disk)
    flags = ["--machine", place / "rates/machine.toml", "--data", f"npz:{data}", *on_device]
    flags += ["--loader", scenario.loader, "--problems", 1 + more]
    flags += ["--memory-budget", scenarios.BUDGET] if slow else []

    def run(mode: str) -> dict[str, Any]:
        where = ("--run", place / mode, "--store", place / f"store-{mode}")
        for leftover in where[1::2]:  # of a call that was stopped
            shutil.rmtree(leftover, ignore_errors=True)
        before = scenarios.read_from_disk() if slow else 0
        strata(place, "run", made, *where, "--cache", mode, *flags, enter=enter)
        found = strata(place, "report", made, *where)

        def problem(j: int, seed: int) -> float:
            which = ("--layer", j, "--vary", f"seed={seed}", "--cache", mode)
            swept = strata(place, "sweep", made, *where, *which, *flags, enter=enter)
            return swept["variants"][0]["seconds"]

        layers = range(1, 1 + len(found["layers"]))
        problems = [problem(j, 1 + n) for j in layers for n in range(more)]
        cached = sorted({p.name.split("-")[0] for p in (place / f"store-{mode}").glob("x_[1-9]*")})
        for leftover in where[1::2]:
            shutil.rmtree(leftover)
        return {
            "cached": cached,
            "layers": len(layers),
            "outcomes": found["outcomes"],
            "epochs": last_epochs(found),
            "problems": problems,
            "read": (scenarios.read_from_disk() if slow else 0) - before,
        }

    return {"what": scenario.what, "images": count, **compared(run, rounds)}


def last_epochs(report: dict[str, Any]) -> list[float]:
    """Seconds of every epoch of the last layer."""
    return [epoch["seconds"] for epoch in report["layers"][-1]["epochs"]]


def compared(run: Callable[[str], dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Every mode in turn, but for that which auto is, if it is one of the others."""
    taken: dict[str, list[dict[str, Any]]] = {"auto": [run("auto")]}
    first = taken["auto"][0]
    every = [f"x_{j}" for j in range(1, first["layers"])]
    same = {"always": every, "never": []}
    named = next((mode for mode, depths in same.items() if depths == first["cached"]), None)
    others = [mode for mode in ("always", "never") if mode != named]
    turn = ["auto", *others]
    for number in range(rounds):
        for mode in turn[number % len(turn) :] + turn[: number % len(turn)]:
            if number or mode != "auto":
                taken.setdefault(mode, []).append(run(mode))
    measured = [run for runs in taken.values() for run in runs]
    if named:
        taken[named] = taken["auto"]
    seconds = {mode: statistics.median(map(total, taken[mode])) for mode in MODES}
    better = min(seconds["always"], seconds["never"])
    fastest = [min(run["epochs"]) for mode in ("never", "always") for run in taken[mode][-1:]]
    return {
        "rounds": rounds,
        "seconds": {mode: round(value, 2) for mode, value in seconds.items()},
        "problems": 1 + len(first["problems"]) // first["layers"],
        "read_from_disk": {mode: taken[mode][0]["read"] for mode in MODES if first["read"]},
        "auto": {"caches": first["cached"], "is": named or "neither"},
        "auto_over_better": round(seconds["auto"] / better, 3),
        "last_layer_epoch_never_over_always": round(fastest[0] / fastest[1], 2),
        "expected": errors(measured),
    }


def total(run: dict[str, Any]) -> float:
    """Seconds of the steps of a run, and of the problems solved after it."""
    steps = sum(outcome["measured"]["seconds"] for outcome in run["outcomes"])
    return steps + sum(run["problems"])


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
    parser.add_argument("--quick", action="store_true", help="few images: does it run")
    parser.add_argument("--work", type=Path, help="keeps the images from one call to the next")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "jpeg" in options.scenarios and find_spec("ffcv") is None:
        others = " ".join(name for name in SCENARIOS if name != "jpeg")
        parser.error(f"jpeg needs ffcv: `make ffcv` installs it. Without: {others}")
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
