"""What a GPU is wanted for, in order of worth, in half an hour of one.

    STRATA_TEST_DATA=FOLDER python benchmarks/gpu/all.py [--minutes 27] [--work DIR] [--list]
        [--device cuda] [--images 50000] [--epochs 50] [PART …]

Every part is a script of its own, or the tests that need a GPU, and is recorded when it has ended,
in `all_gpu.json`: its status, its seconds, and the end of what it said. A part that the time is up
for is stopped by Ctrl-C, and goes on with the next call; one that failed is recorded as such, and
the next one begins. Parts that are through are not done again. After the tests, two minutes of the
paper's networks at one epoch a layer tell how fast this card is, and what will fit is said. The
paper's networks are kept in `train_gpu.json`, which `benchmarks/paper_tables.py` puts beside the
paper's figures. `--device cpu --images 512 --epochs 1` tries the same lines without a GPU, and
keeps all of it in `--work`.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cifar_images import images
from measuring import RESULTS, keep

from checkout import ROOT
from strata.pipeline.recipe.builtin import text_of

STOP_SECONDS = 60
"""What a part may take to stop at Ctrl-C, its own parts included."""
SAID = 2_000
"""Last characters of what a part said that are kept."""
TRIAL = 2
"""Minutes of the trial that tells how fast the card is."""
KS = (3, 1, 2)
"""In order of worth: the paper's best first."""
EXPECTED = {"canvas": 6.0, "fresh": 9.0, "end-to-end": 4.0}
"""Minutes of a network on one H200, where nothing else is known."""
OTHERS = (
    ("memory", 2, "memory-gpu.json"),
    ("feed", 1, "feed-gpu.json"),
    ("crossover", 5, "crossover_gpu.json"),
)
"""Names, minutes and results of scripts that have no data of their own to wait for."""
RESNET = "cifar10-resnet32-16"


@dataclass(frozen=True)
class Part:
    """One thing that a GPU is wanted for."""

    name: str
    minutes: float
    """On one H200, or as a trial has told."""
    line: tuple[str, ...]
    """Arguments of Python."""


def parts(options: argparse.Namespace, trial: Mapping[str, float]) -> list[Part]:
    """In order of worth.

    Args:
        trial: minutes by k, of networks from canvases.
    """
    where = ("--device", options.device)
    quick = (*where, *["--quick"] * (options.device == "cpu"))
    networks = [
        Part(f"k{k}-{way}", minutes * trial.get(k, EXPECTED["canvas"]) / EXPECTED["canvas"], ())
        for way, minutes in EXPECTED.items()
        for k in map(str, KS)
    ]
    tests = script("../tests/pipeline/train/test_gpu.py")
    return [
        Part("tests", 3, ("-m", "pytest", "-q", tests, "-p", "no:cacheprovider")),
        *(Part(one.name, one.minutes, trained(options, one.name)) for one in networks),
        *(
            Part(name, minutes, (script(f"gpu/{name}_gpu.py"), *quick, *out(options, kept)))
            for name, minutes, kept in OTHERS
        ),
        Part("resnet32", 8, resnet(options)),
    ]


def script(name: str) -> str:
    return str((ROOT / "benchmarks" / name).resolve())


def out(options: argparse.Namespace, name: str) -> tuple[str, ...]:
    """Beside the committed results, but for what was only tried."""
    return "--out", str((options.work if options.device == "cpu" else RESULTS) / name)


def trained(options: argparse.Namespace, name: str) -> tuple[str, ...]:
    """One of the paper's networks; it is stopped from here, not by its own clock."""
    size = "--images", str(options.images), "--epochs", str(options.epochs), "--minutes", "999"
    where = "--device", options.device, "--work", str(options.work), *out(options, "train_gpu.json")
    return script("gpu/train_gpu.py"), name, *size, *where


def resnet(options: argparse.Namespace) -> tuple[str, ...]:
    """The best that docs/beyond.md has found, at full width."""
    _, text, folder = text_of(RESNET)
    work, epochs = options.work, min(30, options.epochs)
    path = work / f"{RESNET}.toml"
    path.write_text(re.sub(r"(?m)^epochs = .*", f"epochs = {epochs}", text), "utf-8")
    for name in ("resnet.py", "residual.py"):
        (work / name).write_text((folder / name).read_text("utf-8"), "utf-8")
    data = f"npz:{images(work, options.images, options.images // 5)}"
    where = "--run", str(work / "run-resnet32"), "--store", str(work / "features-resnet32")
    more = "--data", data, "--accept-data", "--device", options.device
    return script("../cli.py"), "run", str(path), *where, *more


def tried(options: argparse.Namespace, until: float) -> dict[str, float]:
    """Minutes of networks from canvases at all epochs, by k, of those that a trial came to."""
    found = options.work / "trial.json"
    line = [script("gpu/train_gpu.py"), *(f"k{k}-canvas" for k in KS), "--epochs", "1"]
    line += ["--images", str(options.images), "--device", options.device, "--seed", "999"]
    line += ["--work", str(options.work), "--minutes", "999", "--out", str(found)]
    ended(line, min(until, time.monotonic() + 60 * TRIAL), options.work / "trial.log")
    runs = json.loads(found.read_text("utf-8"))["runs"] if found.exists() else {}
    minutes = {}
    for name, run in runs.items():
        epoch = sum(options.images / rate for rate in run["images_per_s"])
        minutes[name[1]] = (run["seconds"] + (options.epochs - 1) * epoch) / 60
    return minutes


def ended(line: list[str] | tuple[str, ...], until: float, log: Path) -> int | None:
    """The status of a process, whose words go to ``log``; None: it was stopped, the time was up."""
    with log.open("wb") as words:
        process = subprocess.Popen([sys.executable, *line], stdout=words, stderr=words)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        if process.poll() is not None:
            return process.returncode
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        return None


def fits(todo: list[Part], seconds: float) -> str:
    """What there is time for, one after another."""
    lines, minutes = [], 0.0
    for part in todo:
        minutes += part.minutes
        there = "fits" if 60 * minutes <= seconds else "will go on with another call"
        lines.append(f"  {part.name:<16} {part.minutes:5.1f} min, {minutes:5.1f} in all: {there}")
    return "\n".join([f"{seconds / 60:.1f} minutes are left:", *lines])


def do(part: Part, until: float, work: Path) -> dict[str, Any]:
    """A part, and what is recorded of it."""
    begun, log = time.monotonic(), work / f"{part.name}.log"
    status = ended(part.line, until, log)
    state = {None: "stopped: goes on with the next call", 0: "done"}.get(status, "failed")
    return {
        "state": state,
        "status": status,
        "seconds": round(time.monotonic() - begun, 1),
        "said": log.read_text("utf-8", "replace")[-SAID:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PART", help="only these; default: all")
    parser.add_argument("--minutes", type=float, default=27)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, default=50_000, help="a fifth as many for testing")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("train-gpu"))
    parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = Path(out(options, "all_gpu.json")[1])
    known: dict[str, Any] = json.loads(kept.read_text("utf-8"))["parts"] if kept.exists() else {}
    trial: dict[str, float] | None = None
    while True:
        todo = [
            part
            for part in parts(options, trial or {})
            if part.name in (options.names or [part.name])
            and known.get(part.name, {}).get("state") not in ("done", "failed")
        ]
        if options.list or not todo or time.monotonic() > until:
            break
        if todo[0].name != "tests" and trial is None:
            trial = tried(options, until)
            names = {part.name for part in todo}
            todo = [part for part in parts(options, trial) if part.name in names]
            print(fits(todo, until - time.monotonic()), flush=True)
        print(f"{todo[0].name} …", flush=True)
        known[todo[0].name] = one = do(todo[0], until, options.work)
        print(f"{todo[0].name}: {one['state']}, {one['seconds']} s", flush=True)
        keep({"parts": known}, kept, show=False, on=torch.device(options.device))
    print(fits(todo, until - time.monotonic()) if todo else f"everything is done: {kept}")


if __name__ == "__main__":
    main()
