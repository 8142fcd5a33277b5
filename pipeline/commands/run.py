"""The commands `run`, `train` and `materialize`: what is missing is made, and nothing else."""

from __future__ import annotations

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer, Options
from strata.pipeline.run import ranks


def train(options: Options) -> Answer:
    """Solve layer j, and whatever it needs first."""
    return lifecycle.done_answer(*lifecycle.perform(options, solve=options.j))


def materialize(options: Options) -> Answer:
    """Write x_j, and whatever it needs first; with ``--dry-run`` only say what that is."""
    if not options.dry_run:
        return lifecycle.done_answer(*lifecycle.perform(options, write=options.j))
    todo = [str(step) for step in lifecycle.missing(options, write=options.j)[1]]
    lines = [f"would {step}" for step in todo] or [f"x_{options.j} is complete: nothing to do"]
    return Answer({"todo": todo}, tuple(lines))


def run(options: Options) -> Answer:
    """Solve every layer, evaluate, and write the report if anything has changed."""
    found = lifecycle.find(options)
    found, done = lifecycle.perform(options, found, solve=len(found.recipe.layers))
    if done:
        found = lifecycle.find(options)
    page = found.directory / "report.html"
    if ranks.leads() and (done or not page.exists()):
        from strata.pipeline.results.report import write_report

        write_report(found)
    said = lifecycle.done_answer(found, done)
    table = tables.of_evaluation(found.evaluation())
    return Answer(said.value, (*said.shown, table, f"report: {page}"))
