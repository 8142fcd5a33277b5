"""Commands that look: `recipes`, `status`, `evaluate`, `report`, `statistics` and `export`."""

from __future__ import annotations

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.options import Options
from strata.pipeline.recipe import builtin
from strata.pipeline.results import status as results


def recipes(options: Options) -> Answer:
    """The built-in recipes, and what each claims."""
    found = {name: builtin.load(name)[1] for name in builtin.names()}
    claims = {name: recipe.claim.text for name, recipe in found.items()}
    return Answer(claims, (tables.of_recipes(found),))


def status(options: Options) -> Answer:
    """Layers, accuracies and levels of a run."""
    found = results.status(lifecycle.find(options))
    return Answer(found, (tables.of_status(found),))


def evaluate(options: Options) -> Answer:
    """Accuracies of the solved layers and of the ensembles on the test images, computed anew."""
    from strata.pipeline.train.evaluation import evaluate

    found = lifecycle.find(options)
    result = evaluate(found.existing(), found.store)
    place = str(found.store.root)
    shown = tables.of_evaluation(result), f"labels from the store {place}"
    return Answer({**result, "store": place}, shown)


def report(options: Options) -> Answer:
    """Write the report of a run."""
    from strata.pipeline.results.report import write_report

    found = lifecycle.find(options)
    report = write_report(found)
    page = f"report: {found.directory / 'report.html'}"
    shown = tables.of_outcomes(report["outcomes"]), page
    return Answer(report, shown, left_out=report["left_out"])


def statistics(options: Options) -> Answer:
    """Look at every row of the levels that are asked for. Raises as study/statistics.py does."""
    from strata.pipeline.study.statistics import chosen, statistics

    found, report = lifecycle.find(options), lifecycle.reporting(options)
    keys = chosen(found, options.layer, options.split, report)
    with Interruptions() as stop, cluster.crew(options, report, stop, reads=True) as crew:
        levels = statistics(found, keys, report, stop, crew)
    table = tables.of_statistics(f"levels of {found.directory}", levels, options.channels)
    return Answer({"run": str(found.directory), "levels": levels}, (table,))


def export(options: Options) -> Answer:
    """Write the network as plain PyTorch, and in ONNX. Raises as results/export.py does."""
    from strata.pipeline.results.export import export

    value, lines = export(lifecycle.find(options), options)
    return Answer({"to": str(options.to), **value}, tuple(lines))
