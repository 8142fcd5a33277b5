"""A problem under way: the solver of a layer (or of a whole network), its records and checkpoint.

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

from torch import Tensor

from strata.pipeline.errors import remedy
from strata.pipeline.recipe.tables import Schedule as RecipeSchedule
from strata.pipeline.run import outcome, weights
from strata.pipeline.run.rundir import CHECKPOINT
from strata.pipeline.run.session import Session
from strata.stages.errors import Diverged
from strata.stages.solve.solve import SGDSchedule, Solver

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

    @property
    def is_due(self) -> bool:
        """Is it time for a checkpoint?"""
        return time.monotonic() - self.saved_at > CHECKPOINT_SECONDS

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


def schedule_of(asked: RecipeSchedule, accumulate: int) -> SGDSchedule:
    """What a solver needs of a recipe's, with a step in so many micro-batches."""
    table: dict[str, Any] = {**vars(asked), "accumulate": accumulate}
    return SGDSchedule(**{known.name: table[known.name] for known in fields(SGDSchedule)})
