"""Training a module on cached features from Python, with the solver that trains layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from torch import nn

from strata.pipeline.api import identity
from strata.pipeline.api.features import LevelFeatures
from strata.pipeline.errors import OptionRange, own_errors
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.progress import Reporter, reporter
from strata.pipeline.recipe.strict import read
from strata.pipeline.recipe.tables import Schedule
from strata.pipeline.recipe.variants import NOT_RESULTS
from strata.pipeline.run import device as devices
from strata.pipeline.run import record, weights
from strata.stages.errors import DataError
from strata.stages.solve.evaluate import hits
from strata.stages.solve.solve import Solver, check_logits, logits_of
from strata.store.read.order import key_of

DEFAULTS = {"kind": "one-cycle", "epochs": 10, "batch": 256, "lr": 0.1}


def solve(
    problem: nn.Module,
    features: LevelFeatures,
    *,
    test: LevelFeatures | None = None,
    checkpoint: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    **schedule: Any,
) -> list[dict[str, Any]]:
    """Train a module on features, in place, as layers and classifiers are trained. The same call on
    the same machine gives the same weights, to the bit, wherever it was stopped.

    Args:
        problem: from x to logits (n, classes), or (n, token, classes). It moves to the device.
        features: with labels int64, from 0.
        test: judged after every epoch.
        checkpoint: a file for the state after every epoch, and when it is stopped; the same call
            goes on from there, or finds that all is done.
        seed: of the order, and of what the module draws.
        schedule: keys of a recipe's [schedule]; what is left out is as :data:`DEFAULTS`.

    Returns:
        For every epoch: ``epoch``, ``lr`` (of its last step), ``loss`` and ``top1`` (means over its
        training batches), ``test_top1`` (None without ``test``), ``seconds``.

    Raises:
        RecipeError, OptionRange, DeviceError: an argument cannot be.
        DataError: features have no labels, or logits do not fit them.
        Diverged: the loss is not finite; the checkpoint has the last good state.
    """
    with own_errors(), Interruptions() as stop:
        plan = read(Schedule, DEFAULTS | schedule, "schedule")
        if plan.keep != "last":
            raise OptionRange(f"keep is {plan.keep!r}; from Python it may be 'last'")
        for one in filter(None, (features, test)):
            if one.labels.is_floating_point() or one.labels.min() < 0:
                raise DataError(f"{one!r} has no labels int64 from 0")
        chosen = devices.pick(device)
        path = checkpoint and Path(checkpoint)
        made_of = _made_of(problem, features, plan, seed) if path else {}
        solver = Solver(
            problem,
            plan,
            chosen,
            devices.dtype(devices.compute_dtype(plan.precision, chosen)[0]),
            draws=lambda *step: key_of("draws of a step", seed, *step) % 2**63,
        )
        history = _taken_up(solver, path, made_of) if path and path.exists() else []
        for done in _epochs(solver, features, test, seed, reporter(quiet=not progress)):
            if done or stop.asked:
                solver.settle()
                history += [done] if done else []
                note = {**solver.snapshot(), "history": history, **made_of}
                if path:
                    weights.write(path, solver.tensors(), note)
                stop.check()
        solver.finish()
        return history


def _epochs(
    solver: Solver[nn.Module],
    features: LevelFeatures,
    test: LevelFeatures | None,
    seed: int,
    report: Reporter,
) -> Iterator[dict[str, Any] | None]:
    """Do the epochs that are left: yields None after a batch, and what was found after an epoch."""
    plan, at, batch = solver.schedule, solver.progress, min(solver.schedule.batch, len(features))
    how: Any = {"device": solver.device, "seed": seed, "drop_last": True}
    left = (plan.epochs - at.epoch) * len(features)
    with features.feed(batch, **how) as feed, report.task("solving", left, "samples") as tick:
        for epoch in range(at.epoch, plan.epochs):
            begun = monotonic() - at.seconds
            solver.problem.train()
            for x, y in feed.epoch(epoch, at.batch):
                solver.train_on(x, y, len(feed))
                at.seconds = monotonic() - begun
                tick(len(y))
                yield None
            found = {"epoch": epoch + 1, "lr": plan.rate((epoch + 1) * len(feed) - 1, len(feed))}
            found |= solver.finish_epoch() | {"test_top1": test and _top1(solver, test, batch)}
            said = f"loss {found['loss']:.4f}, train {100 * found['top1']:.1f} %"
            said += f", test {100 * found['test_top1']:.1f} %" if test else ""
            report.say(f"epoch {epoch + 1} of {plan.epochs}: {said}")
            yield found


def _top1(solver: Solver[nn.Module], test: LevelFeatures, batch: int) -> float:
    """Share of the test samples, or of their tokens, that the module is right about."""
    right = list[np.ndarray]()
    with test.feed(min(batch, len(test)), device=solver.device, shuffle=False) as feed:
        for x, y in feed:
            z = logits_of(solver.problem, [x], solver.device, solver.compute).numpy()
            check_logits(z.shape, y.shape)
            right.append(hits(z, y.cpu().numpy(), 1))
    return float(np.concatenate(right).mean())


def _taken_up(solver: Solver[nn.Module], path: Path, made_of: Any) -> list[dict[str, Any]]:
    """Go on from a checkpoint: the epochs that it has done."""
    tensors, note = weights.read(path)
    if not record.agrees(note, made_of):
        raise OptionRange(f"checkpoint {path} is of another problem: name another file")
    solver.restore(tensors, note["progress"], note["scaler"])
    return note["history"]


def _made_of(problem: nn.Module, features: LevelFeatures, plan: Schedule, seed: int) -> Any:
    """All that decides what a checkpoint holds."""
    try:
        name, _ = identity.digest(problem)
    except identity.Unknown as error:
        raise OptionRange(f"a checkpoint of this module cannot be told apart: {error}") from error
    settings = {k: v for k, v in vars(plan).items() if k not in NOT_RESULTS}
    return {"made_of": [name, [one.content_root for one in features.levels], settings, seed]}
