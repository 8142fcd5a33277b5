"""Solve layer j: min over (θ_j, γ_j) on x_{j-1}, taken up where an interruption left it."""

from __future__ import annotations

import time

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.run import outcome, ranks
from strata.pipeline.run.session import Session
from strata.pipeline.train import compress, scales
from strata.pipeline.train.loop import conclude, train
from strata.pipeline.train.solving import Solving, how_good, schedule_of
from strata.stages.network.network import build_problem
from strata.stages.solve.solve import Solver
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
    schedule = schedule_of(recipe.schedule, run.accumulate[j - 1])
    advice = f"It was layer {j}: lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    if recipe.compress:
        advice += f", or 'compress.lr' ({recipe.compress.lr:g}) if it was fine-tuned"
    solver = Solver(problem, schedule, session.device, session.compute, ranks=session.ranks)
    made_of = {"input": run.nodes()[j - 1].fingerprint}
    where = f"layer {j}", run.layer_directory(j), made_of, advice
    solving = Solving(session, j, solver, *where)
    whole = not solving.load(compress.take_up)
    with ProblemFeed(session, j - 1, cached=cached) as feed:
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
    session.report.say(f"solved layer {j}: {how_good(body)}")
