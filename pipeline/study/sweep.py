"""Variants of problem j on one read of x_{j-1}, by the loop of ``pipeline/train/loop.py``; and one
of them as the run's layer j.

Problem J + 1 has no layer: its variants are classifiers of x_J.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from strata.pipeline.feed.features import read_layer
from strata.pipeline.feed.problem_feed import feed_of
from strata.pipeline.recipe.variants import Variant
from strata.pipeline.run import outcome, record, sweep_results
from strata.pipeline.run.levels import refer_to
from strata.pipeline.run.record import RESULT
from strata.pipeline.run.rundir import WEIGHTS
from strata.pipeline.run.session import Session
from strata.pipeline.run.sweep_results import SweepResult
from strata.pipeline.train import given, scales
from strata.pipeline.train.evaluation import evaluate
from strata.pipeline.train.loop import conclude, risks, train
from strata.pipeline.train.solving import Solving, how_good, solver_of
from strata.stages.errors import Diverged
from strata.stages.network.network import build, build_problem
from strata.stages.solve.evaluate import said
from strata.store.files.publish import make_directory, replace
from strata.store.read.order import key_of


def sweep(session: Session, j: int, wanted: Iterable[Variant]) -> None:
    """Solve the variants that are not through; x_{j-1} must have a name.

    Raises:
        KeyboardInterrupt: somebody asked to stop; every variant's state is saved.
    """
    run, title = session.run, sweep_results.title(session.run.recipe, j)
    todo = {one.name: one for one in wanted if sweep_results.result(run, j, one) is None}
    if not todo:
        return

    def drop(one: Solving, error: Diverged) -> None:
        # The same settings would do so again, so that is a result too.
        diverged = {"epoch": error.epoch, "last_good": error.last_good}
        _record(one, todo[one.title], {"diverged": diverged})
        one.say(str(error))

    def through(those: list[Solving]) -> None:
        found = conclude(those, drop)
        for (one, figures), risk in zip(found, risks([one for one, _ in found], feed), strict=True):
            digests = {part: figures[part] for part in one.parts}
            _record(one, todo[one.title], {**digests, "diverged": None, **figures, "risk": risk})
            one.say(f"through, {how_good(one, figures)}")

    with feed_of(session, j) as feed:
        count = f"{len(todo)} variant{'s' * (len(todo) > 1)}"
        session.report.say(f"{title}, {count}: solved together, on one read of x_{j - 1}")
        train([_begin(session, j, one) for one in todo.values()], feed, title, through, drop)


def _begin(session: Session, j: int, variant: Variant) -> Solving:
    """A variant at its checkpoint, or at its beginning."""
    seed = key_of("initial weights", variant.seed, j) % 2**63
    if variant.layer:
        problem = build_problem(variant.layer, variant.auxiliary, seed)
        given.begin_problem(session, j, problem)
    else:
        problem = build([variant.auxiliary], seed)[0]
    schedule = dataclasses.replace(variant.schedule, accumulate=session.run.accumulate[:j][-1])
    specs = [spec for spec in (variant.layer, variant.auxiliary) if spec]
    solver = solver_of(session, j, problem, specs, schedule)
    where = variant.name, session.run.sweep_directory(j) / variant.name
    made_of = sweep_results.made_of(session.run, j, variant)
    one = Solving(session, j, solver, *where, made_of, file="auxiliary")
    one.load()
    return one


def _record(one: Solving, variant: Variant, found: dict[str, Any]) -> None:
    # A GPU counts the tensors of all variants, so it says nothing of one.
    on_cpu = one.session.device.type == "cpu"
    body = {
        "name": variant.name,
        "changes": dict(variant.changes),
        **one.made_of,
        "parameters": 0,
        **one.parameters,
        "seconds": one.seconds,
        "peak_memory_bytes": one.at.peak_bytes if on_cpu else None,
        **found,
    }
    record.vouch(one.directory / RESULT, body, without=())


def keep(session: Session, j: int, one: SweepResult) -> None:
    """Write what `train --layer j` would have written with the variant's settings.

    Args:
        one: a variant with the recipe's shapes, solved on the x_{j-1} that is there now.

    Raises:
        LevelDamaged: its weights are not those that were solved.
    """
    run = session.run
    source = run.sweep_directory(j) / one["name"]
    directory, path = make_directory(run.layer_directory(j)), source / WEIGHTS
    layer = read_layer(run.recipe.layers[j - 1], path, one["weights"], session.device)
    for name in one["files"]:
        replace(directory, name, (source / name).read_bytes())
    quantised = scales.keep(session, j, layer)
    # Seconds were shared with other variants: nothing was expected of them.
    measured = outcome.figures(one["seconds"], None, one["peak_memory_bytes"])
    nothing = outcome.figures(None, None, None)
    same = ("weights", "auxiliary", "parameters", "auxiliary_parameters", "kept_epoch", "train")
    body = {  # as pipeline/train/train.py has it, and which variant it was
        "layer": j,
        "input": one["made_of"]["input"],
        "lineage": run.lineage(j - 1),
        **{name: one[name] for name in (*same, "test", "seconds", "peak_memory_bytes")},
        "outcome": outcome.kept(session, nothing, measured, whole=False),
        "variant": {"name": one["name"], "changes": one["changes"]},
    }
    run.write_layer(j, {**body, **quantised})
    evaluate(run, session.store)
    refer_to(run, session.store)
    session.report.say(f"layer {j} is now the variant {one['name']}: test {said(one['test'])}")
