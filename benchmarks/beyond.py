"""Does greedy training have to collapse on deep networks? Ways to see further than one layer.

Claim: on a ResNet-32 in 16 modules (`cifar10-resnet32-16-small`), trained one module after another
from cached features, the best way is at least 2 points above plain greedy cross-entropy, and above
the same network trained end to end for the same time.

Method: `cli.py run` for every way and seed on all images of CIFAR-10 (JPEG), one thread each, from
four views in uint8; every run has a store of its own. Ways differ in [auxiliary] and [window]
alone; `plain` is a linear classifier above each module. End to end is `cli.py baseline`: for as
many epochs as each module has, and for as many as fit into the seconds of the best way. Accuracy is
of the last module on the test images. Gaps to `plain` are paired by seed, with the 95 % interval of
Student's t over seeds. Seconds are what the whole command took of a core with the first seed,
reading, writing and testing with it: a machine that others use at the same time changes them
little, and later seeds may have run on another machine. Bytes are those of all levels, memory is
the largest peak of tensors in a step. What is in the result file is not run again.

    STRATA_TEST_DATA=FOLDER python benchmarks/beyond.py [WAY …] [--seeds 5] [--epochs 2]
        [--images 50000] [--at-once 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from augmentation import interval
from cifar_images import images
from measuring import ONE_THREAD, RESULTS, as_they_finish, keep

from checkout import ROOT

RECIPE = "cifar10-resnet32-16-small"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paper": {"k": 2, "width": 8, "batch_norm": "true"},
    "copies": {"copies": 2},
    "similarity": {"similarity": 0.9},
    "patches": {"patches": 2, "k": 2, "width": 8, "batch_norm": "true"},
    "context": {"context": 0},
    "window": {"window": 2},
    "window-copies": {"window": 2, "copies": 2},
    "window-copies-similarity": {"window": 2, "copies": 2, "similarity": 0.9},
}
"""Keys of [auxiliary], and layers of a [window]."""
END, SAME_TIME = "end-to-end", "end-to-end-same-time"
POINTS = 2


def recipe(place: Path, way: str, epochs: int) -> Path:
    """The built-in recipe with another way to see x_j."""
    folder = ROOT / "pipeline/recipe/builtin"
    toml = (folder / f"{RECIPE}.toml").read_text("utf-8")
    changes = {"k": 1, **WAYS.get(way, {})}
    window = changes.pop("window", 1)
    lines = "".join(f"{key} = {value}\n" for key, value in changes.items())
    toml = re.sub(r"(?s)(\[auxiliary\]\n).*?\n\n", rf"\g<1>{lines}\n", toml)
    toml = re.sub(r"(?m)^epochs = .*$", f"epochs = {epochs}\ntest_every = 0", toml)
    toml = re.sub(r"(?s)(\[window\]\n).*?\n\n", rf"\g<1>layers = {window}\n\n", toml)
    path = place / f"{way}.toml"
    path.write_text(toml, "utf-8")
    for name in ("resnet.py", "residual.py"):
        shutil.copy(folder / name, place)
    return path


def run(place: Path, data: Path, way: str, seed: int, epochs: int) -> dict[str, Any]:
    """A run in a folder of its own, which is removed."""
    here = place / f"{way}-{seed}"
    here.mkdir()
    line = [recipe(here, way, epochs), "--seed", seed, "--run", "run", "--store", "features"]
    line += ["--data", f"npz:{data}", "--accept-data"]
    if way in (END, SAME_TIME):
        seconds, answer = timed(here, "baseline", *line)
        found = of_baseline(answer["result"])
    else:
        seconds, _ = timed(here, "run", *line)
        found = of_run(json.loads((here / "run/report.json").read_text("utf-8")))
    shutil.rmtree(here)
    return {**found, "epochs": epochs, "seconds": round(seconds, 1)}


def timed(place: Path, *arguments: object) -> tuple[float, dict[str, Any]]:
    """Seconds of a core that a command took, on one thread, and its answer."""
    line = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments), "--json"]
    log = (place / "log").open("wb")
    process = subprocess.Popen(
        line, cwd=place, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, stderr=log
    )
    assert process.stdout is not None
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(line)}: {(place / 'log').read_text('utf-8')[-2000:]}")
    return usage.ru_utime + usage.ru_stime, json.loads(answer)


def of_run(report: dict[str, Any]) -> dict[str, Any]:
    layers = report["layers"]
    levels = [level for layer in layers for level in layer["levels"]]
    return {
        "layers": [round(100 * layer["test"]["top1"], 2) for layer in layers],
        "top1": round(100 * layers[-1]["test"]["top1"], 2),
        "ensemble": round(100 * layers[-1]["ensemble"]["probabilities"]["top1"], 2),
        "bytes": sum(level["bytes"] for level in levels),
        "peak_memory_bytes": max(layer["peak_memory_bytes"] for layer in layers),
    }


def of_baseline(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "top1": round(100 * record["test"]["top1"], 2),
        "bytes": 0,
        "peak_memory_bytes": record["peak_tensor_bytes"],
    }


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By way: means with intervals, and gaps to plain greedy, paired by seed."""
    ways: dict[str, dict[int, dict[str, Any]]] = {}
    for name, found in runs.items():
        way, _, seed = name.rpartition(" ")
        ways.setdefault(way, {})[int(seed)] = found
    plain, result = ways.get("plain", {}), dict[str, Any]()
    for way, of in ways.items():
        first = of[min(of)]
        gaps = [of[seed]["top1"] - plain[seed]["top1"] for seed in of if seed in plain]
        result[way] = {
            "n": len(of),
            "top1": interval([one["top1"] for one in of.values()]),
            "gap_to_plain": interval(gaps) if gaps else None,
            "seconds": first["seconds"],
            "bytes": first["bytes"],
            "peak_memory_bytes": max(one["peak_memory_bytes"] for one in of.values()),
        }
    return result


def table(ways: dict[str, Any]) -> list[str]:
    """The rows of docs/beyond.md, the best way first."""
    rows = []
    for way, of in sorted(ways.items(), key=lambda one: -one[1]["top1"]["mean"]):
        gap = of["gap_to_plain"] if way != "plain" else None
        sizes = (of["bytes"] / 1e9, of["peak_memory_bytes"] / 1e6)
        cells = [way, said(of["top1"]), "" if gap is None else said(gap)]
        cells += [f"{of['seconds']:.0f}", *(f"{size:.1f}" for size in sizes)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def said(one: dict[str, Any]) -> str:
    half = one["plus_minus"]
    return f"{one['mean']:.1f}" if half is None else f"{one['mean']:.1f} ± {half:.1f}"


def judged(ways: dict[str, Any]) -> dict[str, Any]:
    """Does the claim hold, and by what?"""
    greedy = {way: of for way, of in ways.items() if way in WAYS}
    if "plain" not in greedy or len(greedy) < 2:
        return {}
    best = max(greedy, key=lambda way: greedy[way]["top1"]["mean"])
    found = {"best": best, "above_plain": greedy[best]["gap_to_plain"]}
    found["holds"] = {"2 points above plain greedy": found["above_plain"]["mean"] >= POINTS}
    if SAME_TIME in ways:
        found["above_end_to_end"] = round(
            greedy[best]["top1"]["mean"] - ways[SAME_TIME]["top1"]["mean"], 2
        )
        found["holds"]["above end to end of the same time"] = found["above_end_to_end"] > 0
    return found


def epochs_in(ways: dict[str, Any], epochs: int) -> int:
    """Epochs end to end in the seconds of the best way, which had so many for each module."""
    best = ways[judged(ways)["best"]]
    return max(1, round(best["seconds"] * epochs / ways[END]["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join([*WAYS, END, SAME_TIME]))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="of each module")
    parser.add_argument("--images", type=int, default=50_000, help="a fifth as many for testing")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "beyond.json")
    options = parser.parse_args()
    found = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    runs: dict[str, dict[str, Any]] = found.get("runs", {})
    ways = options.ways or [*WAYS, END, SAME_TIME]
    todo = [(way, seed) for seed in range(options.seeds) for way in ways]
    todo = [one for one in todo if "{} {}".format(*one) not in runs]
    with tempfile.TemporaryDirectory(prefix="beyond-") as scratch:
        place = Path(scratch)
        data = images(place, options.images, options.images // 5)

        def work(one: tuple[str, int]) -> dict[str, Any]:
            way, seed = one
            epochs = options.epochs
            if way == SAME_TIME:
                epochs = epochs_in(summary(runs), epochs)
            return run(place, data, way, seed, epochs)

        first = [one for one in todo if one[0] != SAME_TIME]
        for part in (first, [one for one in todo if one[0] == SAME_TIME]):
            for (way, seed), result in as_they_finish(work, part, options.at_once):
                runs[f"{way} {seed}"] = result
                by_way = summary(runs)
                keep(
                    {"images": options.images, "runs": runs, "ways": by_way, **judged(by_way)},
                    options.out,
                    show=False,
                )
                print(
                    f"{way}, seed {seed}: {result['top1']} %, {result['seconds']} s",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    main()
