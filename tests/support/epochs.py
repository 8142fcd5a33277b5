"""Epochs of a solver on batches that are at hand, as pipeline/train/loop.py does them on a feed."""

from __future__ import annotations

from strata.stages.solve.solve import Batches, Solver


def run_epoch(solver: Solver, batches: Batches, steps: int) -> dict[str, float]:
    """Train on the batches that are left of an epoch of so many steps: mean loss and accuracy."""
    solver.problem.train()
    for x, y in batches:
        solver.train_on(x, y, steps)
    return solver.finish_epoch()
