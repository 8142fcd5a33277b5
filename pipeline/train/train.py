"""Solve layer j: min over (θ_j, γ_j) on x_{j-1}, taken up where an interruption left it."""

from __future__ import annotations

import numpy as np

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.progress import duration
from strata.pipeline.run import outcome, ranks, weights
from strata.pipeline.run.rundir import LOGITS, write_curve
from strata.pipeline.run.session import Session
from strata.pipeline.train import compress, scales
from strata.pipeline.train.solving import Solving, keeping_good, logits_on_test, schedule_of, train
from strata.stages.errors import Diverged
from strata.stages.network.network import build_problem
from strata.stages.solve.solve import Solver
from strata.store.files.publish import make_directory, npy, replace
from strata.store.read.order import key_of


def solve(session: Session, j: int, *, cached: bool = True) -> None:
    """Solve layer j on x_{j-1} and record it.

    Args:
        cached: False recomputes x_{j-1} from the images in every batch, whatever is in the store.

    Raises:
        Diverged: the loss is not finite; the last checkpoint is kept.
        KeyboardInterrupt: somebody asked to stop; the state is saved.
    """
    recipe = session.run.recipe
    seed = key_of("initial weights", session.run.seed, j) % 2**63
    problem = build_problem(*recipe.problems[j - 1], seed)
    schedule = schedule_of(recipe.schedule, session.run.accumulate[j - 1])
    solver = Solver(problem, schedule, session.device, session.compute, ranks=session.ranks)
    solving = Solving(session, j, solver, f"layer {j}", session.run.layer_directory(j))
    compress.take_up(solving)
    solving.load()
    advice = f"It was layer {j}: lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    if recipe.compress:
        advice += f", or 'compress.lr' ({recipe.compress.lr:g}) if it was fine-tuned"
    with ProblemFeed(session, j - 1, cached=cached) as feed, keeping_good(solving, advice):
        rows = min(feed.batch, len(feed.ids))
        ranks.check_parts(rows, schedule.accumulate, session.ranks.count)
        solving.expected = outcome.of_solving(session, j, feed.features.base)
        train(solving, feed)
        compress.compress(solving, feed)
        _finish(solving, feed)


def _finish(solving: Solving, feed: ProblemFeed) -> None:
    """Write weights, scales, curve and test logits; the record that vouches for them comes last."""
    session, j = solving.session, solving.j
    problem = solving.solver.finish()
    if not session.ranks.leads:
        return
    (logits,), labels = logits_on_test(session, j, [problem])
    if not np.isfinite(logits).all():
        raise Diverged(solving.solver.schedule.epochs, solving.solver.progress.last_good)
    directory = make_directory(session.run.layer_directory(j))
    layer, auxiliary = problem.layer.state_dict(), problem.auxiliary.state_dict()
    weights.write(directory / "weights.safetensors", layer)
    weights.write(directory / "auxiliary.safetensors", auxiliary)
    quantised = scales.keep(session, j, problem.layer, feed.features)
    write_curve(directory, solving.history)
    record = {
        "layer": j,
        "input": solving.input,
        "lineage": session.run.lineage(j - 1),
        "weights": weights.digest(layer),
        "auxiliary": weights.digest(auxiliary),
        **quantised,
        "parameters": sum(p.numel() for p in problem.layer.parameters()),
        "auxiliary_parameters": sum(p.numel() for p in problem.auxiliary.parameters()),
        **solving.result(logits, labels),
        "peak_memory_bytes": solving.solver.progress.peak_bytes,
        "outcome": solving.outcome(),
    }
    if solving.compression:
        record["compression"] = solving.compression
    replace(directory, LOGITS, npy(logits))
    session.run.write_layer(j, record)
    solving.checkpoint.unlink(missing_ok=True)
    session.report.say(
        f"solved layer {j}: test {100 * record['test']['top1']:.2f} %, "
        f"{duration(record['seconds'])}"
    )
