"""Variants of problem j on one read of x_{j-1}: each batch is made once and given to every one.
Problem J + 1 has no layer: its variants are classifiers of x_J.

Each variant has a solver and a position of its own, and nothing else is shared that a step could
change, so its result is that of solving it alone, to the bit. After an interruption the feed starts
at the first batch that any variant has not seen, and a batch goes only to those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.progress import Tick
from strata.pipeline.recipe.variants import Variant
from strata.pipeline.run import sweep_results
from strata.pipeline.run.session import Session
from strata.pipeline.study.candidate import Candidate, begin
from strata.pipeline.train.solving import CHECKPOINT_SECONDS, SAY_SECONDS, logits_on_test, risks
from strata.stages.errors import Diverged
from strata.stages.solve.evaluate import accuracies, cross_entropy


@dataclass
class Sweep:
    """Variants that are solved together."""

    session: Session
    j: int
    feed: ProblemFeed
    candidates: list[Candidate]
    """Those that are not through and have not diverged."""
    saved_at: float = field(default_factory=time.monotonic)
    said_at: float = -SAY_SECONDS

    def save(self) -> None:
        """One checkpoint per variant; a kill between two leaves them at different batches."""
        for one in self.candidates:
            one.save()
        self.saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save()

    def left(self) -> int:
        """Images that are still to be trained on, over all variants."""
        batches = self.feed.batches
        done = sum(one.at.epoch * batches + one.at.batch for one in self.candidates)
        total = sum(one.variant.schedule.epochs * batches for one in self.candidates)
        return (total - done) * self.feed.batch


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self) -> float:
        before, self.last = self.last, time.monotonic()
        return self.last - before


def sweep(session: Session, j: int, wanted: Iterable[Variant]) -> None:
    """Solve the variants that are not through; x_{j-1} must have a name.

    Raises:
        KeyboardInterrupt: somebody asked to stop; every variant's state is saved.
    """
    todo = [one for one in wanted if sweep_results.result(session.run, j, one) is None]
    if not todo:
        return
    with ProblemFeed(session, j - 1) as feed:
        title = sweep_results.title(session.run.recipe, j)
        count = f"{len(todo)} variant{'s' * (len(todo) > 1)}"
        session.report.say(f"{title}, {count}: solved together, on one read of x_{j - 1}")
        going = Sweep(session, j, feed, [begin(session, j, variant) for variant in todo])
        _first_risks(going)
        with session.report.task(title, going.left(), "images of all") as tick:
            while going.candidates:
                _finish(going, [one for one in going.candidates if one.through])
                if going.candidates:
                    _epoch(going, min(one.at.epoch for one in going.candidates), tick)


def _first_risks(going: Sweep) -> None:
    fresh = [one for one in going.candidates if one.keeps_best and one.at.best_risk is None]
    for one, risk in zip(fresh, _risks(going, fresh), strict=True):
        one.solver.consider(risk)


# ---- one epoch ----------------------------------------------------------------------------------


def _epoch(going: Sweep, epoch: int, tick: Tick) -> None:
    """Take those that are in this epoch through it; the others have been there."""
    here = [one for one in going.candidates if one.at.epoch == epoch]
    start = min(one.at.batch for one in here)
    clock = Clock()
    for one in here:
        one.solver.problem.train()
    for number, (x, y) in enumerate(going.feed.epoch(epoch, start), start):
        now = [one for one in here if one in going.candidates and one.at.batch == number]
        waited = clock()
        for one in now:
            one.at.seconds += waited / len(now)
            _step(going, one, x, y)
            one.at.seconds += clock()
        tick(len(y) * len(now), _note(epoch, now))
        _after_batch(going)
        clock()
        if not any(one in going.candidates for one in here):
            return
    _end_epoch(going, epoch, [one for one in here if one in going.candidates])


def _step(going: Sweep, one: Candidate, x: Tensor, y: Tensor) -> None:
    try:
        one.solver.train_on(x, y, going.feed.batches)
    except Diverged as error:
        _drop(going, one, error)


def _after_batch(going: Sweep) -> None:
    if going.session.stop.asked:
        going.save()
    going.session.stop.check()
    going.save_now_and_then()


def _note(epoch: int, now: Sequence[Candidate]) -> str:
    losses = [one.at.loss_sum / one.at.samples for one in now if one.at.samples]
    span = f", losses {min(losses):.3f} … {max(losses):.3f}" if losses else ""
    return f"epoch {epoch + 1}{span}"


def _end_epoch(going: Sweep, epoch: int, here: Sequence[Candidate]) -> None:
    every = going.session.run.recipe.schedule.test_every
    done, steps = [(one, one.solver.finish_epoch()) for one in here], going.feed.batches
    tested = here if every and (epoch + 1) % every == 0 else []
    top1 = _by_name(tested, lambda: [test["top1"] for test in _tests(going, tested)[1]])
    judged = [one for one in here if one.keeps_best]
    risk = _by_name(judged, lambda: _risks(going, judged))
    for one, result in done:
        name = one.variant.name
        line = {
            "epoch": epoch + 1,
            "lr": one.solver.schedule.rate((epoch + 1) * steps - 1, steps),
            "train_loss": result["loss"],
            "train_top1": result["top1"],
            "test_top1": top1.get(name),
            "seconds": one.solver.epoch_seconds,
        }
        if name in risk:
            line["risk"] = risk[name]
            one.solver.consider(risk[name])
        one.history.append(line)
    _say_epoch(going, epoch, here)
    going.save_now_and_then()


def _by_name(those: Sequence[Candidate], judge: Callable[[], list[Any]]) -> dict[str, Any]:
    names = [one.variant.name for one in those]
    return dict(zip(names, judge(), strict=True)) if names else {}


def _say_epoch(going: Sweep, epoch: int, here: Sequence[Candidate]) -> None:
    if time.monotonic() - going.said_at < SAY_SECONDS:
        return
    going.said_at = time.monotonic()
    best = min(here, key=lambda one: one.history[-1]["train_loss"])
    line = best.history[-1]
    test = "" if line["test_top1"] is None else f", test {100 * line['test_top1']:.1f} %"
    title = sweep_results.title(going.session.run.recipe, going.j)
    going.session.report.say(
        f"{title}, epoch {epoch + 1}, {len(here)} variants: lowest loss "
        f"{line['train_loss']:.4f}{test} ({best.variant.name})"
    )


# ---- judging several at once ---------------------------------------------------------------------


def _tests(
    going: Sweep, those: Sequence[Candidate]
) -> tuple[list[np.ndarray], list[dict[str, float | None]]]:
    """Logits of the test images, and what they are worth, of each."""
    problems = [one.solver.problem for one in those]
    logits, labels = logits_on_test(going.session, going.j, problems)
    return logits, [{"loss": cross_entropy(z, labels), **accuracies(z, labels)} for z in logits]


def _risks(going: Sweep, those: Sequence[Candidate]) -> list[float]:
    problems = [one.solver.problem for one in those]
    return risks(going.session, going.feed, problems) if those else []


# ---- the end of a variant ------------------------------------------------------------------------


def _drop(going: Sweep, one: Candidate, error: Diverged) -> None:
    """The others go on."""
    one.record_divergence(error)
    going.candidates.remove(one)


def _finish(going: Sweep, those: Sequence[Candidate]) -> None:
    """Judge and record the variants that are through."""
    if not those:
        return
    for one in those:
        one.solver.finish()
    logits, tests = _tests(going, those)
    for one, z, test, risk in zip(those, logits, tests, _risks(going, those), strict=True):
        if np.isfinite(z).all():
            one.record(z, {"test": test, "risk": risk})
            going.candidates.remove(one)
        else:
            _drop(going, one, Diverged(one.variant.schedule.epochs, one.at.last_good))
