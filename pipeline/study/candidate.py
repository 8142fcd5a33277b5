"""A variant of a problem under way: its solver, its checkpoint, and the result it ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from strata.pipeline.progress import duration
from strata.pipeline.recipe.variants import Variant
from strata.pipeline.run import sweep_results, weights
from strata.pipeline.run.rundir import CHECKPOINT, CURVE, LOGITS, RESULT, write_curve
from strata.pipeline.run.session import Session
from strata.pipeline.train.solving import schedule_of
from strata.stages.errors import Diverged
from strata.stages.network.network import Problem, build_auxiliary, build_problem
from strata.stages.solve.solve import Progress, Solver
from strata.store.files.publish import make_directory, npy, replace, sealed
from strata.store.fingerprint import sha256
from strata.store.read.order import key_of


@dataclass(eq=False)
class Candidate:
    """A variant of problem j that is being solved."""

    session: Session
    j: int
    variant: Variant
    solver: Solver
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def at(self) -> Progress:
        """Epoch, batch and running sums of the solver."""
        return self.solver.progress

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done."""
        return self.at.epoch >= self.variant.schedule.epochs

    @property
    def keeps_best(self) -> bool:
        """Whether the iterate of the lowest training risk is kept, and not the last one."""
        return self.variant.schedule.keep == "best"

    @property
    def directory(self) -> Path:
        return sweep_results.place(self.session.run, self.j, self.variant.name)

    @property
    def made_of(self) -> Any:
        """Settings and x_{j-1} that a checkpoint or result must name to be believed."""
        return sweep_results.vouched(self.session.run, self.j, self.variant)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Modules that are trained, by the names of their files: a layer and its classifier, or a
        classifier alone."""
        problem = self.solver.problem
        if isinstance(problem, Problem):
            return {"weights": problem.layer, "auxiliary": problem.auxiliary}
        return {"auxiliary": problem}

    def save(self) -> None:
        """Write the checkpoint."""
        note = {**self.solver.snapshot(), "history": self.history, "made_of": self.made_of}
        weights.write(self.directory / CHECKPOINT, self.solver.tensors(), note)

    def load(self) -> None:
        """Go on from the checkpoint, if there is one of these settings on this x_{j-1}."""
        if not (self.directory / CHECKPOINT).exists():
            return
        tensors, note = weights.read(self.directory / CHECKPOINT)
        if note["made_of"] != self.made_of:
            return
        self.solver.restore(tensors, note["progress"], note["scaler"])
        self.history = note["history"]
        self.say(f"going on in epoch {self.at.epoch + 1}, after batch {self.at.batch}")

    def say(self, text: str) -> None:
        """Report a line about this variant."""
        self.session.report.say(f"{self.variant.name}: {text}")

    # ---- the end --------------------------------------------------------------------------------

    def record(self, logits: np.ndarray, judged: dict[str, Any]) -> None:
        """Write weights, curve and logits; the result that vouches for them comes last.

        Args:
            logits: z_j of the test images.
            judged: ``test``, as in the record of a layer, and ``risk``.
        """
        directory, digests = make_directory(self.directory), {}
        for name, module in self.parts.items():
            weights.write(directory / f"{name}.safetensors", module.state_dict())
            digests[name] = weights.digest(module.state_dict())
        write_curve(directory, self.history)
        replace(directory, LOGITS, npy(logits))
        files = [*(f"{name}.safetensors" for name in digests), CURVE, LOGITS]
        last = self.history[-1]
        self._write_result(
            {
                **digests,
                "diverged": None,
                "kept_epoch": self.solver.kept_epoch,
                "train": {"loss": last["train_loss"], "top1": last["train_top1"]},
                **judged,
                "files": {name: sha256((directory / name).read_bytes()) for name in files},
            }
        )
        test = f"test {100 * judged['test']['top1']:.2f} %"
        self.say(f"through, {test}, {duration(self.seconds)}")

    def record_divergence(self, error: Diverged) -> None:
        """Write that it diverged: the same settings would do so again, so that is a result too."""
        make_directory(self.directory)
        diverged = {"epoch": error.epoch, "last_good": error.last_good}
        self._write_result({"diverged": diverged, "files": {}})
        self.say(str(error))

    def _write_result(self, body: dict[str, Any]) -> None:
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in self.parts.items()}
        # A GPU counts the tensors of all variants, so it says nothing of one.
        on_cpu = self.session.device.type == "cpu"
        whole = {
            "name": self.variant.name,
            "changes": dict(self.variant.changes),
            "made_of": self.made_of,
            "parameters": sizes.get("weights", 0),
            "auxiliary_parameters": sizes["auxiliary"],
            "seconds": self.seconds,
            "peak_memory_bytes": self.at.peak_bytes if on_cpu else None,
            **body,
        }
        replace(self.directory, RESULT, sealed(whole))
        (self.directory / CHECKPOINT).unlink(missing_ok=True)

    @property
    def seconds(self) -> float:
        """Seconds of its own steps, and its share of reading, over all epochs and processes."""
        return sum(line["seconds"] for line in self.history) + self.at.seconds


def begin(session: Session, j: int, variant: Variant) -> Candidate:
    """The candidate of a variant, at its checkpoint or at its beginning."""
    seed = key_of("initial weights", variant.seed, j) % 2**63
    if variant.layer:
        problem = build_problem(variant.layer, variant.auxiliary, seed)
    else:
        problem = build_auxiliary(variant.auxiliary, seed)
    schedule = schedule_of(variant.schedule, session.run.accumulate[:j][-1])
    solver = Solver(problem, schedule, session.device, session.compute)
    one = Candidate(session, j, variant, solver)
    one.load()
    return one
