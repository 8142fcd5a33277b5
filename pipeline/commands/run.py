"""The commands `run`, `train`, `materialize` and `baseline`: what is missing is made, and nothing
else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.options import Options
from strata.pipeline.plan.plan import named
from strata.pipeline.recipe import variants
from strata.pipeline.run import ranks
from strata.pipeline.run.rundir import Run


def train(options: Options) -> Answer:
    """Solve layer j, and whatever it needs first."""
    found = lifecycle.find(options)
    return lifecycle.done_answer(*lifecycle.perform(found, options, solve=options.j))


def materialize(options: Options) -> Answer:
    """Write x_j, and whatever it needs first; with ``--dry-run`` only say what that is."""
    found = lifecycle.find(options)
    if not options.dry_run:
        return lifecycle.done_answer(*lifecycle.perform(found, options, write=options.j))
    todo = named(lifecycle.missing(found, options, write=options.j)[0])
    lines = [f"would {step}" for step in todo] or [f"x_{options.j} is complete: nothing to do"]
    return Answer({"todo": todo}, tuple(lines))


def run(options: Options) -> Answer:
    """Solve every layer, evaluate, and write the report if anything has changed. Where all layers
    are given, write x_J."""
    found = lifecycle.find(options)
    found, done = lifecycle.perform(found, options, **found.goal)
    if layers := found.goal.get("write"):
        said, name = lifecycle.done_answer(found, done), found.name
        next_one = (
            f"all {layers} layers are given, and x_{layers} is there: `probe {name}` and `final "
            f"{name} --vary …` train classifiers on it"
        )
        return Answer(said.value, (*said.shown, next_one))
    page, left_out = found.directory / "report.html", list[str]()
    if ranks.leads() and (done or not page.exists()):
        from strata.pipeline.results.report import write_report

        left_out = write_report(found)["left_out"]
    said = lifecycle.done_answer(found, done)
    table = tables.of_evaluation(found.evaluation())
    return Answer(said.value, (*said.shown, table, f"report: {page}"), left_out=left_out)


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
            found = replace(found, run=session.run)
    else:
        with lifecycle.curves(found, options):  # of what is there
            pass
    beside = _greedy(found.existing())
    said = lifecycle.done_answer(found, done)
    value = {**said.value, "result": result, "greedy": beside}
    return Answer(value, (*said.shown, tables.of_baseline(result, beside, found.name)))


def _greedy(run: Run) -> dict[str, Any] | None:
    """The figures of a baseline's record, for the greedy run; None before its last layer is
    solved."""
    evaluation, trained = run.evaluation(), range(run.recipe.given + 1, run.layers + 1)
    if run.solved() < run.layers or evaluation is None or not trained:
        return None
    if len(evaluation["layers"]) < len(trained):
        return None
    layers = [run.layer(j) or {} for j in trained]
    last = evaluation["layers"][-1]
    peaks = [layer["peak_memory_bytes"] for layer in layers]
    return {
        "test": last["test"],
        "ensemble": last["ensemble"]["probabilities"],
        "seconds": sum(layer["seconds"] for layer in layers),
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }
