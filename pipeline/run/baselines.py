"""The networks of a run that were trained end to end: variants, records, and the run beside them.

No torch here; ``train/end_to_end.py`` trains.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from strata.pipeline.errors import OptionRange
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import CHECKPOINT, NOTE, Run


@dataclass(frozen=True)
class BaselineVariant:
    """How memory is saved while a network is trained end to end."""

    checkpointing: bool
    accumulate: int
    """Micro-batches summed into one step."""
    micro_batch: int
    """Images in one of them."""

    @property
    def name(self) -> str:
        """Name of the variant's directory: ``plain``, ``checkpointing``, ``micro-16``, …"""
        parts = ["checkpointing"] * self.checkpointing
        parts += [f"micro-{self.micro_batch}"] * (self.accumulate > 1)
        return "-".join(parts) or "plain"


def variant(recipe: Recipe, *, checkpointing: bool, micro_batch: int | None) -> BaselineVariant:
    """The variant that flags ask for.

    Args:
        micro_batch: most images at a time; None: as the recipe accumulates.

    Raises:
        OptionRange: a micro-batch is larger than the batch.
    """
    batch, accumulate = recipe.schedule.batch, recipe.schedule.accumulate
    if micro_batch is not None:
        if micro_batch > batch:
            raise OptionRange(
                f"--micro-batch is {micro_batch}; 'schedule.batch' is only {batch}. Leave it out "
                "for whole batches"
            )
        accumulate = -(-batch // micro_batch)
    return BaselineVariant(checkpointing, accumulate, -(-batch // accumulate))


def current(run: Run | None, name: str) -> dict[str, Any] | None:
    """The record of a variant that was trained on the images that the run has today."""
    record = run.baseline(name) if run else None
    made = run and record and record["input"] == run.nodes()[0].fingerprint
    return record if made else None


def known(run: Run) -> list[dict[str, Any]]:
    """Every variant that was trained or begun: its name, ``trained``, ``partial``, or ``stale``
    where the images have changed since; epochs done, and test top-1."""
    found: list[dict[str, Any]] = []
    for name in run.baselines():
        record, epochs, state = run.baseline(name), run.recipe.schedule.epochs, "partial"
        if record is None:
            epochs = _epochs_done(run.baseline_directory(name) / CHECKPOINT)
        else:
            state = "trained" if current(run, name) else "stale"
        top1 = record and record["test"]["top1"]
        found.append({"variant": name, "state": state, "epochs": epochs, "test_accuracy": top1})
    return found


def _epochs_done(checkpoint: Path) -> int | None:
    """Epochs that a checkpoint's header says are done, without torch; None: it cannot be read."""
    try:
        with safe_open(str(checkpoint), framework="numpy") as file:
            return json.loads(file.metadata()[NOTE])["progress"]["epoch"]
    except (OSError, SafetensorError):
        return None


def greedy(found: Overview) -> dict[str, Any] | None:
    """The figures of a baseline's record, for the greedy run; None before its last layer is
    solved."""
    run = found.existing()
    evaluation = run.evaluation()
    if run.solved() < run.layers or evaluation is None or len(evaluation["layers"]) < run.layers:
        return None
    records = [run.layer(j) or {} for j in range(1, run.layers + 1)]
    last = evaluation["layers"][-1]
    peaks = [record["peak_memory_bytes"] for record in records]
    return {
        "test": last["test"],
        "ensemble": last["ensemble"]["probabilities"],
        "seconds": sum(record["seconds"] for record in records),
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }
