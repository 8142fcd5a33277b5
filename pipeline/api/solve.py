"""Training a module on cached features from Python, with the solver that trains layers."""

from __future__ import annotations

from collections.abc import Callable
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
from strata.pipeline.run import device as devices
from strata.pipeline.run import record, weights
from strata.stages.errors import DataError
from strata.stages.solve.evaluate import accuracies
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
    """Train a module on features, as layers and classifiers are trained; in place.

    Order and draws of an epoch are functions of (seed, epoch): the same call on the same machine
    gives the same weights, to the bit, also where it was stopped or killed in between.

    Args:
        problem: from x, as ``features.feed`` gives it, to logits (n, classes), or (n, token,
            classes). It moves to the device, and ends in eval mode.
        features: with labels int64, from 0.
        test: judged after every epoch.
        checkpoint: a file, ``head.safetensors``: its state after every epoch, and when it is
            stopped. The same call goes on from there, or finds that all is done.
        seed: of the order, and of what the module draws.
        schedule: keys of a recipe's [schedule]; what is left out is 10 epochs of batches of 256,
            ``kind="one-cycle"`` and ``lr=0.1``.

    Returns:
        For every epoch: ``epoch``, ``lr`` (of its last step), ``loss`` and ``top1`` (means over
        the epoch's training batches), ``test_top1`` (None without ``test``), ``seconds``.

    Raises:
        RecipeError, OptionRange, DeviceError: an argument cannot be.
        DataError: features have no labels, or logits do not fit them.
        Diverged: the loss is not finite; the checkpoint has the last good state.
        KeyboardInterrupt: somebody asked to stop; the checkpoint is written.
    """
    with own_errors(), Interruptions() as stop:
        plan = read(Schedule, DEFAULTS | schedule, "schedule")
        if plan.keep != "last":
            raise OptionRange(f"keep is {plan.keep!r}; from Python it may be 'last'")
        for one in filter(None, (features, test)):
            if one.labels.is_floating_point() or one.labels.min() < 0:
                raise DataError(f"{one!r} has no labels int64 from 0")
        chosen = devices.pick(device)
        compute = devices.dtype(devices.compute_dtype(plan.precision, chosen)[0])
        path = checkpoint and Path(checkpoint)
        made_of = {"made_of": _made_of(problem, features, plan, seed)} if path else {}
        draws = lambda *step: key_of("draws of a step", seed, *step) % 2**63  # noqa: E731
        solver, history = Solver(problem, plan, chosen, compute, draws=draws), []
        if path and path.exists():
            tensors, note = weights.read(path)
            if not record.agrees(note, made_of):
                raise OptionRange(f"checkpoint {path} is of another problem: name another file")
            solver.restore(tensors, note["progress"], note["scaler"])
            history = note["history"]

        def save() -> None:
            solver.settle()
            if path:
                note = {**solver.snapshot(), "history": history, **made_of}
                weights.write(path, solver.tensors(), note)

        _epochs(solver, features, test, seed, history, save, stop, reporter(quiet=not progress))
        solver.finish()
        return history


def _epochs(
    solver: Solver[nn.Module],
    features: LevelFeatures,
    test: LevelFeatures | None,
    seed: int,
    history: list[dict[str, Any]],
    save: Callable[[], None],
    stop: Interruptions,
    report: Reporter,
) -> None:
    """Do the epochs that are left, each with a line in the history."""
    plan, done = solver.schedule, solver.progress
    batch = min(plan.batch, len(features))
    left = (plan.epochs - done.epoch) * len(features)
    how: Any = {"device": solver.device, "seed": seed}
    with (
        features.feed(batch, **how, drop_last=True) as feed,
        report.task("solving", left, "samples") as tick,
    ):
        for epoch in range(done.epoch, plan.epochs):
            begun = monotonic() - done.seconds
            solver.problem.train()
            for x, y in feed.epoch(epoch, done.batch):
                solver.train_on(x, y, len(feed))
                tick(len(y))
                if stop.asked:
                    done.seconds = monotonic() - begun
                    save()
                    stop.check()
            done.seconds = monotonic() - begun
            means = solver.finish_epoch()
            top1 = _top1(solver, test, batch) if test else None
            rate = plan.rate((epoch + 1) * len(feed) - 1, len(feed))
            history.append({"epoch": epoch + 1, "lr": rate, **means, "test_top1": top1})
            save()
            said = f"loss {means['loss']:.4f}, train {100 * means['top1']:.1f} %"
            said += "" if top1 is None else f", test {100 * top1:.1f} %"
            report.say(f"epoch {epoch + 1} of {plan.epochs}: {said}")


def _top1(solver: Solver[nn.Module], test: LevelFeatures, batch: int) -> float:
    """Share of the test samples, or of their tokens, that the module is right about."""
    logits, labels = [], []
    with test.feed(min(batch, len(test)), device=solver.device, shuffle=False) as feed:
        for x, y in feed:
            z = logits_of(solver.problem, [x], solver.device, solver.compute).numpy()
            check_logits(z.shape, y.shape)
            logits.append(z)
            labels.append(y.cpu().numpy())
    found = accuracies(np.concatenate(logits), np.concatenate(labels))["top1"]
    assert found is not None
    return found


def _made_of(problem: nn.Module, features: LevelFeatures, plan: Schedule, seed: int) -> Any:
    """All that decides what a checkpoint holds."""
    try:
        name, _ = identity.digest(problem)
    except identity.Unknown as error:
        raise OptionRange(f"a checkpoint of this module cannot be told apart: {error}") from error
    settings = {k: v for k, v in vars(plan).items() if k not in ("precision", "test_every")}
    roots = [level.content_root for level in features.levels]
    return {"problem": name, "features": roots, "schedule": settings, "seed": seed}
