"""The commands `sweep` and `final`: what they have to do, and doing only that.

A final classifier is a variant of problem J + 1, which has no layer: it reads x_J, as problem j
reads x_{j-1}. So checkpoints, results, and what makes them stale are those of a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer, Options
from strata.pipeline.errors import BudgetError
from strata.pipeline.plan import compression, memory, plan
from strata.pipeline.plan.caching import caching
from strata.pipeline.progress import size
from strata.pipeline.recipe import variants
from strata.pipeline.recipe.variants import Variant
from strata.pipeline.run import sweep_results
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import Run
from strata.stages.errors import StageError
from strata.stages.network import footprint


def sweep(options: Options) -> Answer:
    """Solve variants of layer j. Raises as :func:`perform`."""
    found, j, keep = lifecycle.find(options), options.j, options.keep
    found.check_layer(j)
    compression.check_sweep(found.name, found.recipe)
    wanted = variants.variants(found.recipe, j, options.vary, options.seed)
    if keep:
        variants.check_keep(found.recipe, j, wanted, keep)
    return _solved(found, options, wanted)


def final(options: Options) -> Answer:
    """Train other final classifiers on x_J. Raises as :func:`perform`."""
    found = lifecycle.find(options)
    wanted = variants.finals(found.recipe, options.vary, options.seed)
    return _solved(found, replace(options, layer=len(found.recipe.layers) + 1), wanted)


def _solved(found: Overview, options: Options, wanted: Sequence[Variant]) -> Answer:
    """Every variant's result is shown, also where there is none to keep."""
    j, error = options.j, None
    done: list[str] = []
    try:
        done = perform(found, options, wanted)
    except StageError as failed:
        error = failed
    run = lifecycle.find(options).run if done or error else found.run
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


def perform(found: Overview, options: Options, wanted: Sequence[Variant]) -> list[str]:
    """Solve the variants that are not through, with what they need, and keep the one that is to be
    kept; says what was done. Where there is nothing to do, torch is not even imported.

    Raises:
        RunConflict: there is another layer j where one is to be kept.
        BudgetError: they do not fit into ``--gpu-memory`` together.
        StageError: the variant that is to be kept diverged, or all did.
    """
    j, report = options.j, lifecycle.reporting(options)
    results = sweep_results.results(found.run, j, wanted)
    for name, result in results.items():
        if result is not None:
            report.say(f"{name}: {'diverged' if result['diverged'] else 'through'} already")
    finished = True
    if options.keep:
        one = sweep_results.chosen(results, options.keep)
        sweep_results.check_free(found.run, j, one)
        finished = sweep_results.is_kept(found.run, j, one)
    todo = [variant for variant in wanted if results[variant.name] is None]
    return _solve(found, options, wanted, todo) if todo or not finished else []


def _solve(
    found: Overview, options: Options, wanted: Sequence[Variant], todo: Sequence[Variant]
) -> list[str]:
    from strata.pipeline.study.sweep import keep, sweep
    from strata.pipeline.train.algorithm import prepare
    from strata.pipeline.train.evaluation import evaluate

    j, done = options.j, []
    how = caching(found.recipe, plan.make_plan(found.recipe, found.data()), options)
    for line in how.said:
        lifecycle.reporting(options).say(line)
    with lifecycle.at_work(found, options, how.profiles) as session:
        check_memory(session.run, j, session.room, todo, options.gpu_memory)
        if todo:
            done += map(str, prepare(session, j, cached=how.depths))
            sweep(session, j, wanted)
            title = sweep_results.title(found.recipe, j)
            done += [f"solve {title} with {variant.name}" for variant in todo]
            if j > session.run.layers:
                evaluate(session.run, session.store)
        if options.keep:
            results = sweep_results.results(session.run, j, wanted)
            one = sweep_results.chosen(results, options.keep)
            assert one is not None, "all variants are through"
            sweep_results.check_free(session.run, j, one)
            keep(session, j, one)
            done.append(f"keep {one['name']} as layer {j}")
    return done


def check_memory(
    run: Run, j: int, device: memory.Device, together: Sequence[Variant], cap: int | None
) -> None:
    """Refuse variants that do not fit into ``--gpu-memory`` together: the weights, momentum and
    best iterate of all, and the step of the largest. Raises BudgetError, with both numbers."""
    if cap is None or not together:
        return
    recipe, divided = run.recipe, run.accumulate[:j][-1]
    batch, held, steps = recipe.schedule.batch, [], []
    for one in together:
        best = one.schedule.keep == "best"
        held.append(footprint.held(one.layer, one.auxiliary, keep_best=best))
        peak = footprint.solving(
            one.layer,
            one.auxiliary,
            recipe.shape(j - 1, recipe.augment.crop),
            batch=batch,  # whole: it goes from one variant to the next
            micro=-(-batch // divided),
            divided=divided > 1,
            compute=device.compute,
            keep_best=best,
            at_once=device.cuda,
        )
        if peak is None:
            raise BudgetError(f"--gpu-memory: how much memory layer {j} takes is not known")
        steps.append(peak - held[-1])
    needed = sum(held) + max(steps)
    if needed > cap:
        raise BudgetError(
            f"{len(together)} variants of {sweep_results.title(recipe, j)} need {size(needed)} of "
            f"device memory together; --gpu-memory is {size(cap)}. Vary fewer at a time, or raise "
            "it"
        )
