"""A training step that is fed from cached features, against the same step on a tensor in memory.

Layer 2 of `cifar10-small` from canvases of x_1 (float16, raw), a crop per sample: what a step has
to wait for, and what de-quantisation, crops and the change of layout cost it. Rounds of both are
interleaved in one process, on the same solver.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from measuring import ratio, seconds
from random_run import CPU, make_run

import checkout  # noqa: F401
from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.plan import hardware
from strata.pipeline.run import device as devices
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.stages.network.network import build_problem
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver


def fed_against_memory(
    place: Path,
    images: int,
    rounds: int,
    steps: int,
    *,
    device: torch.device = CPU,
    tier: str = "auto",
) -> dict[str, Any]:
    """Images per second of both, and the ratio of the rates.

    Args:
        images: to train on; as many as ``steps`` batches, at least.
    """
    hardware.keep_freed_memory()
    session = make_run(
        place, "cifar10-small", train=images, test=256, canvas=True, device=device, tier=tier
    )
    algorithm.make(session, solve=1, write=1)
    solver = solver_of(session, rounds)
    with ProblemFeed(session, 1) as feed:
        x, y = next(iter(feed.epoch(0)))
        x, y = x.clone(memory_format=torch.channels_last), y.clone()

        def train(batches: Any) -> float:
            def work() -> None:
                for x, y in batches:
                    solver.train_on(x, y, steps)
                solver.finish_epoch()
                devices.finish(device)

            return seconds(work)

        times: dict[str, list[float]] = {"fed": [], "memory": []}
        for round_ in range(rounds + 1):
            fed = train(itertools.islice(feed.epoch(round_), steps))
            memory = train(itertools.repeat((x, y), steps))
            if round_:
                times["fed"].append(fed)
                times["memory"].append(memory)
    rows = steps * feed.batch
    rates = {name: [rows / t for t in taken] for name, taken in times.items()}
    return {
        "images_per_s": {name: round(sorted(r)[len(r) // 2], 1) for name, r in rates.items()},
        "ratio_fed_to_memory": ratio(rates["fed"], rates["memory"]),
    }


def solver_of(session: Session, rounds: int) -> Solver:
    """Of layer 2, at a rate that does not change."""
    recipe = session.run.recipe
    problem = build_problem(recipe.layers[1], recipe.auxiliaries[1], 0)
    schedule = SGDSchedule("step", 2 * rounds + 2, recipe.schedule.batch, 0.01, 0.9, 5e-4)
    return Solver(problem, schedule, session.device, torch.float32)
