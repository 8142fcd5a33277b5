"""The command `baseline`: the network of a run trained end to end, to compare the two."""

from __future__ import annotations

from typing import Any

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer, Options
from strata.pipeline.recipe import variants
from strata.pipeline.run.rundir import Run


def baseline(options: Options) -> Answer:
    """Train the network end to end unless that was done; shown beside the greedy run."""
    found = lifecycle.find(options)
    saving = {"checkpointing": options.checkpointing, "micro_batch": options.micro_batch}
    chosen, done = variants.baseline(found.recipe, **saving), []
    result = found.run and found.run.baseline(chosen["variant"])
    if result is None or lifecycle.names_other_images(options, found):
        from strata.pipeline.train.train import train_end_to_end

        with lifecycle.at_work(found, options) as session:
            result, done = train_end_to_end(session, chosen)
        found = lifecycle.find(options)
    beside = _greedy(found.existing())
    said = lifecycle.done_answer(found, done)
    value = {**said.value, "result": result, "greedy": beside}
    return Answer(value, (*said.shown, tables.of_baseline(result, beside, found.name)))


def _greedy(run: Run) -> dict[str, Any] | None:
    """The figures of a baseline's record, for the greedy run; None before its last layer is
    solved."""
    evaluation = run.evaluation()
    if run.solved() < run.layers or evaluation is None or len(evaluation["layers"]) < run.layers:
        return None
    layers = [run.layer(j) or {} for j in range(1, run.layers + 1)]
    last = evaluation["layers"][-1]
    peaks = [layer["peak_memory_bytes"] for layer in layers]
    return {
        "test": last["test"],
        "ensemble": last["ensemble"]["probabilities"],
        "seconds": sum(layer["seconds"] for layer in layers),
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }
