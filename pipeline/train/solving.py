"""A problem under way: the solver of a layer (or of a whole network), its epochs and checkpoints.

The whole state (weights, momentum, best iterate, position in the epoch, history) goes into one
checkpoint file between two batches, so a run that was stopped or killed ends at the same weights as
one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from strata.pipeline.errors import BudgetError, remedy
from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.plan.costs import RISK_ROWS
from strata.pipeline.progress import Tick, duration, size
from strata.pipeline.recipe.tables import Schedule as RecipeSchedule
from strata.pipeline.run import outcome, weights
from strata.pipeline.run.rundir import CHECKPOINT
from strata.pipeline.run.session import Session
from strata.stages.errors import Diverged
from strata.stages.solve.evaluate import accuracies, cross_entropy, top_k
from strata.stages.solve.solve import SGDSchedule, Solver, logits_of
from strata.store.read.order import generator

CHECKPOINT_SECONDS = 20.0
"""Most work a kill can cost."""
SAY_SECONDS = 2.0
"""Time between two lines about epochs; all epochs are in epochs.jsonl."""


@dataclass
class Solving:
    """One layer, or a network from x_0 on, being solved."""

    session: Session
    j: int
    """The first layer that is trained: it sees x_{j-1}."""
    solver: Solver
    title: str
    directory: Path
    """Directory of its records."""
    history: list[dict[str, Any]] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)
    resumed_at: float = field(default_factory=time.monotonic)
    said_at: float = -SAY_SECONDS
    begun: float = field(default_factory=time.monotonic)
    whole: bool = True
    """This process does all of it."""
    expected: dict[str, Any] = field(default_factory=dict)
    good: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    """State at the end of the last epoch, for when the next one diverges."""
    before: int = 0
    """Epochs in the history that an earlier solver did; see compress.py."""
    compression: dict[str, Any] = field(default_factory=dict)
    """The filters removed so far, as the layer's record has them; empty: none."""

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    @property
    def input(self) -> str:
        """Fingerprint of x_{j-1}."""
        return self.session.run.nodes()[self.j - 1].fingerprint

    @property
    def kept_epoch(self) -> int | None:
        """The epoch whose iterate is the result, counted over the whole history."""
        own = self.solver.kept_epoch
        return None if own is None else self.before + own

    def save_if_due(self, *, now: bool = False) -> None:
        """Save, if a kill would cost much by now, or ``now``."""
        if now or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        self.solver.progress.seconds += time.monotonic() - self.resumed_at
        self.resumed_at = self.saved_at = time.monotonic()
        if self.session.ranks.leads:
            weights.write(self.checkpoint, self.solver.tensors(), self.note())

    def note(self) -> dict[str, Any]:
        """The state that is not tensors."""
        note = {**self.solver.snapshot(), "history": self.history, "input": self.input}
        return note | ({"compression": self.compression} if self.compression else {})

    def outcome(self) -> outcome.Outcome:
        """Seconds and bytes that it took until now, beside what was expected."""
        seconds, peak = time.monotonic() - self.begun, self.solver.progress.peak_bytes
        measured = outcome.figures(seconds, None, peak)
        return outcome.kept(self.session, self.expected, measured, whole=self.whole)

    def result(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """How good the final iterate is on the training and the test images, for a record."""
        last = self.history[-1]
        return {
            "kept_epoch": self.kept_epoch,
            "train": {"loss": last["train_loss"], "top1": last["train_top1"]},
            "test": {"loss": cross_entropy(logits, labels), **accuracies(logits, labels)},
            "seconds": sum(line["seconds"] for line in self.history),
        }

    def load(self) -> None:
        """Go on from the checkpoint, if there is one that was made on this x_{j-1}."""
        if not self.checkpoint.exists():
            return
        tensors, note = weights.read(self.checkpoint)
        if note["input"] != self.input:
            return
        self.solver.restore(tensors, note["progress"], note["scaler"])
        self.history, at, self.whole = note["history"], self.solver.progress, False
        where = f"in epoch {at.epoch + 1}, after batch {at.batch}"
        self.session.report.say(f"{self.title}: going on {where}")


@contextmanager
def keeping_good(solving: Solving, advice: str) -> Iterator[None]:
    """Keep the last good state if the loss diverges, and say where it is and what to do."""
    with remedy(Diverged, advice):
        try:
            yield
        except Diverged as error:
            is_saved = solving.checkpoint.exists()
            if solving.session.ranks.leads and solving.good is not None and not is_saved:
                weights.write(solving.checkpoint, *solving.good)
            if solving.checkpoint.exists():
                error.add_note(f"The last good state is kept in {solving.checkpoint}")
            raise


def schedule_of(asked: RecipeSchedule, accumulate: int) -> SGDSchedule:
    """A solver's schedule by a recipe's, with a step in so many micro-batches."""
    table: dict[str, Any] = {**vars(asked), "accumulate": accumulate}
    return SGDSchedule(**{known.name: table[known.name] for known in fields(SGDSchedule)})


# ---- epochs -------------------------------------------------------------------------------------


def train(solving: Solving, feed: ProblemFeed) -> None:
    """Do the epochs that are left. Raises as ``solve`` does."""
    solver = solving.solver
    if solver.schedule.keep == "best" and solver.progress.best_risk is None:
        solver.consider(_risk(solving, feed))
    for epoch in range(solver.progress.epoch, solver.schedule.epochs):
        _epoch(solving, feed, epoch)


def _epoch(solving: Solving, feed: ProblemFeed, epoch: int) -> None:
    session, solver, at = solving.session, solving.solver, solving.before + epoch
    last, images = solver.schedule.epochs - 1, feed.batches * feed.batch
    solving.resumed_at = time.monotonic()
    title = f"{solving.title}, epoch {epoch + 1} of {last + 1}"
    done, parts = solver.progress.batch, solver.schedule.accumulate
    with session.report.task(title, images, "images") as tick:
        tick(done * feed.batch)
        batches = feed.epoch_in_parts(at, done, parts) if parts > 1 else feed.epoch(at, done)
        result = solver.run_epoch(batches, feed.batches, lambda n: _after_batch(solving, n, tick))
    # Over all processes that worked on it.
    seconds = solver.epoch_seconds + time.monotonic() - solving.resumed_at
    solving.resumed_at = time.monotonic()
    every = session.run.recipe.schedule.test_every
    is_tested = every and (epoch + 1) % every == 0 and session.ranks.leads
    line = {
        "epoch": at + 1,
        "lr": solver.schedule.rate((epoch + 1) * feed.batches - 1, feed.batches),
        "train_loss": result["loss"],
        "train_top1": result["top1"],
        "test_top1": top1_on_test(solving) if is_tested else None,
        "seconds": seconds,
    }
    if solver.schedule.keep == "best":
        line["risk"] = _risk(solving, feed)
        solver.consider(line["risk"])
    solving.history.append(line)
    # In host memory, because a checkpoint may be 20 seconds old.
    tensors = {n: t.detach().cpu().clone() for n, t in solver.tensors().items()}
    solving.good = tensors, solving.note()
    if epoch == last or time.monotonic() - solving.said_at >= SAY_SECONDS:
        solving.said_at = time.monotonic()
        test = f", test {100 * line['test_top1']:.1f} %" if is_tested else ""
        session.report.say(
            f"{title}: loss {result['loss']:.4f}, train {100 * result['top1']:.1f} %{test}, "
            f"{duration(seconds)}, {images / seconds:,.0f} images/s"
        )
    solving.save_if_due()


def _after_batch(solving: Solving, samples: int, tick: Tick) -> None:
    session, progress = solving.session, solving.solver.progress
    tick(samples * session.ranks.count, f"loss {progress.loss_sum / progress.samples:.3f}")
    cap = session.gpu_memory
    if cap is not None and progress.peak_bytes > cap:
        raise BudgetError(
            f"a step of {solving.title} took {size(progress.peak_bytes)} of device memory; "
            f"--gpu-memory is {size(cap)}. Raise it, or lower 'schedule.batch'"
        )
    asked = session.ranks.any(session.stop.asked)  # all stop after the same batch
    solving.save_if_due(now=asked)
    if asked:
        raise KeyboardInterrupt


# ---- how good iterates are, several of them on one read of the features -------------------------


def logits_on_test(
    session: Session, j: int, problems: Sequence[nn.Module]
) -> tuple[list[np.ndarray], np.ndarray]:
    """z_j of the test images, float32 (n, classes), by every problem; labels, int64 (n,)."""
    logits = _logits(session, clean_batches(session, j - 1), problems)
    return logits, session.images()["test"].array("labels")


def top1_on_test(solving: Solving) -> float:
    """Share of the test images that the present iterate is right about."""
    (logits,), labels = logits_on_test(solving.session, solving.j, [solving.solver.problem])
    return top_k(logits, labels, 1)


def risks(session: Session, feed: ProblemFeed, problems: Sequence[nn.Module]) -> list[float]:
    """Empirical risk of the present iterates on a fixed part of the un-augmented training set."""
    rows = generator("risk rows", session.run.seed).permutation(len(feed.ids))[:RISK_ROWS]
    rows.sort()
    logits = _logits(session, (x for x, _ in feed.fixed(rows)), problems)
    return [cross_entropy(z, feed.labels[rows]) for z in logits]


def _risk(solving: Solving, feed: ProblemFeed) -> float:
    session, problem = solving.session, solving.solver.problem
    return session.ranks.by_leader(lambda: risks(session, feed, [problem])[0])


def _logits(
    session: Session, batches: Iterable[Tensor], problems: Sequence[nn.Module]
) -> list[np.ndarray]:
    device, compute = session.device, session.compute
    parts = [[logits_of(one, [x], device, compute).numpy() for one in problems] for x in batches]
    return [np.concatenate(own) for own in zip(*parts, strict=True)]
