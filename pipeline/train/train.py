"""Solve layer j: min over (θ_j, γ_j) on x_{j-1}, taken up where an interruption left it.

The whole state (weights, momentum, best iterate, position in the epoch, history) goes into one
checkpoint file between two batches, so a run that was stopped or killed ends at the same weights as
one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from strata.pipeline.errors import BudgetError, remedy
from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.progress import Tick, duration, size
from strata.pipeline.recipe.tables import Schedule as RecipeSchedule
from strata.pipeline.run import outcome, ranks, weights
from strata.pipeline.run.rundir import CHECKPOINT, LOGITS, write_curve
from strata.pipeline.run.session import Session
from strata.pipeline.train import compress, judging, scales
from strata.stages.errors import Diverged
from strata.stages.network.network import build_problem
from strata.stages.solve.evaluate import accuracies, cross_entropy
from strata.stages.solve.solve import Schedule, Solver
from strata.store.files.publish import make_directory, npy, replace
from strata.store.read.order import key_of

CHECKPOINT_SECONDS = 20.0
"""Most work a kill can cost."""
SAY_SECONDS = 2.0
"""Between two lines about epochs; all epochs are in epochs.jsonl."""


@dataclass
class Solving:
    """One layer, or a network from x_0 on, being solved."""

    session: Session
    j: int
    """The first layer that is trained: it sees x_{j-1}."""
    solver: Solver
    title: str
    directory: Path
    """Where its records go."""
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
    """Epochs in the history that an earlier solver did; see compressing.py."""
    compression: dict[str, Any] = field(default_factory=dict)
    """What was removed so far, as the layer's record has it; empty: nothing."""

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    @property
    def input(self) -> str:
        """Fingerprint of x_{j-1}."""
        return self.session.run.nodes()[self.j - 1].fingerprint

    @property
    def kept_epoch(self) -> int | None:
        """Whose iterate is the result, counted over the whole history."""
        own = self.solver.kept_epoch
        return None if own is None else self.before + own

    def worth_saying(self, *, last: bool) -> bool:
        """The first and the last epoch of a layer, and otherwise one every now and then."""
        if last or time.monotonic() - self.said_at >= SAY_SECONDS:
            self.said_at = time.monotonic()
            return True
        return False

    def save(self) -> None:
        self.solver.progress.seconds += time.monotonic() - self.resumed_at
        self.resumed_at = self.saved_at = time.monotonic()
        if self.session.ranks.leads:
            weights.write(self.checkpoint, self.solver.tensors(), self.note())

    def note(self) -> dict[str, Any]:
        """The state that is not tensors."""
        removed = {"compression": self.compression} if self.compression else {}
        return {
            **self.solver.snapshot(),
            "history": self.history,
            "input": self.input,
            **removed,
        }

    def remember(self) -> None:
        """Keep the present state in host memory; a checkpoint may be 20 seconds old."""
        tensors = {n: t.detach().cpu().clone() for n, t in self.solver.tensors().items()}
        self.good = tensors, self.note()

    def save_good(self) -> None:
        """After a divergence: leave the last good state where the checkpoint would be."""
        leads = self.session.ranks.leads
        if leads and self.good is not None and not self.checkpoint.exists():
            weights.write(self.checkpoint, *self.good)

    def outcome(self) -> outcome.Outcome:
        """What it took until now, beside what was expected."""
        seconds, peak = time.monotonic() - self.begun, self.solver.progress.peak_bytes
        measured = outcome.figures(seconds, None, peak)
        return outcome.kept(self.session, self.expected, measured, whole=self.whole)

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


def solve(session: Session, j: int, *, cached: bool = True) -> None:
    """Solve layer j on x_{j-1} and record it.

    Args:
        cached: False recomputes x_{j-1} from the images in every batch, whatever is in the store.

    Raises:
        Diverged: the loss is not finite; the last checkpoint is kept.
        KeyboardInterrupt: somebody asked to stop; the state is saved.
    """
    recipe = session.run.recipe
    seed = key_of("initial weights", session.run.seed, j) % 2**63
    problem = build_problem(*recipe.problems[j - 1], seed)
    schedule = schedule_of(recipe.schedule, session.run.accumulate[j - 1])
    solver = Solver(problem, schedule, session.device, session.compute, ranks=session.ranks)
    solving = Solving(session, j, solver, f"layer {j}", session.run.layer_directory(j))
    compress.take_up(solving)
    solving.load()
    advice = f"It was layer {j}: lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    if recipe.compress:
        advice += f", or 'compress.lr' ({recipe.compress.lr:g}) if it was fine-tuned"
    with ProblemFeed(session, j - 1, cached=cached) as feed, keeping_good(solving, advice):
        rows = min(feed.batch, len(feed.ids))
        ranks.check_parts(rows, schedule.accumulate, session.ranks.count)
        solving.expected = outcome.of_solving(session, j, feed.features.base)
        train(solving, feed)
        compress.compress(solving, feed, train, _top1)
        _finish(solving, feed)


@contextmanager
def keeping_good(solving: Solving, advice: str) -> Iterator[None]:
    """Where the loss diverges, keep the last good state, and say where it is and what to do."""
    with remedy(Diverged, advice):
        try:
            yield
        except Diverged as error:
            solving.save_good()
            if solving.checkpoint.exists():
                error.add_note(f"The last good state is kept in {solving.checkpoint}")
            raise


def schedule_of(asked: RecipeSchedule, accumulate: int) -> Schedule:
    """What a solver needs of a recipe's, with a step in so many micro-batches."""
    table: dict[str, Any] = {**vars(asked), "accumulate": accumulate}
    return Schedule(**{known.name: table[known.name] for known in fields(Schedule)})


def train(solving: Solving, feed: ProblemFeed) -> None:
    """The epochs that are left."""
    solver = solving.solver
    if solver.schedule.keep == "best" and solver.progress.best_risk is None:
        solver.consider(_risk(solving.session, feed, solver.problem))
    for epoch in range(solver.progress.epoch, solver.schedule.epochs):
        _epoch(solving, feed, epoch)


def _epoch(solving: Solving, feed: ProblemFeed, epoch: int) -> None:
    session, solver = solving.session, solving.solver
    total = solver.schedule.epochs
    solving.resumed_at = time.monotonic()
    title = f"{solving.title}, epoch {epoch + 1} of {total}"
    done = solver.progress.batch
    with session.report.task(title, feed.batches * feed.batch, "images") as tick:
        tick(done * feed.batch)
        parts = solver.schedule.accumulate
        at = solving.before + epoch
        batches = feed.epoch_in_parts(at, done, parts) if parts > 1 else feed.epoch(at, done)
        result = solver.run_epoch(batches, feed.batches, lambda n: _after_batch(solving, n, tick))
    seconds = _epoch_seconds(solving)
    rate = solver.schedule.rate((epoch + 1) * feed.batches - 1, feed.batches)
    line = {
        "epoch": solving.before + epoch + 1,
        "lr": rate,
        "train_loss": result["loss"],
        "train_top1": result["top1"],
        "test_top1": _test_accuracy(session, solving.j, solver.problem, epoch + 1),
        "seconds": seconds,
    }
    if solver.schedule.keep == "best":
        line["risk"] = _risk(session, feed, solver.problem)
        solver.consider(line["risk"])
    solving.history.append(line)
    solving.remember()
    if solving.worth_saying(last=epoch + 1 == total):
        session.report.say(f"{title}: {_epoch_text(line, feed.batches * feed.batch)}")
    if time.monotonic() - solving.saved_at > CHECKPOINT_SECONDS:
        solving.save()


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
    if asked or time.monotonic() - solving.saved_at > CHECKPOINT_SECONDS:
        solving.save()
    if asked:
        raise KeyboardInterrupt


def _epoch_seconds(solving: Solving) -> float:
    """Seconds of the epoch that just ended, over all processes that worked on it."""
    spent = solving.solver.epoch_seconds + time.monotonic() - solving.resumed_at
    solving.resumed_at = time.monotonic()
    return spent


def _epoch_text(line: dict[str, Any], samples: int) -> str:
    test = "" if line["test_top1"] is None else f", test {100 * line['test_top1']:.1f} %"
    return (
        f"loss {line['train_loss']:.4f}, train {100 * line['train_top1']:.1f} %{test}, "
        f"{duration(line['seconds'])}, {samples / line['seconds']:,.0f} images/s"
    )


def _test_accuracy(session: Session, j: int, problem: nn.Module, epoch: int) -> float | None:
    every = session.run.recipe.schedule.test_every
    if not every or epoch % every or not session.ranks.leads:
        return None
    return accuracies(*logits_of_tests(session, j, problem))["top1"]


def _top1(solving: Solving) -> float:
    session, j, problem = solving.session, solving.j, solving.solver.problem
    share = session.ranks.told(lambda: accuracies(*logits_of_tests(session, j, problem))["top1"])
    assert share is not None, "every data set has two classes"
    return share


def logits_of_tests(session: Session, j: int, problem: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """What a network that sees x_{j-1} says of the test images, float32 (n, classes); labels."""
    (logits,) = judging.logits_on_test(session, j, [problem])
    return logits, judging.labels_of_test(session)


def _risk(session: Session, feed: ProblemFeed, problem: nn.Module) -> float:
    return session.ranks.told(lambda: judging.risks(session, feed, [problem])[0])


def _finish(solving: Solving, feed: ProblemFeed) -> None:
    """Write weights, scales, curve and test logits; the record that vouches for them comes last."""
    session, j = solving.session, solving.j
    problem = solving.solver.finish()
    if not session.ranks.leads:
        return
    logits, labels = logits_of_tests(session, j, problem)
    if not np.isfinite(logits).all():
        raise Diverged(solving.solver.schedule.epochs, solving.solver.progress.last_good)
    directory = make_directory(session.run.layer_directory(j))
    layer, auxiliary = problem.layer.state_dict(), problem.auxiliary.state_dict()
    weights.write(directory / "weights.safetensors", layer)
    weights.write(directory / "auxiliary.safetensors", auxiliary)
    quantised = scales.keep(session, j, problem.layer, feed.features)
    write_curve(directory, solving.history)
    record = {
        "layer": j,
        "input": solving.input,
        "lineage": session.run.lineage(j - 1),
        "weights": weights.digest(layer),
        "auxiliary": weights.digest(auxiliary),
        **quantised,
        "parameters": sum(p.numel() for p in problem.layer.parameters()),
        "auxiliary_parameters": sum(p.numel() for p in problem.auxiliary.parameters()),
        "kept_epoch": solving.kept_epoch,
        "train": {
            "loss": solving.history[-1]["train_loss"],
            "top1": solving.history[-1]["train_top1"],
        },
        "test": {"loss": cross_entropy(logits, labels), **accuracies(logits, labels)},
        "seconds": sum(line["seconds"] for line in solving.history),
        "peak_memory_bytes": solving.solver.progress.peak_bytes,
        "outcome": solving.outcome(),
    }
    if solving.compression:
        record["compression"] = solving.compression
    replace(directory, LOGITS, npy(logits))
    session.run.write_layer(j, record)
    solving.checkpoint.unlink(missing_ok=True)
    session.report.say(
        f"solved layer {j}: test {100 * record['test']['top1']:.2f} %, "
        f"{duration(record['seconds'])}"
    )
