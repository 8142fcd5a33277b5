"""The loop that every problem is trained by, alone or with others on one read of x_{j-1}.

Each batch is made once and given to every problem that has not seen it. Each has a solver and a
position of its own, and nothing else is shared that a step could change, so its result is that of
training it alone, to the bit. After an interruption the feed starts at the first batch that any
problem has not seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.plan.costs import RISK_ROWS
from strata.pipeline.progress import Tick, duration, size
from strata.pipeline.run import weights
from strata.pipeline.run.record import CURVE
from strata.pipeline.run.rundir import BY_SAMPLE, LOGITS
from strata.pipeline.train.solving import SAY_SECONDS, Solving, give_up
from strata.stages.errors import Diverged
from strata.stages.solve.evaluate import LOGIT_BYTES, Judged, hits, losses, said
from strata.stages.solve.loss import check_logits, check_targets
from strata.stages.solve.solve import Batches, logits_of
from strata.store.files.publish import make_directory, npy, replace
from strata.store.read.order import generator

Drop = Callable[[Solving, Diverged], None]
"""What to do with a problem that diverged: to raise ends all; else the others go on."""
Measure = Callable[[np.ndarray, np.ndarray], Any]
"""What is asked of the logits and labels of a batch."""


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
        DataError: the labels are not those that the loss is for.
        Diverged: a loss is not finite, and ``drop`` raises.
        KeyboardInterrupt: somebody asked to stop; the state of every problem is saved.
    """
    session, running = problems[0].session, list(problems)
    loss, outputs = session.run.recipe.loss, session.run.recipe.data.classes
    check_targets(loss.called, loss.kind, feed.labels, outputs)
    _judge([one for one in problems if one.at.best_risk is None], feed)
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
    tests = curve_on_test(here) if is_tested else [{"test_top1": None}] * len(here)
    risk = _judge(here, feed)
    for one, mean, test in zip(here, means, tests, strict=True):
        line = {
            "epoch": one.before + epoch,
            "lr": one.solver.schedule.rate(epoch * steps - 1, steps),
            "train_loss": mean["loss"],
            "train_top1": mean["top1"],
            **test,
            "seconds": mean["seconds"],
        }
        one.history.append(line | ({"risk": risk[one]} if one in risk else {}))
        if session.ranks.leads:
            session.curves(one.directory, one.history)
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
    test = _tested(line)
    if title:
        best.session.report.say(
            f"{title}, epoch {epoch}, {len(here)} variants: lowest loss "
            f"{line['train_loss']:.4f}{test} ({best.title})"
        )
        return
    train = "" if line["train_top1"] is None else f", train {100 * line['train_top1']:.1f} %"
    best.session.report.say(
        f"{best.title}, epoch {epoch} of {best.solver.schedule.epochs}: "
        f"loss {line['train_loss']:.4f}{train}{test}, "
        f"{duration(line['seconds'])}, {images / line['seconds']:,.0f} images/s"
    )


def _tested(line: Mapping[str, Any]) -> str:
    """What a line of the curve says of the test images; nothing where it says nothing."""
    found = {name[5:]: n for name, n in line.items() if name.startswith("test_") and n is not None}
    if not found:
        return ""
    test = f", test {100 * found['top1']:.1f} %" if "top1" in found else f", test {said(found)}"
    return test + (f" and {found['loss']:.4f} nats" if {"top1", "loss"} <= set(found) else "")


# ---- how good iterates are, several of them on one read of the features -------------------------


def top1_on_test(those: Sequence[Solving]) -> list[float]:
    """Share of the test images that each present iterate is right about."""
    found = _on_test(those, partial(hits, k=1))
    return [float(np.concatenate(own).mean()) for own in found]


def curve_on_test(those: Sequence[Solving]) -> list[dict[str, float]]:
    """What a line of the curve says of each present iterate on the test images: top-1; of tokens
    also the loss, which is what language models are compared by; of another loss than
    cross-entropy its metrics."""
    if those[0].solver.loss.kind != "cross-entropy":
        figures = [own.figures(those[0].solver.loss.kind, y) for own, y in _judged_on_test(those)]
        return [{f"test_{n}": v for n, v in one.items() if n != "top5"} for one in figures]
    if those[0].session.run.recipe.data.targets == "sample":
        return [{"test_top1": top1} for top1 in top1_on_test(those)]
    found = _on_test(those, lambda z, y: (hits(z, y, 1), losses(z, y)))
    both = [[float(np.concatenate(c).mean()) for c in zip(*own, strict=True)] for own in found]
    return [{"test_top1": top1, "test_loss": loss} for top1, loss in both]


def risks(those: Sequence[Solving], feed: ProblemFeed) -> list[float]:
    """Empirical risk of the present iterates on a fixed part of the un-augmented training set."""
    if not those:
        return []
    session = those[0].session
    rows = generator("risk rows", session.run.seed).permutation(len(feed.ids))[:RISK_ROWS]
    rows.sort()

    def found() -> list[float]:
        x, y = (x for x, _ in feed.fixed(rows)), feed.labels[rows]
        found = _over(those, x, y, those[0].solver.loss.of_arrays)
        return [float(np.concatenate(own).mean()) for own in found]

    return session.ranks.by_leader(found)


def _judge(those: Iterable[Solving], feed: ProblemFeed) -> dict[Solving, float]:
    """Training risk of those that keep their best iterate, which the present one now may be."""
    judged = [one for one in those if one.keeps_best]
    found = dict(zip(judged, risks(judged, feed), strict=True))
    for one, risk in found.items():
        one.solver.consider(risk)
    return found


def _on_test(those: Sequence[Solving], measure: Measure) -> list[list[Any]]:
    session, j = those[0].session, those[0].j
    labels = session.images()["test"].array("label")
    seen = clean_batches(session, j - 1, context=session.run.recipe.context_of(j))
    return _over(those, seen, labels, measure)


def _judged_on_test(those: Sequence[Solving]) -> list[tuple[Judged, np.ndarray]]:
    """How good each present iterate is on the test images, and their labels."""
    images, loss = those[0].session.images()["test"], those[0].solver.loss
    labels, samples = images.array("label"), len(images)

    def measure(z: np.ndarray, y: np.ndarray) -> Judged:
        return Judged.of(z, y, samples, loss.of_arrays(z, y))

    return [(Judged.joined(own), labels) for own in _on_test(those, measure)]


def _over(
    those: Sequence[Solving], batches: Iterable[Tensor], labels: np.ndarray, measure: Measure
) -> list[list[Any]]:
    """What is found of the logits of each problem, batch by batch: no more of them are held."""
    device, compute = those[0].session.device, those[0].session.compute
    found, end = [list[Any]() for _ in those], 0
    for x in batches:
        begin, end = end, end + len(x)
        for one, own in zip(those, found, strict=True):
            z = logits_of(one.solver.problem, [x], device, compute).numpy()
            if labels.dtype.kind != "f":
                check_logits(z.shape, labels[begin:end].shape)
            own.append(measure(z, labels[begin:end]))
    return found


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
    found = list[tuple[Solving, dict[str, Any]]]()
    for one, (own, labels) in zip(those, _judged_on_test(those), strict=True):
        if not np.isfinite(own.loss if own.logits is None else own.logits).all():
            drop(one, Diverged(one.solver.schedule.epochs, one.at.last_good))
            continue
        directory, last = make_directory(one.directory), one.history[-1]
        states = {name: module.state_dict() for name, module in one.parts.items()}
        for name, state in states.items():
            weights.write(directory / f"{name}.safetensors", state)
        curve = "".join(json.dumps(line) + "\n" for line in one.history)
        replace(directory, CURVE, curve.encode())
        if keep_logits and own.logits is not None:
            replace(directory, LOGITS, npy(own.logits))
        elif keep_logits:
            one.say(
                f"logits of tokens are not kept, which would be above {size(LOGIT_BYTES)}: "
                f"{BY_SAMPLE} has loss and top-1 of every test sample"
            )
            assert own.top1 is not None, "of numbers all logits are kept"
            replace(directory, BY_SAMPLE, npy(np.stack([own.loss, own.top1], 1).astype("<f4")))
        figures = {
            **{name: weights.digest(state) for name, state in states.items()},
            **one.parameters,
            "kept_epoch": one.kept_epoch,
            "train": {"loss": last["train_loss"], "top1": last["train_top1"]},
            "test": own.figures(one.solver.loss.kind, labels),
            "seconds": one.seconds,
        }
        found.append((one, figures))
    return found
