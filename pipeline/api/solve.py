"""Training a module on cached features from Python, with the solver that trains layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import numpy as np
from torch import Tensor, nn

from strata.pipeline.api.features import LevelFeatures
from strata.pipeline.errors import OptionRange, own_errors
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.progress import reporter
from strata.pipeline.recipe.named_function import LOSSES
from strata.pipeline.recipe.strict import one_of, read
from strata.pipeline.recipe.tables import Schedule
from strata.pipeline.run import device as devices
from strata.stages.errors import DataError
from strata.stages.solve.evaluate import hits
from strata.stages.solve.loss import SampleLoss, check_logits
from strata.stages.solve.solve import Solver, logits_of
from strata.store.read.order import key_of

DEFAULTS = {"kind": "one-cycle", "epochs": 10, "batch": 256, "lr": 0.1}


def solve(
    problem: nn.Module,
    features: LevelFeatures,
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross-entropy",
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
        features: with labels int64, from 0; of ``bce`` and ``mse`` float32 (n,) or (n, classes).
        loss: ``cross-entropy``, ``bce``, ``mse``, or a function of logits and labels that gives the
            loss of every sample, (n,).
        test: judged after every epoch.
        seed: of the order, and of what the module draws.
        schedule: keys of a recipe's [schedule]; what is left out is as :data:`DEFAULTS`.

    Returns:
        For every epoch: ``epoch``, ``lr`` (of its last step), ``loss`` and ``top1`` (means over its
        training batches), ``test_loss`` and ``test_top1``, ``seconds``. None: without ``test``, and
        of labels that are no classes.

    Raises:
        RecipeError, OptionRange, DeviceError: an argument cannot be.
        DataError: features have no labels that the loss is for, or logits do not fit them.
        UnusableNetwork: a function of the caller's fails.
        Diverged: the loss is not finite.
    """
    with own_errors(), Interruptions() as stop:
        plan, report = read(Schedule, DEFAULTS | schedule, "schedule"), reporter(quiet=not progress)
        if plan.keep != "last":
            raise OptionRange(f"keep is {plan.keep!r}; from Python it may be 'last'")
        criterion = _criterion(loss, [one for one in (features, test) if one is not None])
        chosen = devices.pick(device)
        compute = devices.dtype(devices.compute_dtype(plan.precision, chosen)[0])
        draws = lambda *step: key_of("draws of a step", seed, *step) % 2**63  # noqa: E731
        solver, history = Solver(problem, plan, chosen, compute, draws=draws, loss=criterion), []
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
                found |= solver.finish_epoch() | _judged(solver, test, batch)
                history.append({"epoch": epoch + 1, **found, "seconds": monotonic() - begun})
                report.say(f"epoch {epoch + 1} of {plan.epochs}: {_said(found)}")
        solver.settle()
        solver.finish()
        return history


def _criterion(
    loss: str | Callable[[Tensor, Tensor], Tensor], features: Sequence[LevelFeatures]
) -> SampleLoss:
    """The loss, which must be for labels like these. Raises RecipeError, DataError."""
    if not isinstance(loss, str):
        return SampleLoss("own", loss, "the loss")
    one_of("loss", loss, LOSSES)
    of_classes = loss == "cross-entropy"
    for one in features:
        if one.labels.is_floating_point() == of_classes or (of_classes and one.labels.min() < 0):
            wanted = "int64 from 0" if of_classes else "float32"
            raise DataError(f"{one!r} has no labels {wanted}, which {loss} is for")
    return SampleLoss(loss)


def _judged(
    solver: Solver[nn.Module], test: LevelFeatures | None, batch: int
) -> dict[str, float | None]:
    """Mean loss of the test samples, and the share of them, or of their tokens, that the module is
    right about."""
    right, losses = list[np.ndarray](), list[np.ndarray]()
    if test is None:
        return {"test_loss": None, "test_top1": None}
    with test.feed(min(batch, len(test)), solver.device, shuffle=False) as feed:
        for x, y in feed:
            z = logits_of(solver.problem, [x], solver.device, solver.compute).numpy()
            labels = y.cpu().numpy()
            losses.append(solver.loss.of_arrays(z, labels))
            if not y.is_floating_point():
                check_logits(z.shape, y.shape)
                right.append(hits(z, labels, 1))
    top1 = float(np.concatenate(right).mean()) if right else None
    return {"test_loss": float(np.concatenate(losses).mean()), "test_top1": top1}


def _said(found: dict[str, Any]) -> str:
    """An epoch in words."""
    parts = [f"loss {found['loss']:.4f}"]
    if found["top1"] is not None:
        parts.append(f"train {100 * found['top1']:.1f} %")
    if found["test_top1"] is not None:
        parts.append(f"test {100 * found['test_top1']:.1f} %")
    elif found["test_loss"] is not None:
        parts.append(f"test loss {found['test_loss']:.4f}")
    return ", ".join(parts)
