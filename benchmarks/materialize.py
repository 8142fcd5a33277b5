"""Writing a level: at the speed of its slowest part, in little memory.

Claim: x_j is written at 0.9 or more of the rate of the bare forward pass of layer j where that
limits; at 0.85 or more of the rate of a bare write with fsync where the forward pass is trivial; in
at most 512 MB beyond what the process had, whatever the number of images.

Method: `pipeline.materialize.materialize` itself, on runs made here (random images, one epoch),
against the same layer applied to blocks that lie in memory as float32 in the layout that it likes,
and against files of the same bytes, each written and synced. Both in one process with the same
threads and allocator, interleaved; a ratio is the median over the pairs. A trivial forward pass
hands on the rows that it is given (`through`), or is the identity under the numeric policy
(`identity`: to float32, channels last, and back). Memory is anonymous memory of the process, looked
at every 2 ms.

    python benchmarks/materialize.py [--quick] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from durability_cost import bare
from measuring import RESULTS, Peak, keep, ratio, seconds
from random_run import CPU, make_run
from torch import Tensor, nn

from pipeline import algorithm, device, materialize, rundir
from pipeline.session import Session
from pipeline.source import Features, features
from stages.featurize import Frozen
from store.feature_store import Store

TRAIN = 256
LAYERS = {
    "cifar10-k1 layer 2": ("cifar10-k1", 2, 1536),
    "cifar10-small layer 2": ("cifar10-small", 2, 24576),
}
"""Recipe, layer, and test images: what is written are the features of those."""
AT_LEAST = {"compute": 0.9, "through": 0.85}
MOST_MEMORY = 512e6


# ---- a forward pass that limits -----------------------------------------------------------------


def against_forward(place: Path, name: str, j: int, images: int, pairs: int) -> dict[str, Any]:
    """x_j written, and layer j applied to as many blocks."""
    session = make_run(place, name, train=TRAIN, test=images)
    algorithm.make(session, solve=j, write=j - 1)
    source, block = features(session, j, "test"), session.run.recipe.cache.block
    with source.delivery(once=True) as delivery:
        parts = [np.arange(at, at + block) for at in range(0, 4 * block, block)]
        assert source.stored is not None
        width = source.recipe.shape(j - 1, source.recipe.augment.crop)[2]
        blocks = [source.stored.decode(stored, width) for stored in delivery.batches(parts)]
    layer, count = source.layers[-1].layer, images // block

    @torch.no_grad()
    def forward() -> None:
        for number in range(count):
            layer(blocks[number % len(blocks)])

    times: dict[str, list[float]] = {"materialize": [], "forward": []}
    for pair in range(pairs + 1):
        remove(session, j)
        for what, work in (("materialize", lambda: write(session, j)), ("forward", forward)):
            taken = seconds(work)
            times[what] += [taken] if pair else []
    level = session.store.open(session.key(j, "test", "clean"))
    return {
        "images": images,
        "bytes": level.nbytes,
        "images_per_s": {w: round(images / statistics.median(t), 1) for w, t in times.items()},
        "ratio_materialize_to_forward": ratio(times["forward"], times["materialize"]),
        "shares": session.run.features(j)["levels"]["test"]["shares"],  # pyright: ignore
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

    def encoded(self, stored: Tensor, draws: Any) -> Tensor:
        return stored


def trivial(kind: str) -> Callable[..., Features]:
    """In the place of ``pipeline.source.features``."""

    def found(session: Session, depth: int, split: str) -> Features:
        real = features(session, depth, split)
        if kind == "through":
            return Through(**vars(real))
        identity: Any = nn.Identity()
        return dataclasses.replace(real, layers=[Frozen(identity, real.layers[-1].stored)])

    return found


def against_write(place: Path, kinds: list[str], images: int, pairs: int) -> dict[str, Any]:
    """x_2 written as a copy of x_1, and files of as many bytes."""
    session = make_run(place, "cifar10-k2", train=TRAIN, test=images)
    algorithm.make(session, solve=2, write=2)
    level = session.store.open(session.key(2, "test", "clean"))
    shape, nbytes = level.geometry, level.nbytes
    rows = level.read(0, shape.shard_rows)
    del level
    times: dict[str, list[float]] = {kind: [] for kind in ("bare", *kinds)}
    for pair in range(pairs + 1):
        for kind in times:
            remove(session, 2)
            shutil.rmtree(place / "bare", ignore_errors=True)
            if kind == "bare":
                taken = seconds(lambda: bare(place / "bare", shape, rows))
            else:
                with replaced(materialize, "features", trivial(kind)):
                    taken = seconds(lambda: write(session, 2))
            times[kind] += [taken] if pair else []
    shutil.rmtree(place / "bare", ignore_errors=True)
    found: dict[str, Any] = {"bytes": nbytes, "shards": shape.shards}
    found["gb_per_s"] = {k: round(nbytes / statistics.median(t) / 1e9, 3) for k, t in times.items()}
    for kind in kinds:
        found[f"ratio_{kind}_to_bare_write"] = ratio(times["bare"], times[kind])
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
    device.keep_freed_memory()
    with Peak() as peak:
        write(Session(run, Store(place / "store"), CPU), 2)
    return peak.nbytes


# ---- all ----------------------------------------------------------------------------------------


def measure(*, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases by name, as they are finished."""
    device.keep_freed_memory()
    pairs = 1 if quick else 5
    for title, (name, j, images) in LAYERS.items():
        with workplace() as place:
            images = images // 4 if quick else images
            yield title, against_forward(place, name, j, images, pairs)
    with workplace() as place:
        images = 1024 if quick else 4096
        yield "trivial", against_write(place, ["through", "identity"], images, 2 * pairs)
    with workplace() as place:
        yield "memory", memory(place, [2_000, 8_000] if quick else [8_000, 32_000])


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
    parser.add_argument("--quick", action="store_true", help="small, once: does it run?")
    parser.add_argument("--json", action="store_true", help="the result on stdout")
    parser.add_argument("--out", type=Path, help="default: the committed result, if not --quick")
    options = parser.parse_args()
    out = options.out or (None if options.quick else RESULTS / "materialize.json")
    found: dict[str, Any] = {}
    for title, case in measure(quick=options.quick):
        found[title] = case
        print(title, json.dumps(case), file=sys.stderr, flush=True)
    keep({**found, "holds": verdict(found)}, out, show=options.json)


if __name__ == "__main__":
    main()
