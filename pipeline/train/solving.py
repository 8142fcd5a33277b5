"""A problem under way: a layer with its auxiliary classifier, a classifier, or a whole network.

The whole state (weights, momentum, best iterate, position in the epoch, history) goes into one
checkpoint file between two batches, so a run that was stopped or killed ends at the same weights as
one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from strata.pipeline.errors import BudgetError
from strata.pipeline.progress import duration, size
from strata.pipeline.run import record, weights
from strata.pipeline.run.record import CHECKPOINT
from strata.pipeline.run.session import Session
from strata.stages.errors import Diverged
from strata.stages.network.network import Problem
from strata.stages.solve.evaluate import said
from strata.stages.solve.loss import loss_of
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Progress, Solver
from strata.store.read.order import key_of

CHECKPOINT_SECONDS = 20.0
"""Most work a kill can cost."""
SAY_SECONDS = 2.0
"""Time between two lines about epochs; all epochs are in epochs.jsonl."""


@dataclass(eq=False)
class Solving:
    """A problem under way."""

    session: Session
    j: int
    """The first layer that is trained: it sees x_{j-1}. J + 1: a classifier of x_J."""
    solver: Solver
    title: str
    directory: Path
    """Directory of its checkpoint, and of its files once it is through."""
    made_of: Mapping[str, Any]
    """What its checkpoint must say to be believed; see run/record.py."""
    advice: str = ""
    """What to do if it diverges. Without one, others go on, and no good state of it is kept."""
    file: str = "weights"
    """Name of its file, where it is no layer with a classifier, which have two."""
    history: list[dict[str, Any]] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)
    said_at: float = -SAY_SECONDS
    good: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    """State at the end of the last epoch, for when the next one diverges before it is saved."""
    before: int = 0
    """Epochs in the history that an earlier solver did; see compress.py."""
    compression: dict[str, Any] = field(default_factory=dict)
    """The filters removed so far, as the layer's record has them; empty: none."""

    @property
    def at(self) -> Progress:
        """Epoch, batch and running sums of the solver."""
        return self.solver.progress

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done."""
        return self.at.epoch >= self.solver.schedule.epochs

    @property
    def keeps_best(self) -> bool:
        """Whether the iterate of the lowest training risk is kept, and not the last one."""
        return self.solver.schedule.keep == "best"

    @property
    def kept_epoch(self) -> int | None:
        """The epoch whose iterate is the result, counted over the whole history."""
        own = self.at.best_epoch if self.keeps_best else self.at.epoch
        return None if own is None else self.before + own

    @property
    def seconds(self) -> float:
        """Seconds of its own steps, and its share of reading, over all epochs and processes."""
        return sum(line["seconds"] for line in self.history) + self.at.seconds

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Modules that are trained, by the names of their files."""
        problem = self.solver.problem
        if isinstance(problem, Problem):
            return {"weights": problem.layer, "auxiliary": problem.auxiliary}
        return {self.file: problem}

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters, by their names in a record."""
        names = {"weights": "parameters", "auxiliary": "auxiliary_parameters"}
        return {names[n]: sum(p.numel() for p in m.parameters()) for n, m in self.parts.items()}

    # ---- the checkpoint -------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    def save_if_due(self, *, now: bool = False) -> None:
        """Save, if a kill would cost much by now, or ``now``."""
        if now or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the checkpoint; of several ranks the leader does. Raises Diverged: a loss, or what
        is trained, is not finite, and nothing is written."""
        self.saved_at = time.monotonic()
        if self.session.ranks.leads:
            self.solver.settle()
            weights.write(self.checkpoint, self.solver.tensors(), self.note())

    def note(self) -> dict[str, Any]:
        """The state that is not tensors, as JSON: what a checkpoint says beside them."""
        note = {**self.solver.snapshot(), "history": self.history, **self.made_of}
        return note | ({"compression": self.compression} if self.compression else {})

    def load(self, fit: Callable[[Solving, dict[str, Any]], None] | None = None) -> bool:
        """Go on from the checkpoint, if there is one that is believed; says whether it was.

        Args:
            fit: puts the solver in place that a note is about, if that may be another one.
        """
        if not self.checkpoint.exists():
            return False
        tensors, note = weights.read(self.checkpoint)
        if not record.agrees(note, self.made_of):
            return False
        if fit is not None:
            fit(self, note)
        self.solver.restore(tensors, note["progress"], note["scaler"])
        self.history = note["history"]
        where = f"in epoch {self.at.epoch + 1}, after batch {self.at.batch}"
        self.say(f"going on {where}")
        return True

    # ---- what happens to it ---------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Report a line about this problem."""
        self.session.report.say(f"{self.title}: {text}")

    def check_memory(self) -> None:
        """Raises BudgetError: a step took more than ``--gpu-memory``."""
        cap = self.session.options.gpu_memory
        if cap is not None and self.at.peak_bytes > cap:
            raise BudgetError(
                f"a step of {self.title} took {size(self.at.peak_bytes)} of device memory; "
                f"--gpu-memory is {size(cap)}. Raise it, or lower 'schedule.batch'"
            )

    def keep_good(self) -> None:
        """Remember the state, in host memory, until there is a checkpoint."""
        self.good = None
        if self.checkpoint.exists():
            return
        tensors = {n: t.detach().cpu().clone() for n, t in self.solver.tensors().items()}
        self.good = tensors, self.note()


def solver_of(
    session: Session, j: int, problem: nn.Module, specs: Iterable[Any], schedule: SGDSchedule
) -> Solver:
    """A solver of problem j, by the loss of the session's recipe; what its steps draw follows from
    the run's seed.

    Args:
        specs: of the layers and classifiers in it.
    """
    seed, loss = session.run.seed, loss_of(session.run.recipe.loss.name)
    on, draws = (session.device, session.compute), None
    if schedule.mixup or loss.own or any(spec.draws for spec in specs):
        draws = lambda *step: key_of("draws of a step", seed, j, *step) % 2**63  # noqa: E731
    return Solver(problem, schedule, *on, ranks=session.ranks, draws=draws, loss=loss)


def give_up(solving: Solving, error: Diverged) -> NoReturn:
    """Keep the last good state of a problem that diverged; raises, saying where it is and what to
    do."""
    is_saved = solving.checkpoint.exists()
    if solving.session.ranks.leads and solving.good is not None and not is_saved:
        weights.write(solving.checkpoint, *solving.good)
    if solving.checkpoint.exists():
        error.add_note(f"The last good state is kept in {solving.checkpoint}")
    error.add_note(solving.advice)
    raise error


def how_good(solving: Solving, found: Mapping[str, Any]) -> str:
    """Metric, loss and time of a record, for the message that a problem is through."""
    test, taken = found["test"], duration(found["seconds"])
    nats = solving.solver.loss.kind == "cross-entropy"
    loss = f"{test['loss']:.4f} nats" if nats else f"loss {test['loss']:.4f}"
    return f"test {said(test)}, {loss}, {taken}"
