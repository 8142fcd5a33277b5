"""Variants of problem j on one read of x_{j-1}: each batch is made once and given to every one.
Problem J + 1 has no layer: its variants are classifiers of x_J.

Each variant has a solver and a position of its own, and nothing else is shared that a step could
change, so its result is that of solving it alone, to the bit. After an interruption the feed starts
at the first batch that any variant has not seen, and a batch goes only to those.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

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
    """The variants that are not finished and have not diverged."""
    saved_at: float = field(default_factory=time.monotonic)
    said_at: float = -SAY_SECONDS

    @property
    def left(self) -> int:
        """Images that are still to be trained on, over all variants."""
        epochs = ((one.variant.schedule.epochs - one.at.epoch, one.at) for one in self.candidates)
        return self.feed.batch * sum(n * self.feed.batches - at.batch for n, at in epochs)

    def save(self) -> None:
        """Write one checkpoint per variant; a kill between two leaves them at different batches."""
        for one in self.candidates:
            one.save()
        self.saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        """Save if the last checkpoints are old."""
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save()

    def drop(self, one: Candidate, error: Diverged) -> None:
        """Record a variant that diverged; the others go on."""
        one.record_divergence(error)
        self.candidates.remove(one)

    def tests(self, those: Sequence[Candidate]) -> list[tuple[np.ndarray, dict[str, float | None]]]:
        """Logits of the test images, float32 (n, classes), their loss and accuracies, of each."""
        if not those:
            return []
        problems = [one.solver.problem for one in those]
        logits, labels = logits_on_test(self.session, self.j, problems)
        return [(z, {"loss": cross_entropy(z, labels), **accuracies(z, labels)}) for z in logits]

    def risks(self, those: Sequence[Candidate]) -> list[float]:
        """Training risk of the present iterate of each."""
        problems = [one.solver.problem for one in those]
        return risks(self.session, self.feed, problems) if those else []


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
        running = Sweep(session, j, feed, [begin(session, j, variant) for variant in todo])
        fresh = [one for one in running.candidates if one.keeps_best and one.at.best_risk is None]
        for one, risk in zip(fresh, running.risks(fresh), strict=True):
            one.solver.consider(risk)
        with session.report.task(title, running.left, "images of all") as tick:
            while running.candidates:
                _finish(running, [one for one in running.candidates if one.is_done])
                if running.candidates:
                    _epoch(running, min(one.at.epoch for one in running.candidates), tick)


# ---- one epoch ----------------------------------------------------------------------------------


def _epoch(running: Sweep, epoch: int, tick: Tick) -> None:
    """Take those that are in this epoch through it; the others have been there."""
    here = [one for one in running.candidates if one.at.epoch == epoch]
    start = min(one.at.batch for one in here)
    asked = time.monotonic()
    for one in here:
        one.solver.problem.train()
    for number, (x, y) in enumerate(running.feed.epoch(epoch, start), start):
        now = [one for one in here if one in running.candidates and one.at.batch == number]
        waited = time.monotonic() - asked
        for one in now:
            one.at.seconds += waited / len(now)
            begun = time.monotonic()
            try:
                one.solver.train_on(x, y, running.feed.batches)
            except Diverged as error:
                running.drop(one, error)
            one.at.seconds += time.monotonic() - begun
        tick(len(y) * len(now), _note(epoch, now))
        if running.session.stop.asked:
            running.save()
        running.session.stop.check()
        running.save_now_and_then()
        asked = time.monotonic()
        if not any(one in running.candidates for one in here):
            return
    _end_epoch(running, epoch, [one for one in here if one in running.candidates])


def _note(epoch: int, now: Sequence[Candidate]) -> str:
    losses = [one.at.loss_sum / one.at.samples for one in now if one.at.samples]
    span = f", losses {min(losses):.3f} … {max(losses):.3f}" if losses else ""
    return f"epoch {epoch + 1}{span}"


def _end_epoch(running: Sweep, epoch: int, here: Sequence[Candidate]) -> None:
    every = running.session.run.recipe.schedule.test_every
    done, steps = [(one, one.solver.finish_epoch()) for one in here], running.feed.batches
    tested = here if every and (epoch + 1) % every == 0 else []
    tests = dict(zip(tested, running.tests(tested), strict=True))
    judged = [one for one in here if one.keeps_best]
    risk = dict(zip(judged, running.risks(judged), strict=True))
    for one, result in done:
        line = {
            "epoch": epoch + 1,
            "lr": one.solver.schedule.rate((epoch + 1) * steps - 1, steps),
            "train_loss": result["loss"],
            "train_top1": result["top1"],
            "test_top1": tests[one][1]["top1"] if one in tests else None,
            "seconds": one.solver.epoch_seconds,
        }
        if one in risk:
            line["risk"] = risk[one]
            one.solver.consider(risk[one])
        one.history.append(line)
    _say_epoch(running, epoch, here)
    running.save_now_and_then()


def _say_epoch(running: Sweep, epoch: int, here: Sequence[Candidate]) -> None:
    if time.monotonic() - running.said_at < SAY_SECONDS:
        return
    running.said_at = time.monotonic()
    best = min(here, key=lambda one: one.history[-1]["train_loss"])
    line = best.history[-1]
    test = "" if line["test_top1"] is None else f", test {100 * line['test_top1']:.1f} %"
    title = sweep_results.title(running.session.run.recipe, running.j)
    running.session.report.say(
        f"{title}, epoch {epoch + 1}, {len(here)} variants: lowest loss "
        f"{line['train_loss']:.4f}{test} ({best.variant.name})"
    )


# ---- the end of a variant ------------------------------------------------------------------------


def _finish(running: Sweep, those: Sequence[Candidate]) -> None:
    """Judge and record the variants that are through."""
    for one in those:
        one.solver.finish()
    tested = zip(those, running.tests(those), running.risks(those), strict=True)
    for one, (z, test), risk in tested:
        if np.isfinite(z).all():
            one.record(z, {"test": test, "risk": risk})
            running.candidates.remove(one)
        else:
            running.drop(one, Diverged(one.variant.schedule.epochs, one.at.last_good))
