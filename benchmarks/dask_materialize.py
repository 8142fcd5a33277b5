"""Claim: one worker writes a level at 0.9 or more of the rate of the process alone, on shards of
64 MB, and two workers at 1.7 times the rate of one or more, where there are two cores for them;
the bytes are the same.

Method: x_2 of two recipes on random images (one epoch), written by this process with one thread
(`alone`) and with all (`alone_all`), by one worker of one thread (`one`), and by two of those
(`two`). Every worker is a process of its own, reached over TCP, that has written the level once
before; starting it, and loading layers, is not in the seconds. The four follow each other in every
round, and a ratio is the median over the rounds. After each the content root must be that of
`alone`, but for `alone_all`, whose kernels may round otherwise. What workers share with their
publishing threads are the cores of this machine: `cores` says how many there are.

Rounds are kept as they come, and whoever starts it again goes on where it was.

    python benchmarks/dask_materialize.py [--cases CASE …] [--rounds N] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from materialize import TRAIN, remove, write
from measuring import RESULTS, keep, ratio, seconds
from random_run import make_run

import checkout  # noqa: F401
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.materialize.cluster.cluster import Workers
from strata.pipeline.plan import hardware
from strata.pipeline.progress import Reporter
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm

CASES = {
    "cifar10-k1 layer 2": ("cifar10-k1", 2, 1536),
    "cifar10-small layer 2": ("cifar10-small", 2, 24576),
}
"""Recipe, layer, and test images: in the first the forward pass limits, in the second it is so
cheap that publishing counts."""
WORKERS = {"one": 1, "two": 2}
WORKS = ("alone", "alone_all", *WORKERS)
AT_LEAST = {"one_to_alone": 0.9, "two_to_one": 1.7}
QUICK = 8
"""How many times fewer images."""


@contextmanager
def hands(count: int) -> Iterator[Workers]:
    """Workers of one thread each."""
    crew = Workers(count, None, "cpu", Reporter(), Interruptions())
    crew.begin()
    try:
        yield crew
    finally:
        crew.close()


def rounds(
    place: Path, case: str, images: int, known: dict[str, list[float]], count: int
) -> Iterator[dict[str, list[float]]]:
    """Seconds of every work, longer by one after each round.

    Args:
        known: of rounds that were measured before.
        count: rounds in all.
    """
    name, j, _ = CASES[case]
    session = make_run(place, name, train=TRAIN, test=images)
    algorithm.make(session, solve=j, write=j - 1)
    torch.set_num_threads(1)
    with ExitStack() as open_crews:
        sessions = {"alone": session, "alone_all": session}
        for work, workers in WORKERS.items():
            crew = open_crews.enter_context(hands(workers))
            sessions[work] = dataclasses.replace(session, crew=crew)
            one_round(sessions[work], j, work)  # so that every worker has its layers
        while len(known["alone"]) < count:
            roots = {}
            for work, own in sessions.items():
                taken, roots[work] = one_round(own, j, work)
                known[work].append(taken)
            same = {root for work, root in roots.items() if work != "alone_all"}
            assert len(same) == 1, f"{case}: other bytes by other workers: {roots}"
            yield known


def one_round(session: Session, j: int, work: str) -> tuple[float, str]:
    """Seconds of writing x_j, and what is in it."""
    remove(session, j)
    torch.set_num_threads(cores() if work == "alone_all" else 1)
    taken = seconds(lambda: write(session, j))
    torch.set_num_threads(1)
    return taken, session.store.open(session.key(j, "test", "clean")).content_root


def cores() -> int:
    return len(os.sched_getaffinity(0))


def figures(case: str, images: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Rates and ratios of what was measured so far."""
    return {
        "images": images,
        "cores": cores(),
        "seconds": {work: [round(t, 3) for t in taken] for work, taken in times.items()},
        "ratios": {
            "one_to_alone": ratio(times["alone"], times["one"]),
            "two_to_one": ratio(times["one"], times["two"]),
            "two_to_alone_all": ratio(times["alone_all"], times["two"]),
        },
    }


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Does the claim hold, over all cases that were measured?"""
    if not found.keys() >= set(CASES):
        return {}
    holds = {
        name: min(found[case]["ratios"][name]["median"] for case in CASES) >= least
        for name, least in AT_LEAST.items()
    }
    return {"holds": holds}


def table(found: dict[str, Any]) -> list[str]:
    """Rows of docs/cluster.md."""
    rows = []
    for case in CASES:
        one = found[case]
        times = [f"{statistics.median(one['seconds'][work]):.1f} s" for work in WORKS]
        ratios = [f"{r['median']:.2f}" for r in one["ratios"].values()]
        rows.append(f"| {case} | {' | '.join([*times, *ratios])} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="default: all; others stay")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small, once: does it run?")
    parser.add_argument("--out", type=Path, help="default: the committed result, if not --quick")
    options = parser.parse_args()
    hardware.keep_freed_memory()
    out = options.out or (None if options.quick else RESULTS / "dask_materialize.json")
    known = json.loads(out.read_text("utf-8")) if out and out.exists() else {}
    found = {case: known[case] for case in CASES if case in known}
    for case in options.cases or CASES:
        images = CASES[case][2] // (QUICK if options.quick else 1)
        times = found.get(case, {}).get("seconds") or {work: [] for work in WORKS}
        count = 1 if options.quick else options.rounds
        if len(times["alone"]) >= count:
            continue
        with tempfile.TemporaryDirectory(prefix="dask-", dir=Path.cwd()) as place:
            for longer in rounds(Path(place), case, images, times, count):
                found[case] = figures(case, images, longer)
                print(case, json.dumps(found[case]), file=sys.stderr, flush=True)
                if out:  # whoever stops it keeps what there is
                    keep({**found, **verdict(found)}, out, show=False)
    if not out:
        keep({**found, **verdict(found)}, None, show=True)


if __name__ == "__main__":
    main()
