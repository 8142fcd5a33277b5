"""What every command does, from flags to an answer; cli.py parses the one and prints the other.

Modules with torch are imported only where there is something to compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from strata.pipeline import errors
from strata.pipeline.commands import baseline, lifecycle, storage, tables, weighing, worth_tables
from strata.pipeline.commands import clean as cleaning
from strata.pipeline.commands import explain as explaining
from strata.pipeline.commands import sweep as sweeping
from strata.pipeline.commands import verify as verifying
from strata.pipeline.commands.lifecycle import Answer, Options
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.plan import caching, compression, machine, memory, plan
from strata.pipeline.progress import size
from strata.pipeline.recipe import builtin, named_network, variants
from strata.pipeline.results import paper
from strata.pipeline.run import baselines, overview, ranks, stores
from strata.store.files.publish import replace


def list_recipes(options: Options) -> Answer:
    found = {name: builtin.load(name)[1] for name in builtin.names()}
    claims = {name: recipe.claim.text for name, recipe in found.items()}
    return Answer(claims, (tables.of_recipes(found),))


def make_plan(options: Options) -> Answer:
    """A plan that ``disk_budget`` does not allow is shown, then refused."""
    found = lifecycle.find(options)
    costs = plan.make_plan(found.recipe, found.data())
    todo = plan.steps(found.inventory(), solve=len(found.recipe.layers))
    space = {"needed_bytes": found.to_write(costs), "free_bytes": found.store.free_bytes()}
    value = {"recipe": found.name, **costs.as_json(), **space, "todo": [str(s) for s in todo]}
    shown = [tables.of_plan(found.recipe, costs), tables.plan_summary(found.recipe, costs, todo)]
    saved, lines = compression.saved(found.recipe, costs, found.data(), options)
    value |= {"compression": saved} if saved else {}
    shown += [*lines, tables.space(**space)]
    if blocks := named_network.listed(found.recipe.layers):
        value["blocks"] = blocks
        shown.insert(1, tables.of_blocks(found.recipe.network.said, blocks))
    refused = None
    if options["gpu_memory"] is not None:
        refused = _fitted(found, options["gpu_memory"], value, shown)
    worth, lines = weighing.weighed(found.recipe, costs, options)
    value |= {"economics": worth} if worth else {}
    shown += lines
    try:
        if plan.check_budget(costs, options["disk_budget"]):
            shown.append(
                "Within --disk-budget only if levels are removed once unneeded; `run` does so."
            )
    except errors.BudgetError as error:
        refused = refused or error
    return Answer(value, tuple(shown), refused)


def _fitted(
    found: overview.Overview, cap: int, value: dict[str, Any], shown: list[Any]
) -> errors.BudgetError | None:
    """Add to a plan how steps are divided to fit into device memory; returns why they cannot."""
    device = memory.named_device(found.recipe)
    try:
        accumulate = memory.fit(found.recipe, device, cap)
    except errors.BudgetError as error:
        return error
    value["accumulate"] = accumulate
    lines = memory.divided_layers(found.recipe, accumulate) or ["whole batches fit"]
    shown.append(f"Within --gpu-memory {size(cap)}: {'; '.join(lines)}.")
    return None


def calibrate(options: Options) -> Answer:
    """Measure this machine, and keep the figures where ``plan`` and ``--cache auto`` look."""
    from strata.pipeline.plan import hardware
    from strata.pipeline.run import device
    from strata.pipeline.study.calibrate import measure

    stores.check_calibrated(options["store"])
    found, report = lifecycle.find(options), lifecycle.reporting(options)
    chosen = device.pick(options["device"])
    if chosen.type == "cpu":
        hardware.keep_freed_memory()
    compute, _ = device.compute_dtype(found.recipe.schedule.precision, chosen)
    here = measure(found, chosen, device.dtype(compute), report)
    path = caching.calibrated(options["store"])
    replace(path.parent, path.name, machine.as_toml(here).encode())
    return Answer(asdict(here), (worth_tables.of_machine(here), f"kept in {path}"))


def status(options: Options) -> Answer:
    from strata.pipeline.results.status import status

    found = status(lifecycle.find(options))
    return Answer(found, (tables.of_status(found),))


def train(options: Options) -> Answer:
    return _done(*lifecycle.perform(options, solve=options["layer"]))


def materialize(options: Options) -> Answer:
    j = options["layer"]
    if not options["dry_run"]:
        return _done(*lifecycle.perform(options, write=j))
    todo = lifecycle.missing(options, write=j).steps
    lines = [f"would {step}" for step in todo] or [f"x_{j} is complete: nothing to do"]
    return Answer({"todo": todo}, tuple(lines))


def sweep(options: Options) -> Answer:
    found, j, keep = lifecycle.find(options), options["layer"], options["keep"]
    found.check_layer(j)
    compression.check_sweep(found.name, found.recipe)
    wanted = variants.variants(found.recipe, j, options["vary"], options["seed"])
    if keep:
        variants.check_keep(found.recipe, j, wanted, keep)
    return sweeping.solved(options, wanted)


def final(options: Options) -> Answer:
    recipe = lifecycle.find(options).recipe
    wanted = variants.finals(recipe, options["vary"], options["seed"])
    beyond = {"layer": len(recipe.layers) + 1, "keep": None}
    return sweeping.solved({**options, **beyond}, wanted)


def run(options: Options) -> Answer:
    found, done = lifecycle.perform(options, solve=len(lifecycle.find(options).recipe.layers))
    page = found.directory / "report.html"
    if ranks.leads() and (done or not page.exists()):
        from strata.pipeline.results.report import write_report

        page = write_report(lifecycle.find(options))
    said = _done(found, done)
    table = tables.of_evaluation(lifecycle.find(options).evaluation())
    return Answer(said.value, (*said.shown, table, f"report: {page}"))


def _done(found: overview.Overview, done: list[str]) -> Answer:
    value = {"run": str(found.directory), "store": str(found.store.root), "done": done}
    text = f"done: {', '.join(done)}" if done else "nothing to do: everything is there"
    return Answer(value, (text,))


def train_baseline(options: Options) -> Answer:
    found, record, done = baseline.perform(options)
    beside = baselines.greedy(found)
    said = _done(found, done)
    value = {**said.value, "result": record, "greedy": beside}
    return Answer(value, (*said.shown, tables.of_baseline(record, beside, found.name)))


def evaluate(options: Options) -> Answer:
    from strata.pipeline.train.evaluation import evaluate

    found = lifecycle.find(options)
    result = evaluate(found.existing(), found.store)
    return Answer(result, (tables.of_evaluation(result),))


def report(options: Options) -> Answer:
    if options["paper"]:
        value, shown = paper.report_paper(options["runs"])
        return Answer(value, tuple(shown))
    from strata.pipeline.results.report import write_report

    page = write_report(lifecycle.find(options))
    found = json.loads(page.with_suffix(".json").read_text("utf-8"))
    return Answer(found, (tables.of_outcomes(found["outcomes"]), f"report: {page}"))


def clean(options: Options, confirm: Callable[[str], None]) -> Answer:
    """
    Args:
        confirm: asked before anything trained goes; raises to stop.
    """
    found, j, dry_run = lifecycle.find(options), options["layer"], options["dry_run"]
    if j is not None:
        found.check_layer(j)
    what = cleaning.removal(found, j, features=options["features"], sweeps=options["sweeps"])
    text = f"{', '.join(what.names) or 'nothing'} ({size(what.nbytes)})"
    if what.is_costly and not (options["yes"] or dry_run):
        confirm(text)
    if not dry_run:
        cleaning.remove(found, what)
    removed = {"removed": [] if dry_run else what.names, "would_remove": what.names}
    said = f"{'would remove' if dry_run else 'removed'} {text}"
    return Answer({**removed, "bytes": what.nbytes}, (said,))


# ---- the store ----------------------------------------------------------------------------------


def verify(options: Options) -> Answer:
    found = lifecycle.find(options)
    how: Mapping[str, Any] = {"deep": options["deep"], "layer": options["layer"]}
    report = lifecycle.reporting(options)
    reads = not options["repair"]
    with cluster.crew(options, report, Interruptions(), reads=reads) as crew:
        checked = verifying.verify(found, **how, report=report, crew=crew)
    mended = []
    if options["repair"] and checked.count:
        found.existing()
    if options["repair"] and found.run and (checked.count or checked.partial):
        with lifecycle.at_work(found, options) as session:
            mended = verifying.repair(session, checked)
        checked = verifying.verify(lifecycle.find(options), **how)
    value = {**checked.as_json(), "mended": mended}
    lines = (*mended, *tables.findings(checked, deep=options["deep"]))
    return Answer(value, lines, checked.error)


def explain(options: Options) -> Answer:
    found = explaining.explain(lifecycle.find(options), options["layer"])
    return Answer([entry.as_json() for entry in found], tuple(tables.explanations(found)))


def evict(options: Options) -> Answer:
    found, j = lifecycle.find(options), options["layer"]
    freed = storage.evict(found, j, force=options["force"])
    text = f"removed x_{j}: {size(freed)} freed; `materialize --layer {j}` makes it again"
    return Answer({"freed": freed}, (text,))


def disk_use(options: Options) -> Answer:
    found = storage.disk_use(options["store"])
    return Answer(found, tables.of_disk_use(found))


def collect_garbage(options: Options) -> Answer:
    found = storage.garbage(options["store"])
    left = storage.collect(options["store"], found) if options["delete"] else None
    paths = [str(g.path) for g in (found if left is None else left)]
    value = {"garbage": [g.as_json() for g in found], "left": paths}
    return Answer(value, tuple(tables.of_garbage(found, left)))
