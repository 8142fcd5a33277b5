"""Whatever the outside does, a command ends in success or in one line, and no work is lost.

Every command meets every broken outside: each file and folder of a run, of the run beside it, of
the store and of what the user brings is missing, empty, cut short, of another kind (a folder for a
file, a file for a folder, a link that leads nowhere or to itself), no text, a record of another
shape, or unreadable; disks are full, read-only or failing; streams are closed, full, broken or not
of UTF-8; names are too long. Each case is a process of its own, forked from one that has imported
everything, on a copy of three small runs. Counted are: done; one line (a documented exit code and
one line on stderr); tracebacks; and lost work: a file of weights or features that was sound before
and is not there with the same bytes afterwards, though nobody asked for that.

    TMPDIR=/dev/shm python benchmarks/outside.py [--draw N] [--minutes M] [--seed S] [--out FILE]

Cases come in a random order, drawn by the seed; after so many minutes no more are begun. The result
is benchmarks/results/outside.json: how many ran of how many there are; two cores, one pass.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import outside_faults
from outside_faults import Fault

import checkout  # noqa: F401
from strata import cli
from strata.pipeline.errors import EXIT_CODES

CLAIM = "whatever the outside does: success or one line, no traceback, no lost work"
RECIPE = """
[data]
source = "npz:images.npz"
classes = 4
channels = 1
size = 8
mean = [0.5]
std = [0.3]
train = 64
test = 16
[augment]
pad = 2
crop = 8
flip = false
views = "canvas"
[network]
layers = 2
width = 4
downsample = []
batch_norm = true
bias = false
[auxiliary]
k = 1
batch_norm = true
[schedule]
kind = "one-cycle"
epochs = 1
batch = 16
lr = 0.05
precision = "float32"
[cache]
precision = "float16"
shard_mb = 1
block = 16
"""
HERE = ("tiny.toml", "--run", "runs/a", "--store", "store")
VARY = ("--vary", "schedule.lr=0.1,0.2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "recipes": ("recipes",),
    "plan": ("plan", *HERE),
    "status": ("status", *HERE),
    "status --json": ("status", *HERE, "--json"),
    "train": ("train", *HERE, "--layer", "2"),
    "materialize": ("materialize", *HERE, "--layer", "2"),
    "materialize --dry-run": ("materialize", *HERE, "--layer", "2", "--dry-run"),
    "run": ("run", *HERE),
    "run, new": ("run", "tiny.toml", "--run", "runs/new", "--store", "store", "--seed", "3"),
    "sweep": ("sweep", *HERE, "--layer", "1", *VARY),
    "final": ("final", *HERE, *VARY),
    "baseline": ("baseline", *HERE),
    "probe": ("probe", *HERE),
    "statistics": ("statistics", *HERE),
    "evaluate": ("evaluate", *HERE),
    "export": ("export", *HERE, "--to", "exported"),
    "report": ("report", *HERE),
    "clean": ("clean", *HERE, "--layer", "2", "--features"),
    "clean --dry-run": ("clean", *HERE, "--dry-run"),
    "verify": ("verify", *HERE),
    "verify --deep": ("verify", *HERE, "--deep"),
    "explain": ("explain", *HERE, "--layer", "2"),
    "evict": ("evict", *HERE, "--layer", "2"),
    "du": ("du", "--store", "store"),
    "gc": ("gc", "--store", "store"),
    "gc --delete": ("gc", "--store", "store", "--delete"),
}
MAY_REMOVE = {"clean": "store/x_2-", "evict": "store/x_2-"}
"""What a command was asked to remove, by how its paths begin."""
WORK = ("*.safetensors", "c.*", "x", "sample_ids.npy")
"""Files that took time to make."""
CODES = {code for _, code in EXIT_CODES}
PATIENCE = 60
ROOM = 1 << 20
"""Bytes that a command may say."""
HEAVY = (
    "torch.export",
    "matplotlib.backends.backend_svg",
    "rich.progress",
    "strata.pipeline.materialize.cluster.worker",
    *(f"strata.pipeline.{name}" for name in ("results.export", "results.report", "train.compress")),
    *(f"strata.pipeline.study.{name}" for name in ("probe", "statistics", "sweep")),
    *(f"strata.pipeline.train.{name}" for name in ("algorithm", "evaluation", "train")),
    *(f"strata.pipeline.commands.{key.partition('.')[0]}" for key in cli.COMMANDS),
)
"""What is imported once, before the first fork."""


@dataclass(frozen=True)
class Said:
    """What a command left behind, and how."""

    rc: int
    out: str
    err: str

    @property
    def verdict(self) -> str:
        """``done``, ``one line``, or what is wrong."""
        errors = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        if "Traceback" in self.err + self.out or self.rc == 1:
            return "traceback"
        if self.rc == 0 and not errors:
            return "done"
        return "one line" if self.rc in CODES and len(errors) == 1 else f"odd: {self.rc}"


def forked(cwd: Path, words: Sequence[str], prepare: Callable[[], object]) -> Said:
    """A command in a process of its own: a fork of this one, which has imported everything.

    Args:
        prepare: called in it first, to break what only a process has: limits, streams.
    """
    pipes = [os.pipe() for _ in range(2)]
    for _, end in pipes:
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, ROOM)
    if not (child := os.fork()):
        try:
            os.chdir(cwd)
            for number, (_, end) in enumerate(pipes, 1):
                os.dup2(end, number)
            signal.alarm(PATIENCE)
            os._exit(_performed(words, prepare))
        finally:
            os._exit(99)
    said = []
    for _, end in pipes:
        os.close(end)
    _, status = os.waitpid(child, 0)
    for begin, _ in pipes:
        with open(begin, encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123
            said.append(file.read())
    return Said(os.waitstatus_to_exitcode(status), *said)


def _performed(words: Sequence[str], prepare: Callable[[], object]) -> int:
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False, encoding="utf-8")
    seen = os.dup(2)
    code: Any = 0
    try:
        prepare()
        cli.main(list(words))
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        os.write(seen, traceback.format_exc().encode())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    return int(code)


def make(folder: Path) -> Path:
    """Two runs of one recipe in one store, with all that commands leave in a run. They are made at
    the path where every case has its copy, since notes in the store name it."""
    root = folder / "place"
    root.mkdir(parents=True)
    for module in HEAVY:
        import_module(module)
    (root / "tiny.toml").write_text(RECIPE)
    draw, arrays = np.random.default_rng(0), dict[str, Any]()
    for split, count in (("train", 64), ("test", 16)):
        arrays[f"x_{split}"] = draw.integers(0, 256, (count, 8, 8), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 4
    np.savez(root / "images.npz", allow_pickle=False, **arrays)
    for seed, name in enumerate("ab"):
        where = ("tiny.toml", "--run", f"runs/{name}", "--store", "store", "--seed", str(seed))
        steps = [("run",), ("materialize", "--layer", "2"), ("probe",), ("baseline",)]
        steps += [("final", "--vary", "schedule.lr=0.1")]
        for first, *more in steps:
            said = forked(root, (first, *where, *more), lambda: None)
            assert said.rc == 0, said.err
    return root.rename(folder / "made")


def sound(place: Path) -> dict[str, bytes]:
    """Every file that took time to make, by its path."""
    found = {path for pattern in WORK for path in place.rglob(pattern) if path.is_file()}
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(found)}


def lost(place: Path, before: dict[str, bytes], name: str, fault: Fault) -> list[str]:
    """What was sound before, outside of what was broken, and is not there as it was."""
    gone = []
    for path, data in before.items():
        spared = path.startswith((MAY_REMOVE.get(name, "\0"), *fault.spoils))
        if not spared:
            there = place / path
            if not there.is_file() or there.read_bytes() != data:
                gone.append(path)
    return gone


def case(made: Path, name: str, fault: Fault) -> tuple[Said, list[str]]:
    """A command meets a fault on a fresh copy of ``made``: what it said, and what was lost."""
    place = shutil.copytree(made, made.with_name("place"), symlinks=True)
    try:
        before = sound(place)
        fault.break_files(place)
        said = forked(place, fault.words(COMMANDS[name]), fault.break_process)
        return said, lost(place, before, name, fault)
    finally:
        shutil.rmtree(place)


def cases() -> Iterator[tuple[str, Fault]]:
    """Every command with every fault that it may meet."""
    for fault in outside_faults.FAULTS:
        yield from ((name, fault) for name in COMMANDS if fault.meets(name, COMMANDS[name]))


def measure(count: int | None, seed: int, minutes: float, verbose: bool) -> dict[str, Any]:
    counts, wrong, begun = Counter[str](), list[dict[str, Any]](), time.monotonic()
    by_fault: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made, every = make(Path(folder)), list(cases())
        for name, fault in random.Random(seed).sample(every, min(count or len(every), len(every))):
            if time.monotonic() - begun > 60 * minutes:
                break
            said, gone = case(made, name, fault)
            verdict = "lost work" if gone else said.verdict
            counts[verdict] += 1
            by_fault.setdefault(fault.kind, Counter())[verdict] += 1
            if verdict not in ("done", "one line"):
                last = (said.err.strip().splitlines() or [""])[-1]
                wrong.append({"command": name, "fault": fault.name, "said": last[:300]})
                print(f"{verdict}: {name} | {fault.name} | {last[:200]} {gone[:2]}", flush=True)
            elif verbose:
                print(f"{verdict}: {name} | {fault.name} | {said.err[-160:]!r}", flush=True)
    for verdict in ("done", "one line", "traceback", "lost work"):
        counts[verdict] += 0
    return {
        "claim": CLAIM,
        **dict.fromkeys(("machine", "versions")),
        "n": counts.total(),
        "of": len(every),
        "seed": seed,
        "commands": len(COMMANDS),
        "faults": len(outside_faults.FAULTS),
        **{verdict.replace(" ", "_"): n for verdict, n in sorted(counts.items())},
        "by_kind": {kind: dict(sorted(n.items())) for kind, n in sorted(by_fault.items())},
        "wrong": wrong,
        "seconds": round(time.monotonic() - begun, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", type=int, help="only so many cases")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args()
    import measuring

    found = measure(chosen.draw, chosen.seed, chosen.minutes, chosen.verbose)
    measuring.keep(found, chosen.out, show=True)
