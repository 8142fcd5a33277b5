"""Memory of training layer by layer, against training the same network end to end.

Claim: the network of `cifar10-k1`, batch 128, takes layer by layer, from cached features, at most
1/5 of the peak tensor bytes of backpropagation end to end, and less than backpropagation with
checkpointing in micro-batches of the same size; and under a cap of 2 GB of tensor bytes the largest
VGG-like network that trains has at least 2.5 times the parameters of the largest that trains end to
end with checkpointing and micro-batches of 1, and 4 times from 16 layers on. End to end is trained
by torch.optim.SGD, whose gradients are there whole; layers as Strata solves them, whose large
gradients go straight into the momentum. Both ways are measured by the other optimiser, too.

Method: `cases` takes two steps of each way to train, fed by `ProblemFeed` from levels that a run
has written (random images), each in a process of its own: tensor bytes are counted by
`strata.stages.memory.watched` (weights, gradients, momentum, activations, the batch), and the peak
of the process is given beside, less what it was before there was a network. images/s is of the
second step alone (n = 1), and no comparison between two ways: it tells what micro-batches cost. A
greedy run's peak is that of its highest layer. `recipes` and `largest` count tensors without
content (memory_cases.py), which agree with real ones to the byte; the largest networks are then
trained in truth for two steps of two images. float32. Two cores; tensor bytes do not depend on the
machine.

    python benchmarks/memory.py [--parts PART …] [--quick] [--again] [--json] [--out FILE]

What is in FILE already is not measured again, unless --again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measuring import CPU, RESULTS, keep
from memory_cases import (
    STEPS,
    Case,
    Family,
    Net,
    greedy_peak,
    largest,
    net_of,
    peak,
    peak_of_steps,
)
from random_run import make_run
from torch import nn

import checkout  # noqa: F401
from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.options import Options
from strata.pipeline.plan import hardware
from strata.pipeline.recipe.builtin import load
from strata.pipeline.run import device, rundir
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.stages.network.network import build_problem
from strata.stages.solve.baseline import build_end_to_end
from strata.stages.solve.solve import Batches, Solver
from strata.store.feature_store import Store

RECIPE, BATCH, MICRO = "cifar10-k1", 128, 16
CAP = 2_000_000_000
AT_MOST, AT_LEAST, AT_LEAST_SHALLOW = 1 / 5, 4, 2.5
DEEP = 16
"""Layers from which a network is not shallow."""
BEFORE = (2, BATCH), (4, MICRO)
"""Layers that take most, and how many rows at a time: with torch.optim.SGD, too."""
FAMILIES = (
    Family((2, 1, 2), k=1),
    Family((2, 2, 2, 2), k=1),
    Family((4, 4, 4, 4), k=1),
    Family((8, 8, 8, 8), k=1),
    Family((8, 8, 8, 8), k=2),
    Family((1, 1, 1, 1), k=1, width=128),
)
DEEPER = 10
"""Where depth grows, greedy peaks stay: looked at with so many times the layers."""
WIDEST = 512
"""Most eights of a first stage, or layers per stage, that are looked at."""
PARTS = ("cases", "recipes", "largest")
STRAIGHT, TORCH = ", straight", ", torch.optim.SGD"
Found = dict[str, Any]
Measure = Callable[[Net, Case], int]
"""Peak bytes of a case."""


# ---- one network, in truth -----------------------------------------------------------------------


def all_cases(layers: int) -> list[Case]:
    both = [(checkpointing, micro) for micro in (BATCH, MICRO) for checkpointing in (False, True)]
    whole = [Case(None, checkpointing, BATCH, micro) for checkpointing, micro in both]
    straight = [Case(None, False, BATCH, micro, swapped=True) for micro in (BATCH, MICRO)]
    before = [Case(j, False, BATCH, micro, swapped=True) for j, micro in BEFORE]
    return [*whole, *straight, *before] + [
        Case(j, False, BATCH, micro) for micro in (BATCH, MICRO) for j in range(1, layers + 1)
    ]


def prepare(place: Path, on: torch.device, width: int | None) -> Session:
    """A run on as many images as two steps take, with x_1 … x_{J-1} as canvases."""
    session = make_run(
        place, RECIPE, train=STEPS * BATCH, test=10, canvas=True, device=on, width=width
    )
    algorithm.make(session, solve=session.run.layers - 1)
    for j in range(1, session.run.layers):
        algorithm.make(session, write=j)
    return session


def alone(place: Path, case: Case, on: torch.device) -> Found:
    """A case in a process that has done nothing before."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(measured, (place, case, on))


def measured(place: Path, case: Case, on: torch.device) -> Found:
    """Two steps of a case, from the levels that lie there."""
    run = rundir.find(place / "run")
    assert run is not None
    session = Session(run, Store(place / "store"), on, options=Options(tier="memory"))
    if on.type == "cpu":
        hardware.keep_freed_memory()
    before, times = hardware.peak_memory_bytes() or 0, list[float]()
    plan = dataclasses.replace(run.recipe.schedule, accumulate=-(-BATCH // case.micro), lr=1e-30)
    solver = Solver(network(session, case), plan, on, session.compute, straight=case.straight)
    with ProblemFeed(session, (case.layer or 1) - 1) as feed:
        parts = plan.accumulate
        batches = feed.epoch_in_parts(0, 0, parts) if parts > 1 else feed.epoch(0)
        nbytes = peak_of_steps(solver, timed(islice(batches, STEPS), times, on))
    return {
        "tensor_bytes": nbytes,
        "process_bytes": (hardware.peak_memory_bytes() or 0) - before,
        "images_per_s": round(BATCH / times[-1], 1),
    }


def network(session: Session, case: Case) -> nn.Module:
    recipe = session.run.recipe
    if case.layer is not None:
        j = case.layer
        return build_problem(recipe.layers[j - 1], recipe.auxiliaries[j - 1], 0)
    return build_end_to_end(
        recipe.layers, recipe.auxiliaries[-1], 0, checkpointing=case.checkpointing
    )


def timed(batches: Batches, times: list[float], on: torch.device) -> Iterator[Any]:
    """Seconds from the moment when a batch is there to the end of its step."""
    for batch in batches:
        begun = time.perf_counter()
        yield batch
        device.finish(on)
        times.append(time.perf_counter() - begun)


def summary(found: Found) -> Found:
    """Ratios of peaks; a greedy run's is that of its highest layer."""
    plain, of = found[Case(None, False, BATCH, BATCH).name]["tensor_bytes"], {}
    for micro in (BATCH, MICRO):
        way = f", {micro} of {BATCH}"
        layers = {n: c for n, c in found.items() if n.startswith("greedy") and n.endswith(way)}
        highest = max(layers, key=lambda name: layers[name]["tensor_bytes"])
        nbytes = layers[highest]["tensor_bytes"]
        checkpointed = found[Case(None, True, BATCH, micro).name]["tensor_bytes"]
        before = found[f"{highest}, torch.optim.SGD"]["tensor_bytes"]
        straight = found[Case(None, False, BATCH, micro, swapped=True).name]["tensor_bytes"]
        of[str(micro)] = {
            "highest": highest,
            "ratio_to_torch_sgd": round(nbytes / before, 4),
            "ratio_to_straight": round(nbytes / straight, 4),
            "tensor_bytes": nbytes,
            "ratio_to_plain": round(nbytes / plain, 4),
            "ratio_to_checkpointing": round(nbytes / checkpointed, 4),
            "images_per_s": round(1 / sum(1 / c["images_per_s"] for c in layers.values()), 1),
        }
    return of


# ---- counted without content ---------------------------------------------------------------------


def counted(net: Net, case: Case) -> int:
    return peak(net, case, device=CPU, fake=True)


def of_recipe(name: str, batch: int) -> Found:
    """Peaks of a recipe's network in every way, and its highest layer."""
    net, found = net_of(load(name)[1]), {}
    for micro in (batch, MICRO):
        for checkpointing in (False, True):
            case = Case(None, checkpointing, batch, micro)
            found[case.name] = counted(net, case)
        for swapped in (False, True):
            case = Case(1, False, batch, micro, swapped)
            nbytes, layer = greedy_peak(net, case, counted)
            name = case.name.replace(", layer 1", "")
            found[name] = {"tensor_bytes": nbytes, "layer": layer}
    return found


def largest_of(family: Family, measure: Measure, cap: int) -> Found:
    """The largest networks of a family under a cap, end to end and layer by layer."""
    found, sizes = Found(), dict[str, int]()
    for way, swapped in (("", False), (STRAIGHT, True)):
        end_to_end = Case(None, True, BATCH, 1, swapped)
        size = largest(lambda size: measure(family.net(size), end_to_end) <= cap, WIDEST)  # noqa: B023
        net = family.net(size)
        found[f"end to end{way}"] = fact(net, measure(net, end_to_end))
        sizes[f"end to end{way}"] = size
    for way, swapped in (("", False), (TORCH, True)):
        greedy = Case(1, False, BATCH, 1, swapped)

        def highest(size: int) -> tuple[int, int]:
            return greedy_peak(family.net(size), greedy, measure)  # noqa: B023

        size = DEEPER * sizes["end to end"]
        if family.width is None:
            size = largest(lambda size: highest(size)[0] <= cap, WIDEST)
        nbytes, layer = highest(size)
        found[f"greedy{way}"] = {**fact(family.net(size), nbytes), "highest_layer": layer}
        sizes[f"greedy{way}"] = size
    whole, *others = (found[f"end to end{way}"]["parameters"] for way in ("", STRAIGHT))
    new, old = (found[f"greedy{way}"]["parameters"] for way in ("", TORCH))
    limited = "the cap" if family.width is None else f"nothing: looked at {DEEPER} times the layers"
    return {
        **found,
        "sizes": sizes,
        "ratio_parameters": round(new / whole, 2),
        "ratio_before": round(old / whole, 2),
        "ratio_both_straight": round(new / others[0], 2),
        "greedy_is_limited_by": limited,
    }


def in_truth(family: Family, found: Found) -> Found:
    """With the peaks of the largest networks, trained for two steps with real tensors."""
    for way in ("end to end", "greedy"):
        case = Case(found[way].get("highest_layer"), way == "end to end", BATCH, 1)
        nbytes = peak(family.net(found["sizes"][way]), case, device=CPU, fake=False)
        found[way]["tensor_bytes_in_truth"] = nbytes
    return found


def fact(net: Net, nbytes: int) -> Found:
    return {
        "parameters": net.parameters,
        "layers": len(net.layers),
        "first_width": net.layers[0].width,
        "tensor_bytes": nbytes,
    }


# ---- all -----------------------------------------------------------------------------------------


def titles(part: str, *, quick: bool) -> list[str]:
    if part == "cases":
        return [case.name for case in all_cases(len(load(RECIPE)[1].layers))]
    if part == "recipes":
        names = ("cifar10-k1", "cifar10-k2", "cifar10-k3")[: 1 if quick else 3]
        return [f"{name}, batch {batch}" for name in names for batch in (128, 512)]
    return [family.name for family in FAMILIES[: 1 if quick else None]]


def measure(part: str, title: str, place: Path, *, quick: bool) -> Found:
    """One entry of a part."""
    if part == "cases":
        if not (place / "run").exists():
            prepare(place, CPU, 16 if quick else None)
        cases = {case.name: case for case in all_cases(len(load(RECIPE)[1].layers))}
        return alone(place, cases[title], CPU)
    if part == "recipes":
        name, _, batch = title.partition(", batch ")
        return of_recipe(name, int(batch))
    family = next(family for family in FAMILIES if family.name == title)
    return in_truth(family, largest_of(family, counted, CAP))


def verdict(found: Found) -> Found:
    """What holds, once all is there."""
    if not all(found.get(part, {}).keys() >= set(titles(part, quick=False)) for part in PARTS):
        return {}
    greedy = summary(found["cases"])
    families = {
        name: (entry["ratio_parameters"], entry["end to end"]["layers"] >= DEEP)
        for name, entry in found["largest"].items()
    }
    holds = {
        "fifth_of_plain": min(g["ratio_to_plain"] for g in greedy.values()) <= AT_MOST,
        "below_checkpointing": max(g["ratio_to_checkpointing"] for g in greedy.values()) < 1,
        **{
            f"{'four_times' if deep else 'two_and_a_half_times'}: {name}": ratio
            >= (AT_LEAST if deep else AT_LEAST_SHALLOW)
            for name, (ratio, deep) in families.items()
        },
    }
    return {"greedy": greedy, "holds": holds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="small, little: does it run?")
    parser.add_argument("--again", action="store_true", help="measure what is known, too")
    parser.add_argument("--json", action="store_true", help="the result on stdout")
    parser.add_argument("--out", type=Path, help="default: the committed result, if not --quick")
    options = parser.parse_args()
    out = options.out or (None if options.quick else RESULTS / "memory.json")
    known = json.loads(out.read_text("utf-8")) if out and out.exists() else {}
    found = {part: known.get(part, {}) for part in PARTS}
    with tempfile.TemporaryDirectory(prefix="memory-", dir=Path.cwd()) as place:
        for part in options.parts:
            for title in titles(part, quick=options.quick):
                if title in found[part] and not options.again:
                    continue
                found[part][title] = measure(part, title, Path(place), quick=options.quick)
                print(title, json.dumps(found[part][title]), file=sys.stderr, flush=True)
                if out:  # whoever stops it keeps what there is
                    keep({**found, **verdict(found)}, out, show=False)
        shutil.rmtree(Path(place) / "store", ignore_errors=True)
    if options.json or not out:
        keep({**found, **verdict(found)}, None, show=True)


if __name__ == "__main__":
    main()
