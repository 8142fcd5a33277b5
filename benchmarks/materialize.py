"""Writing a level: at the speed of its slowest part, in little memory.

Claim: x_j is written at 0.9 or more of the rate of the bare forward pass of layer j where that
limits; at 0.85 or more of the rate of a bare write with fsync where the forward pass is trivial; in
at most 512 MB beyond what the process had, whatever the number of images.

Method: `strata.pipeline.materialize.materialize.materialize` itself, on runs made here (random
images, one epoch), against the same layer applied to blocks that lie in memory as float32 in the
layout that it likes (`forward`), and against files of the same bytes, each written and synced. All
in one process with the same threads and allocator, interleaved; a ratio is the median over the
rounds. What lies between: `encoded` is the forward pass from stored rows in memory to stored rows
in memory, with the changes of layout and precision. A trivial forward pass hands on the rows that
it is given (`through`), or is the identity under the numeric policy (`identity`: to float32,
channels last, and back). `cpu_seconds` says what the cores had to do: no rate is above that of all
of them at work. Memory is anonymous memory of the process, looked at every 2 ms.

    python benchmarks/materialize.py [--cases CASE …] [--quick] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from durability_cost import bare
from measuring import RESULTS, Peak, keep, ratio, seconds
from random_run import CPU, make_run
from torch import Tensor, nn

import checkout  # noqa: F401
from strata.pipeline.feed.features import Features, features, level_draws
from strata.pipeline.materialize import materialize
from strata.pipeline.plan import hardware
from strata.pipeline.run import rundir
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.stages.network.featurize import Frozen
from strata.store.feature_store import Store
from strata.store.read.rows import Rows

TRAIN = 256
LAYERS = {
    "cifar10-k1 layer 2": ("cifar10-k1", 2, 1536),
    "cifar10-small layer 2": ("cifar10-small", 2, 24576),
}
"""Recipe, layer, and test images: what is written are the features of those."""
CASES = (*LAYERS, "trivial", "memory")
AT_LEAST = {"compute": 0.9, "through": 0.85}
MOST_MEMORY = 512e6


# ---- a forward pass that limits -----------------------------------------------------------------


def against_forward(place: Path, name: str, j: int, images: int, rounds: int) -> dict[str, Any]:
    """x_j written, and layer j applied to as many blocks."""
    session = make_run(place, name, train=TRAIN, test=images)
    algorithm.make(session, solve=j, write=j - 1)
    source, block = features(session, j, "test"), session.run.recipe.cache.block
    with source.delivery(once=True) as delivery:
        count = -(-min(4 * block, images) // block)
        rows = Rows.of(np.arange(count * block))
        stored = [part.clone() for part in delivery.batches(rows, [block] * count)]
    draws = level_draws(session.run.recipe, session.run.seed, "clean", block)
    layer = source.layers[-1].layer
    out = torch.empty_like(source.values(stored[0], draws, encode=True))
    channels = session.run.recipe.shape(j - 1, session.run.recipe.augment.crop)[0]
    assert source.stored is not None
    blocks = [source.stored.decode(part, channels) for part in stored]

    @torch.no_grad()
    def forward() -> None:
        for number in range(images // block):
            layer(blocks[number % len(blocks)])

    def encoded() -> None:
        for number in range(images // block):
            out.copy_(source.values(stored[number % len(stored)], draws, encode=True))

    works = {"forward": forward, "encoded": encoded, "materialize": lambda: write(session, j)}
    times = Times(works, rounds, before=lambda: remove(session, j))
    level = session.store.open(session.key(j, "test", "clean"))
    return {
        "images": images,
        "bytes": level.nbytes,
        "images_per_s": {w: round(images / statistics.median(t), 1) for w, t in times.wall.items()},
        "cpu_seconds": times.cpu_seconds(),
        "ratio_materialize_to_forward": ratio(times.wall["forward"], times.wall["materialize"]),
        "ratio_encoded_to_forward": ratio(times.wall["forward"], times.wall["encoded"]),
        "shares": session.run.features(j)["levels"]["test"]["shares"],  # pyright: ignore
    }


class Times:
    """Of some works, in every round but the first: wall clock, and what the cores did."""

    def __init__(
        self, works: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object]
    ) -> None:
        self.wall: dict[str, list[float]] = {what: [] for what in works}
        self.user, self.kernel = copy.deepcopy(self.wall), copy.deepcopy(self.wall)
        for number in range(rounds + 1):
            for what, work in works.items():
                before()
                begun = os.times()
                taken = seconds(work)
                ended = os.times()
                if number:
                    self.wall[what].append(taken)
                    self.user[what].append(ended.user - begun.user)
                    self.kernel[what].append(ended.system - begun.system)

    def cpu_seconds(self) -> dict[str, dict[str, float]]:
        """Medians."""
        both = {"user": self.user, "kernel": self.kernel}
        return {
            what: {name: round(statistics.median(t[what]), 2) for name, t in both.items()}
            for what in self.wall
        }


def write(session: Session, j: int) -> None:
    materialize.materialize(session, j)


def remove(session: Session, j: int) -> None:
    session.store.remove(j, session.run.nodes()[j].fingerprint)
    gc.collect()


# ---- a forward pass that does not ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Through(Features):
    """Hands on what it is given."""

    def values(self, stored: Tensor, draws: Any, *, encode: bool = False) -> Tensor:
        return stored


def trivial(kind: str) -> Callable[..., Features]:
    """In the place of ``strata.pipeline.feed.features.features``."""

    def found(session: Session, depth: int, split: str, **rest: bool) -> Features:
        real = features(session, depth, split, **rest)
        if kind == "through":
            return Through(**vars(real))
        identity: Any = nn.Identity()
        return dataclasses.replace(real, layers=[Frozen(identity, real.layers[-1].stored)])

    return found


def against_write(place: Path, kinds: list[str], images: int, rounds: int) -> dict[str, Any]:
    """x_2 written as a copy of x_1, and files of as many bytes."""
    session = make_run(place, "cifar10-k2", train=TRAIN, test=images)
    algorithm.make(session, solve=2, write=2)
    level = session.store.open(session.key(2, "test", "clean"))
    shape, nbytes = level.geometry, level.nbytes
    rows = np.ascontiguousarray(np.moveaxis(level.read(0, shape.shard_rows), 1, -1))  # as they lie
    del level

    def before() -> None:
        remove(session, 2)
        shutil.rmtree(place / "bare", ignore_errors=True)

    def as_written(kind: str) -> None:
        if kind == "bare":
            return bare(place / "bare", shape, rows)
        with replaced(materialize, "features", trivial(kind)):
            write(session, 2)

    works = {kind: partial(as_written, kind) for kind in ("bare", *kinds)}
    times = Times(works, rounds, before)
    before()
    rates = {k: round(nbytes / statistics.median(t) / 1e9, 3) for k, t in times.wall.items()}
    found = {"bytes": nbytes, "shards": shape.shards, "gb_per_s": rates}
    found["cpu_seconds"] = times.cpu_seconds()
    for kind in kinds:
        found[f"ratio_{kind}_to_bare_write"] = ratio(times.wall["bare"], times.wall[kind])
    return found


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, real)


# ---- memory -------------------------------------------------------------------------------------


def memory(place: Path, images: list[int]) -> dict[str, Any]:
    """Peaks of writing x_2 of `cifar10-small`, for several numbers of images, each by a process
    that has done nothing before: freed memory that is kept would hide what is used."""
    peaks = {}
    for count in images:
        here = place / str(count)
        here.mkdir()
        session = make_run(here, "cifar10-small", train=TRAIN, test=count)
        algorithm.make(session, solve=2, write=1)
        with multiprocessing.get_context("spawn").Pool(1) as process:
            peaks[str(count)] = process.apply(peak_of_writing, (here,))
        shutil.rmtree(here)
    return {"peak_bytes_by_images": peaks}


def peak_of_writing(place: Path) -> int:
    run = rundir.find(place / "run")
    assert run is not None
    hardware.keep_freed_memory()
    with Peak() as peak:
        write(Session(run, Store(place / "store"), CPU), 2)
    return peak.nbytes


# ---- all ----------------------------------------------------------------------------------------


def measure(title: str, place: Path, *, quick: bool) -> dict[str, Any]:
    """One case."""
    rounds = 1 if quick else 5
    if title == "trivial":
        images = 1024 if quick else 8192
        return against_write(place, ["through", "identity"], images, 2 * rounds)
    if title == "memory":
        return memory(place, [2_000, 8_000] if quick else [8_000, 32_000])
    name, j, images = LAYERS[title]
    return against_forward(place, name, j, images // 4 if quick else images, rounds)


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="materialize-", dir=Path.cwd()) as place:
        yield Path(place)


def verdict(found: dict[str, Any]) -> dict[str, bool]:
    best = found["cifar10-k1 layer 2"]["ratio_materialize_to_forward"]["median"]
    through = found["trivial"]["ratio_through_to_bare_write"]["median"]
    peak = max(found["memory"]["peak_bytes_by_images"].values())
    return {
        "compute": best >= AT_LEAST["compute"],
        "trivial": through >= AT_LEAST["through"],
        "memory": peak <= MOST_MEMORY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="default: all; others stay")
    parser.add_argument("--quick", action="store_true", help="small, once: does it run?")
    parser.add_argument("--json", action="store_true", help="the result on stdout")
    parser.add_argument("--out", type=Path, help="default: the committed result, if not --quick")
    options = parser.parse_args()
    hardware.keep_freed_memory()
    out = options.out or (None if options.quick else RESULTS / "materialize.json")
    known = json.loads(out.read_text("utf-8")) if out and out.exists() else {}
    found = {title: known[title] for title in CASES if title in known}
    for title in options.cases or CASES:
        with workplace() as place:
            found[title] = measure(title, place, quick=options.quick)
        print(title, json.dumps(found[title]), file=sys.stderr, flush=True)
        if out:  # whoever stops it keeps what there is
            keep({**found, **holds(found)}, out, show=False)
    if options.json or not out:
        keep({**found, **holds(found)}, None, show=True)


def holds(found: dict[str, Any]) -> dict[str, Any]:
    return {"holds": verdict(found)} if found.keys() >= set(CASES) else {}


if __name__ == "__main__":
    main()
