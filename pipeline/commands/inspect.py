"""Commands that look: `recipes`, `status`, `evaluate`, `report`, `statistics`, `audit` and
`export`."""

from __future__ import annotations

import secrets

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.options import Options
from strata.pipeline.recipe import builtin
from strata.pipeline.results import status as results
from strata.pipeline.run import levels
from strata.store.errors import LevelDamaged


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
    keys = chosen(found, options.layer, options.split, report.say)
    with Interruptions() as stop, cluster.crew(options, report, stop, reads=True) as crew:
        levels = statistics(found, keys, report, stop, crew)
    table = tables.of_statistics(f"levels of {found.directory}", levels, options.channels)
    return Answer({"run": str(found.directory), "levels": levels}, (table,))


def audit(options: Options) -> Answer:
    """Compare rows of every level that is there, or of x_0 and x_j, with what the images and the
    weights give. Raises as study/audit.py does; NotThereYet: there is no such level."""
    from strata.pipeline.run import device
    from strata.pipeline.run.session import Session
    from strata.pipeline.study import audit as study
    from strata.pipeline.study.statistics import chosen
    from strata.stages.data.opening import open_source

    found, report, left = lifecycle.find(options), lifecycle.reporting(options), list[str]()
    keys, run = chosen(found, options.layer, None, left.append), found.existing()
    if options.layer:
        images = levels.all_at(run, 0)
        keys = [key for key in images if levels.is_current(found.store, key)] + keys
    left += study.of_other_weights(run, found.store)
    if run.recipe.data.jpeg:
        left.append("what is made of JPEG copies ('data.jpeg') is left out: only x_0 is audited")
        keys = [key for key in keys if key.depth == 0]
    draw = secrets.randbits(32) if options.draw is None else options.draw
    with Interruptions() as stop:
        session = Session(run, found.store, device.pick(options.device), report, stop)
        device.check(run.compute, session.device)
        where, form = options.data or run.source, run.recipe.data
        with open_source(where, root=options.data_root, form=form) as source:
            audited = study.audit(session, source, keys, options.rows, draw)
            wrong = [one for one in audited if one["different"] or one["beside"]]
            reason = study.reason(session, source, wrong[0]) if wrong else None
    value = {"run": str(found.directory), "store": str(found.store.root), "draw": draw}
    value |= {"reason": reason, "confidence": study.CONFIDENCE, "levels": audited, "left_out": left}
    error = LevelDamaged(f"{len(wrong)} of {len(audited)} levels are not what {run.source} gives")
    error.add_note(reason or "")
    shown = [line for one in audited for line in study.lines(one)]
    return Answer(value, (*shown, *left), error if wrong else None)


def export(options: Options) -> Answer:
    """Write the network as plain PyTorch, and in ONNX. Raises as results/export.py does."""
    from strata.pipeline.results.export import export

    value, lines = export(lifecycle.find(options), options)
    return Answer({"to": str(options.to), **value}, tuple(lines))
