"""Solve layer j, min over (θ_j, γ_j) on x_{j-1}; or the network end to end, to compare. Both are
taken up where an interruption left them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from strata.pipeline.feed.problem_feed import ProblemFeed, feed_of
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.plan import hardware
from strata.pipeline.run import outcome, ranks, record
from strata.pipeline.run.levels import refer_to
from strata.pipeline.run.record import RESULT
from strata.pipeline.run.session import Session
from strata.pipeline.train import compress, given, scales
from strata.pipeline.train.loop import conclude, train
from strata.pipeline.train.solving import Solving, how_good, solver_of
from strata.stages.network.network import build_problem
from strata.stages.solve.baseline import build_end_to_end
from strata.store.read.order import key_of


def solve(session: Session, j: int, *, cached: bool = True) -> None:
    """Solve layer j on x_{j-1} and record it.

    Args:
        cached: False recomputes x_{j-1} from the images in every batch, whatever is in the store.

    Raises:
        Diverged: the loss is not finite; the last checkpoint is kept.
        KeyboardInterrupt: somebody asked to stop; the state is saved.
    """
    run, recipe, begun = session.run, session.run.recipe, time.monotonic()
    problem = build_problem(*recipe.problems[j - 1], key_of("initial weights", run.seed, j) % 2**63)
    given.begin_problem(session, j, problem)
    schedule = replace(recipe.schedule, accumulate=run.accumulate[j - 1])
    advice = f"It was layer {j}: lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    if recipe.compress:
        advice += f", or 'compress.lr' ({recipe.compress.lr:g}) if it was fine-tuned"
    solver = solver_of(session, j, problem, recipe.problems[j - 1], schedule)
    made_of = {"input": run.nodes()[j - 1].fingerprint}
    where = f"layer {j}", run.layer_directory(j), made_of, advice
    solving = Solving(session, j, solver, *where)
    whole = not solving.load(compress.take_up)
    if not recipe.has_problem(j):  # it was, in the window of a layer below
        solver.progress.epoch, solving.history = schedule.epochs, [given.told(run, j - 1)]
    with feed_of(session, j, cached=cached) as feed:
        rows = min(feed.batch, len(feed.ids))
        ranks.check_parts(rows, schedule.accumulate, session.ranks.count)
        train([solving], feed)
        compress.compress(solving, feed)
        if session.ranks.leads:
            _record(solving, feed, begun, whole=whole)


def _record(solving: Solving, feed: ProblemFeed, begun: float, *, whole: bool) -> None:
    """Write weights, scales, curve and test logits; the record that vouches for them comes last."""
    session, j = solving.session, solving.j
    ((_, found),) = conclude([solving])
    peak = solving.at.peak_bytes
    measured = outcome.figures(time.monotonic() - begun, None, peak)
    expected = outcome.of_solving(session, j, feed.features.base)
    body = {
        "layer": j,
        **solving.made_of,
        "lineage": session.run.lineage(j - 1),
        **{part: found.pop(part) for part in solving.parts},
        **scales.keep(session, j, solving.parts["weights"], feed.features),
        **found,
        "peak_memory_bytes": peak,
        "outcome": outcome.kept(session, expected, measured, whole=whole),
    }
    if solving.compression:
        body["compression"] = solving.compression
    session.run.write_layer(j, body)
    session.report.say(f"solved layer {j}: {how_good(solving, body)}")


def train_end_to_end(session: Session, variant: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Train the whole network end to end, by a variant (see recipe/variants.py), and record it,
    unless that was done on these images. Returns the record, and what was done for it.

    Images, draws, schedule and evaluation are those of layer 1, which sees fresh draws in every
    mode. So the network has as many epochs as each layer of the greedy run. Raises as
    :func:`solve`.
    """
    title = f"end to end, {variant['variant']}"
    ensure_images(session)
    refer_to(session.run, session.store)
    known = session.run.baseline(variant["variant"])
    if known is not None:
        return known, []
    recipe = session.run.recipe
    network = build_end_to_end(
        recipe.layers,
        recipe.auxiliaries[-1],
        key_of("initial weights", session.run.seed, 0) % 2**63,  # the same for all variants
        checkpointing=variant["checkpointing"],
    )
    for j, layer in enumerate(network.layers, start=1):
        given.begin(session, j, layer)
    schedule = replace(recipe.schedule, accumulate=variant["accumulate"])
    specs = [*recipe.layers, recipe.auxiliaries[-1]]
    solver = solver_of(session, 0, network, specs, schedule)
    made_of = {"input": session.run.nodes()[0].fingerprint}
    advice = f"Lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    directory = session.run.baseline_directory(variant["variant"])
    solving = Solving(session, 1, solver, title, directory, made_of, advice)
    solving.load()
    with ProblemFeed(session, 0) as feed:
        train([solving], feed)
        ((_, found),) = conclude([solving])
    images = min(len(feed.ids), feed.batches * feed.batch) * len(solving.history)
    body = {
        **variant,
        **made_of,
        **found,
        "images_per_s": images / found["seconds"],
        "peak_tensor_bytes": solving.at.peak_bytes,
        "peak_process_bytes": hardware.peak_memory_bytes(),
    }
    record.vouch(solving.directory / RESULT, body)
    solving.say(how_good(solving, body))
    return body, [f"train {title}"]
