"""The loop that every problem is trained by, alone or with others on one read of x_{j-1}.

Each batch is made once and given to every problem that has not seen it. Each has a solver and a
position of its own, and nothing else is shared that a step could change, so its result is that of
training it alone, to the bit. After an interruption the feed starts at the first batch that any
problem has not seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.plan.costs import RISK_ROWS
from strata.pipeline.progress import Tick, duration
from strata.pipeline.run import weights
from strata.pipeline.run.record import CURVE
from strata.pipeline.run.rundir import LOGITS
from strata.pipeline.train.solving import SAY_SECONDS, Solving, give_up
from strata.stages.errors import Diverged
from strata.stages.solve.evaluate import accuracies, cross_entropy, top_k
from strata.stages.solve.solve import Batches, logits_of
from strata.store.files.publish import make_directory, npy, replace
from strata.store.read.order import generator

Drop = Callable[[Solving, Diverged], None]
"""What to do with a problem that diverged: to raise ends all; else the others go on."""


def train(
    problems: Sequence[Solving],
    feed: ProblemFeed,
    title: str = "",
    through: Callable[[list[Solving]], None] | None = None,
    drop: Drop = give_up,
) -> None:
    """Do the epochs that are left, of one problem or of several.

    Args:
        title: of several, for messages.
        through: called with those that have done all epochs, as soon as they have.

    Raises:
        BudgetError: a step takes more than ``--gpu-memory``.
        Diverged: a loss is not finite, and ``drop`` raises.
        KeyboardInterrupt: somebody asked to stop; the state of every problem is saved.
    """
    _judge([one for one in problems if one.at.best_risk is None], feed)
    session, running = problems[0].session, list(problems)
    left = sum(
        (one.solver.schedule.epochs - one.at.epoch) * feed.batches - one.at.batch for one in running
    )
    what = (title, "images of all") if title else (running[0].title, "images")
    with session.report.task(what[0], left * feed.batch, what[1]) as tick:
        while running:
            if done := [one for one in running if one.is_done]:
                if through is not None:
                    through(done)
                running = [one for one in running if not one.is_done]
                continue
            epoch = min(one.at.epoch for one in running)
            here = [one for one in running if one.at.epoch == epoch]
            lost = _epoch(here, feed, tick, drop)
            running = [one for one in running if one not in lost]
            if there := [one for one in here if one not in lost]:
                _end_epoch(there, feed, title)


def batches_of(one: Solving, feed: ProblemFeed, start: int, *, alone: bool = True) -> Batches:
    """The batches of the epoch under way. Those of a problem that is alone are made a micro-batch
    at a time, if its steps are divided."""
    epoch, parts = one.before + one.at.epoch, one.solver.schedule.accumulate
    if alone and parts > 1:
        return feed.epoch_in_parts(epoch, start, parts)
    return feed.epoch(epoch, start)


def _epoch(here: Sequence[Solving], feed: ProblemFeed, tick: Tick, drop: Drop) -> list[Solving]:
    """Take problems through the rest of the epoch that they are in; returns those that diverged."""
    session, start, lost = here[0].session, min(one.at.batch for one in here), list[Solving]()

    def attempt(one: Solving, work: Callable[[], None]) -> None:
        begun = time.monotonic()
        try:
            work()
        except Diverged as error:
            lost.append(one)
            drop(one, error)
        one.at.seconds += time.monotonic() - begun

    for one in here:
        one.solver.problem.train()
    asked = time.monotonic()
    batches = batches_of(here[0], feed, start, alone=len(here) == 1)
    for number, (x, y) in enumerate(batches, start):
        now = [one for one in here if one.at.batch == number and one not in lost]
        waited = (time.monotonic() - asked) / max(1, len(now))
        for one in now:
            one.at.seconds += waited
            attempt(one, partial(one.solver.train_on, x, y, feed.batches))
            one.check_memory()
        tick(len(y) * len(now) * session.ranks.count, _note(now))
        stop = session.ranks.any(session.stop.asked)  # all ranks after the same batch
        for one in here:
            if one not in lost:
                attempt(one, partial(one.save_if_due, now=stop))
        if stop:
            raise KeyboardInterrupt
        if len(lost) == len(here):
            break
        asked = time.monotonic()
    for one in here:
        if one not in lost:
            attempt(one, one.solver.settle)
    return lost


def _note(now: Sequence[Solving]) -> str:
    losses = [one.at.loss_sum / one.at.samples for one in now if one.at.samples]
    if not losses:
        return ""
    low, high = f"{min(losses):.3f}", f"{max(losses):.3f}"
    return f"epoch {now[0].at.epoch + 1}, loss {low}" + (f" … {high}" if len(losses) > 1 else "")


def _end_epoch(here: Sequence[Solving], feed: ProblemFeed, title: str) -> None:
    """Add a line to each history, and keep what is best, and what is good."""
    session, steps = here[0].session, feed.batches
    means = [one.solver.finish_epoch() for one in here]
    epoch, every = here[0].at.epoch, session.run.recipe.schedule.test_every
    is_tested = every and epoch % every == 0 and session.ranks.leads
    tests = top1_on_test(here) if is_tested else [None] * len(here)
    risk = _judge(here, feed)
    for one, mean, test in zip(here, means, tests, strict=True):
        line = {
            "epoch": one.before + epoch,
            "lr": one.solver.schedule.rate(epoch * steps - 1, steps),
            "train_loss": mean["loss"],
            "train_top1": mean["top1"],
            "test_top1": test,
            "seconds": mean["seconds"],
        }
        one.history.append(line | ({"risk": risk[one]} if one in risk else {}))
        if one.advice:
            one.keep_good()
    _say(here, title, feed.batches * feed.batch)
    for one in here:
        one.save_if_due()


def _say(here: Sequence[Solving], title: str, images: int) -> None:
    """Report an epoch, if the last report was some time ago; the last epoch of one problem."""
    now, best = time.monotonic(), min(here, key=lambda one: one.history[-1]["train_loss"])
    if now - here[0].said_at < SAY_SECONDS and (title or not best.is_done):
        return
    for one in here:
        one.said_at = now
    line, epoch = best.history[-1], best.at.epoch
    test = "" if line["test_top1"] is None else f", test {100 * line['test_top1']:.1f} %"
    if title:
        best.session.report.say(
            f"{title}, epoch {epoch}, {len(here)} variants: lowest loss "
            f"{line['train_loss']:.4f}{test} ({best.title})"
        )
        return
    best.session.report.say(
        f"{best.title}, epoch {epoch} of {best.solver.schedule.epochs}: "
        f"loss {line['train_loss']:.4f}, train {100 * line['train_top1']:.1f} %{test}, "
        f"{duration(line['seconds'])}, {images / line['seconds']:,.0f} images/s"
    )


# ---- how good iterates are, several of them on one read of the features -------------------------


def top1_on_test(those: Sequence[Solving]) -> list[float]:
    """Share of the test images that each present iterate is right about."""
    logits, labels = logits_on_test(those)
    return [top_k(z, labels, 1) for z in logits]


def logits_on_test(those: Sequence[Solving]) -> tuple[list[np.ndarray], np.ndarray]:
    """z_j of the test images, float32 (n, classes), of each problem; labels, int64 (n,)."""
    session, j = those[0].session, those[0].j
    return _logits(those, clean_batches(session, j - 1)), session.images()["test"].array("label")


def risks(those: Sequence[Solving], feed: ProblemFeed) -> list[float]:
    """Empirical risk of the present iterates on a fixed part of the un-augmented training set."""
    if not those:
        return []
    session = those[0].session
    rows = generator("risk rows", session.run.seed).permutation(len(feed.ids))[:RISK_ROWS]
    rows.sort()

    def found() -> list[float]:
        logits = _logits(those, (x for x, _ in feed.fixed(rows)))
        return [cross_entropy(z, feed.labels[rows]) for z in logits]

    return session.ranks.by_leader(found)


def _judge(those: Iterable[Solving], feed: ProblemFeed) -> dict[Solving, float]:
    """Training risk of those that keep their best iterate, which the present one now may be."""
    judged = [one for one in those if one.keeps_best]
    found = dict(zip(judged, risks(judged, feed), strict=True))
    for one, risk in found.items():
        one.solver.consider(risk)
    return found


def _logits(those: Sequence[Solving], batches: Iterable[Tensor]) -> list[np.ndarray]:
    device, compute = those[0].session.device, those[0].session.compute
    problems = [one.solver.problem for one in those]
    parts = [[logits_of(one, [x], device, compute).numpy() for one in problems] for x in batches]
    return [np.concatenate(own) for own in zip(*parts, strict=True)]


# ---- the end ------------------------------------------------------------------------------------


def conclude(
    those: Sequence[Solving], drop: Drop = give_up, *, keep_logits: bool = True
) -> list[tuple[Solving, dict[str, Any]]]:
    """Write weights, curve and test logits of problems that are through, at the iterate that is
    kept. A record that vouches for them is still to be written.

    Returns:
        Those whose logits are finite, and what records say of each.
    """
    for one in those:
        one.solver.finish()
    found, (logits, labels) = list[tuple[Solving, dict[str, Any]]](), logits_on_test(those)
    for one, z in zip(those, logits, strict=True):
        if not np.isfinite(z).all():
            drop(one, Diverged(one.solver.schedule.epochs, one.at.last_good))
            continue
        directory, last = make_directory(one.directory), one.history[-1]
        states = {name: module.state_dict() for name, module in one.parts.items()}
        for name, state in states.items():
            weights.write(directory / f"{name}.safetensors", state)
        curve = "".join(json.dumps(line) + "\n" for line in one.history)
        replace(directory, CURVE, curve.encode())
        if keep_logits:
            replace(directory, LOGITS, npy(z))
        figures = {
            **{name: weights.digest(state) for name, state in states.items()},
            **one.parameters,
            "kept_epoch": one.kept_epoch,
            "train": {"loss": last["train_loss"], "top1": last["train_top1"]},
            "test": {"loss": cross_entropy(z, labels), **accuracies(z, labels)},
            "seconds": one.seconds,
        }
        found.append((one, figures))
    return found
