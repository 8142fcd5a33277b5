"""Training a module on cached features from Python, with the solver that trains layers."""

from __future__ import annotations

from time import monotonic
from typing import Any

import numpy as np
from torch import nn

from strata.pipeline.api.features import LevelFeatures
from strata.pipeline.errors import OptionRange, own_errors
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.progress import reporter
from strata.pipeline.recipe.strict import read
from strata.pipeline.recipe.tables import Schedule
from strata.pipeline.run import device as devices
from strata.stages.errors import DataError
from strata.stages.solve.evaluate import hits
from strata.stages.solve.loss import check_logits
from strata.stages.solve.solve import Solver, logits_of
from strata.store.read.order import key_of

DEFAULTS = {"kind": "one-cycle", "epochs": 10, "batch": 256, "lr": 0.1}


def solve(
    problem: nn.Module,
    features: LevelFeatures,
    *,
    test: LevelFeatures | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    **schedule: Any,
) -> list[dict[str, Any]]:
    """Train a module on features, in place, as layers and classifiers are trained. From the same
    weights the same call on the same machine gives the same weights, to the bit.

    Args:
        problem: from x to logits (n, classes), or (n, token, classes). It moves to the device.
        features: with labels int64, from 0.
        test: judged after every epoch.
        seed: of the order, and of what the module draws.
        schedule: keys of a recipe's [schedule]; what is left out is as :data:`DEFAULTS`.

    Returns:
        For every epoch: ``epoch``, ``lr`` (of its last step), ``loss`` and ``top1`` (means over its
        training batches), ``test_top1`` (None without ``test``), ``seconds``.

    Raises:
        RecipeError, OptionRange, DeviceError: an argument cannot be.
        DataError: features have no labels, or logits do not fit them.
        Diverged: the loss is not finite.
    """
    with own_errors(), Interruptions() as stop:
        plan, report = read(Schedule, DEFAULTS | schedule, "schedule"), reporter(quiet=not progress)
        if plan.keep != "last":
            raise OptionRange(f"keep is {plan.keep!r}; from Python it may be 'last'")
        for one in filter(None, (features, test)):
            if one.labels.is_floating_point() or one.labels.min() < 0:
                raise DataError(f"{one!r} has no labels int64 from 0")
        chosen = devices.pick(device)
        compute = devices.dtype(devices.compute_dtype(plan.precision, chosen)[0])
        draws = lambda *step: key_of("draws of a step", seed, *step) % 2**63  # noqa: E731
        solver, history = Solver(problem, plan, chosen, compute, draws=draws), []
        rows, batch = len(features), min(plan.batch, len(features))
        feed = features.feed(batch, chosen, seed=seed, drop_last=True)
        with feed, report.task("solving", plan.epochs * rows, "samples") as tick:
            for epoch in range(plan.epochs):
                begun = monotonic()
                problem.train()
                for x, y in feed.epoch(epoch):
                    solver.train_on(x, y, len(feed))
                    tick(len(y))
                    stop.check()
                found: dict[str, Any] = {"lr": plan.rate((epoch + 1) * len(feed) - 1, len(feed))}
                found |= solver.finish_epoch() | {"test_top1": test and _top1(solver, test, batch)}
                history.append({"epoch": epoch + 1, **found, "seconds": monotonic() - begun})
                said = f"loss {found['loss']:.4f}, train {100 * found['top1']:.1f} %"
                said += f", test {100 * found['test_top1']:.1f} %" if test else ""
                report.say(f"epoch {epoch + 1} of {plan.epochs}: {said}")
        solver.settle()
        solver.finish()
        return history


def _top1(solver: Solver[nn.Module], test: LevelFeatures, batch: int) -> float:
    """Share of the test samples, or of their tokens, that the module is right about."""
    right = list[np.ndarray]()
    with test.feed(min(batch, len(test)), solver.device, shuffle=False) as feed:
        for x, y in feed:
            z = logits_of(solver.problem, [x], solver.device, solver.compute).numpy()
            check_logits(z.shape, y.shape)
            right.append(hits(z, y.cpu().numpy(), 1))
    return float(np.concatenate(right).mean())
