"""Where the time of reading and writing goes: a sampling profiler looks at a process at work.

Method: py-spy (`pip install py-spy`) looks 100 times a second at every thread that is not waiting,
of a process that runs epochs, or writes a level, over and over; what was prepared beforehand is not
in it. A sample counts for the innermost Python function: what a library does in C counts for the
line that called it. Threads that wait for a task are left out (`WAITING`): the profiler takes some
of them to be at work. `cores` is the process' CPU time over the time, by the kernel.

    python benchmarks/where_time_goes.py [--works WORK …] [--seconds 15] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from feed_levels import features, load_images, make_level
from feed_native import Native
from materialize import TRAIN, remove, write
from measuring import RESULTS, keep
from random_run import make_run

import checkout  # noqa: F401
from strata.pipeline.plan import hardware
from strata.pipeline.train import algorithm

RATE = 100
"""Samples a second."""
SHOWN = 0.02
"""Least share of a line that is named."""
WAITING = (
    "_Job.wait (reader.py)",
    "_work (reader.py)",
    "_worker (thread.py)",
    "EpollSelector.select (selectors.py)",
    "wait (threading.py)",
)
READY = "ready"


# ---- what is looked at --------------------------------------------------------------------------


def reading(profile: str, row: str = "32KB") -> Callable[[Path], Callable[[], object]]:
    """Epochs of a level in the page cache, in random order."""

    def prepare(place: Path) -> Callable[[], object]:
        source = features(load_images(None), row, "uint8")
        tier = "memory" if profile == "raw" else "disk"  # else it would be decoded once
        level = make_level(place / "store", source, profile, 1_000_000_000)
        feed = Native(level.directory, batch=128, threads=2, tier=tier)
        feed.prepare(0)
        feed.epoch(0)
        seeds = iter(range(1, 10**9))
        return lambda: feed.epoch(next(seeds))

    return prepare


def writing(place: Path) -> Callable[[], object]:
    """x_2 of `cifar10-k1`, again and again."""
    session = make_run(place, "cifar10-k1", train=TRAIN, test=768)
    algorithm.make(session, solve=2, write=2)

    def again() -> None:
        remove(session, 2)
        write(session, 2)

    return again


WORKS = {
    "reading, raw, 32 KB": reading("raw"),
    "reading, raw, 2 KB": reading("raw", "2KB"),
    "reading, zstd, 32 KB": reading("zstd"),
    "writing, cifar10-k1 layer 2": writing,
}


def serve(work: str) -> None:
    """Do it until stdin is closed."""
    hardware.keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="profile-", dir=Path.cwd()) as place:
        again = WORKS[work](Path(place))
        print(READY, flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:  # until its other end is closed
            again()


# ---- the look -----------------------------------------------------------------------------------


def profile(work: str, seconds: int) -> dict[str, Any]:
    """Shares of the samples, by function."""
    command = [sys.executable, __file__, "--serve", work]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    with process, tempfile.TemporaryDirectory() as place:
        while process.stdout.readline().strip() != READY:
            if process.poll() is not None:
                raise RuntimeError(f"{work} failed with {process.returncode}")
        out = Path(place) / "stacks"
        look = ["py-spy", "record", "--pid", process.pid, "--duration", seconds, "--rate", RATE]
        look += ["--nonblocking", "--format", "raw", "--output", out]
        cores = at_work(process.pid, seconds)  # before anybody looks: that stops it each time
        subprocess.run([str(word) for word in look], check=True, capture_output=True)
        process.stdin.close()
        process.stdout.read()
        stacks = out.read_text("utf-8").splitlines()
    return {"cores": round(cores, 2), "shares": shares(stacks)}


def at_work(pid: int, seconds: int) -> float:
    """Cores at work on average."""
    begun, before = time.perf_counter(), cpu_seconds(pid)
    time.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.perf_counter() - begun)


def cpu_seconds(pid: int) -> float:
    """User and kernel time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shares(stacks: list[str]) -> dict[str, float]:
    """Of lines ``outer (file.py:1);inner (file.py:2) samples``."""
    found: Counter[str] = Counter()
    for line in stacks:
        stack, samples = line.rsplit(" ", 1)
        found[named(stack.rsplit(";", 1)[-1])] += int(samples)
    for name in WAITING:
        del found[name]
    whole = sum(found.values())
    listed = {name: round(n / whole, 3) for name, n in found.most_common() if n >= SHOWN * whole}
    return {**listed, "all others": round(1 - sum(listed.values()), 3)}


def named(frame: str) -> str:
    """``take (rows.py)`` of ``take (/long/way/store/rows.py:110)``."""
    found = re.fullmatch(r"(.*) \((?:.*/)?([^/:]+)(?::\d+)?\)", frame)
    return f"{found[1]} ({found[2]})" if found else frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--works", nargs="*", choices=WORKS, default=list(WORKS))
    parser.add_argument("--seconds", type=int, default=15, help="of looking at each")
    parser.add_argument("--json", action="store_true", help="the result on stdout")
    parser.add_argument("--out", type=Path, default=RESULTS / "where_time_goes.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    found = {work: profile(work, options.seconds) for work in options.works}
    keep({"seconds": options.seconds, "works": found}, options.out, show=options.json)


if __name__ == "__main__":
    main()
