"""The commands `sweep` and `final`: what they have to do, and doing only that.

A final classifier is a variant of problem J + 1, which has no layer: it reads x_J, as problem j
reads x_{j-1}. So checkpoints, results, and what makes them stale are those of a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.errors import BudgetError, OptionRange
from strata.pipeline.options import Options
from strata.pipeline.plan import compression, memory, plan
from strata.pipeline.plan.caching import caching
from strata.pipeline.progress import size
from strata.pipeline.recipe import variants
from strata.pipeline.recipe.variants import Variant
from strata.pipeline.run import sweep_results
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import Run
from strata.stages.errors import StageError


def sweep(options: Options) -> Answer:
    """Solve variants of layer j. Raises as :func:`_solved`."""
    found, j, keep = lifecycle.find(options), options.j, options.keep
    found.check_layer(j)
    if j <= (given := found.recipe.given):
        raise OptionRange(
            f"layer {j} is given ('network.frozen' is {given}), so there is nothing to vary: sweep "
            "a layer above, or `final`"
        )
    compression.check_sweep(found.name, found.recipe)
    wanted = variants.variants(found.recipe, j, options.vary, options.seed)
    if keep:
        variants.check_keep(found.recipe, j, wanted, keep)
    return _solved(found, options, wanted)


def final(options: Options) -> Answer:
    """Train other final classifiers on x_J. Raises as :func:`_solved`."""
    found = lifecycle.find(options)
    wanted = variants.finals(found.recipe, options.vary, options.seed)
    return _solved(found, replace(options, layer=len(found.recipe.layers) + 1), wanted)


def _solved(found: Overview, options: Options, wanted: Sequence[Variant]) -> Answer:
    """Solve the variants that are not through, with what they need, and keep the one that is to be
    kept. Every result is shown, also where there is none to keep; where there is nothing to do,
    torch is not even imported.

    Raises:
        RunConflict: there is another layer j where one is to be kept.
        BudgetError: they do not fit into ``--gpu-memory`` together.
        StageError: the variant that is to be kept diverged, or all did.
    """
    j, run, done, error = options.j, found.run, list[str](), None
    results = sweep_results.results(run, j, wanted)
    for name, result in results.items():
        if result is not None:
            said = "diverged" if result["diverged"] else "through"
            lifecycle.reporting(options).say(f"{name}: {said} already")
    todo = [variant for variant in wanted if results[variant.name] is None]
    try:
        one = sweep_results.chosen(run, j, results, options.keep) if options.keep else None
        if todo or (options.keep and not sweep_results.is_kept(run, j, one)):
            done = _solve(found, options, wanted, todo)
        else:
            with lifecycle.curves(found, options):  # of what is there
                pass
    except StageError as failed:
        error = failed
    if done or error:
        run = lifecycle.find(options).run
    ranked = sweep_results.ranked(sweep_results.results(run, j, wanted))
    if error and len(ranked) < len(wanted):
        raise error
    if not error and all(result["diverged"] for result in ranked):
        error = StageError("every variant diverged. Lower 'schedule.lr'")
    kept = next((r["name"] for r in ranked if sweep_results.is_kept(run, j, r)), None)
    value = {
        "run": str(found.directory),
        "layer": j if j <= len(found.recipe.layers) else None,
        "done": done,
        "kept": kept,
        "variants": [{k: v for k, v in r.items() if k != "files"} for r in ranked],
    }
    title = f"variants of {sweep_results.title(found.recipe, j)} in {found.directory}"
    return Answer(value, (tables.of_sweep(title, ranked, kept),), error)


def _solve(
    found: Overview, options: Options, wanted: Sequence[Variant], todo: Sequence[Variant]
) -> list[str]:
    """Solve and keep what is missing; returns what was done."""
    from strata.pipeline.study.sweep import keep, sweep
    from strata.pipeline.train.algorithm import make
    from strata.pipeline.train.evaluation import evaluate

    j, done = options.j, []
    title = sweep_results.title(found.recipe, j)
    how = caching(found.recipe, plan.make_plan(found.recipe, found.data()), options)
    for line in how.said:
        lifecycle.reporting(options).say(line)
    with lifecycle.at_work(found, options, how.profiles) as session:
        run = session.run
        if todo:
            _check_memory(run, j, session.room, todo, options.gpu_memory)
            done += plan.named(make(session, plan.steps_below, j=j, cached=how.depths))
            sweep(session, j, wanted)
            done += [f"solve {title} with {variant.name}" for variant in todo]
            if j > run.layers:
                evaluate(run, session.store)
        if options.keep:
            results = sweep_results.results(run, j, wanted)
            one = sweep_results.chosen(run, j, results, options.keep)
            assert one is not None, "all variants are through"
            keep(session, j, one)
            done.append(f"keep {one['name']} as layer {j}")
    return done


def _check_memory(
    run: Run, j: int, device: memory.Device, todo: Sequence[Variant], cap: int | None
) -> None:
    """Refuse variants that do not fit into ``--gpu-memory`` together. Raises BudgetError, with both
    numbers."""
    if cap is None:
        return
    problems = [(one.layer, one.auxiliary, one.schedule) for one in todo]
    needed = memory.peak_together(run.recipe, j, device, run.accumulate[:j][-1], problems)
    if needed is None:
        raise BudgetError(f"--gpu-memory: how much memory layer {j} takes is not known")
    if needed > cap:
        raise BudgetError(
            f"{len(todo)} variants of {sweep_results.title(run.recipe, j)} need {size(needed)} of "
            f"device memory together; --gpu-memory is {size(cap)}. Vary fewer at a time, or raise "
            "it"
        )
