"""Layer-wise compression (paper Sec. 4.3): of a layer that has just been solved, remove the filters
that matter least, and fine-tune what is left with its auxiliary classifier, on the same x_{j-1}.

The state of it goes into the layer's one checkpoint, so it is taken up where it was stopped. What
was removed is gone from the weights, and so from x_j and from the input of layer j + 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.plan.costs import SCORE_ROWS
from strata.pipeline.recipe.recipe import ProblemSpec
from strata.pipeline.train.loop import batches_of, top1_on_test, train
from strata.pipeline.train.solving import Solving, give_up, solver_of
from strata.stages.errors import Diverged
from strata.stages.network.network import Problem, build_problem
from strata.stages.solve.prune import narrowed, strongest, taylor


def take_up(solving: Solving, note: dict[str, Any]) -> None:
    """Make the problem that a checkpoint is about: after a removal, that of the kept filters."""
    if found := note.get("compression"):
        specs = solving.session.run.recipe.fine_tuned(solving.j)[len(found["removals"]) - 1]
        _narrow(solving, found, build_problem(*specs, 0))  # its weights are loaded later


def compress(solving: Solving, feed: ProblemFeed) -> None:
    """Do what is left of removing filters of a solved layer, and of fine-tuning it. Raises as
    ``solve`` does."""
    steps = solving.session.run.recipe.fine_tuned(solving.j)
    done = len(solving.compression["removals"]) if solving.compression else 0
    for number in range(max(1, done), len(steps) + 1):
        if number > done:
            _remove(solving, feed, steps[number - 1])
        train([solving], feed)
        found, problem = solving.compression, solving.solver.finish()
        first, last = found["removals"][0], found["removals"][-1]
        last["test_after"] = _test(solving)
        solving.session.report.say(
            f"layer {solving.j}: test {_percent(last['test_after'])} with "
            f"{problem.filters} of {found['solved_filters']} filters, "
            f"{_percent(first['test_before'])} with all"
        )


def _test(solving: Solving) -> float:
    return solving.session.ranks.by_leader(lambda: top1_on_test([solving])[0])


def _remove(solving: Solving, feed: ProblemFeed, specs: ProblemSpec) -> None:
    """Go on with the problem without the filters that matter least."""
    width = specs[0].width
    solving.save()  # scoring can be repeated; what was trained is not lost
    problem: Problem = solving.solver.finish()
    found = solving.compression or {
        "solved_filters": problem.filters,
        "kept": list(range(problem.filters)),
        "removals": [],
    }
    earlier = found["removals"]
    before = earlier[-1]["test_after"] if earlier else _test(solving)
    chosen = strongest(_scores(solving, feed, problem), width)
    removal = {"filters": width, "epochs_before": len(solving.history), "test_before": before}
    kept = [found["kept"][i] for i in chosen.tolist()]
    peak = solving.solver.progress.peak_bytes
    found = {**found, "kept": kept, "removals": [*earlier, removal]}
    _narrow(solving, found, narrowed(problem, *specs, chosen))
    solving.solver.progress.peak_bytes = peak
    removal["test_removed"] = _test(solving)
    solving.good = None
    solving.save()
    solving.session.report.say(
        f"layer {solving.j}: removed {problem.filters - width} filters, "
        f"test {_percent(before)} → {_percent(removal['test_removed'])}"
    )


def _narrow(solving: Solving, found: dict[str, Any], smaller: Problem) -> None:
    """Put the solver of the next fine-tuning in the place of the present one. Momentum begins anew.

    Args:
        found: the compression so far.
        smaller: the problem of the filters that are left.
    """
    session, j, number = solving.session, solving.j, len(found["removals"])
    recipe = session.run.recipe
    assert recipe.compress is not None
    schedule = replace(
        solving.solver.schedule, epochs=recipe.compress.epochs, lr=recipe.compress.lr
    )
    solving.solver = solver_of(session, j, smaller, (), schedule)
    solving.compression, solving.before = found, found["removals"][-1]["epochs_before"]
    solving.title = f"layer {j}, fine-tuning {number} of {len(recipe.fine_tuned(j))}"


def _scores(solving: Solving, feed: ProblemFeed, problem: Problem) -> Tensor:
    """Scores of all filters, on training batches as the next epoch would see them: float64
    (width,). Raises Diverged: one is not finite."""
    session, solver = solving.session, solving.solver
    batches = min(feed.batches, -(-SCORE_ROWS // feed.batch))
    title = f"{solving.title}, scoring filters"
    with session.report.task(title, batches * feed.batch, "images") as tick:

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            parts = solver.schedule.accumulate
            made = batches_of(solving, feed, 0)  # of the epoch that would come next
            with closing(made):  # pyright: ignore  # it may be left before its end
                for x, y in itertools.islice(made, batches):
                    micro = -(-len(y) // parts)
                    yield from zip(x.split(micro), y.split(micro), strict=True)
                    tick(len(y) * session.ranks.count)
                    if session.ranks.any(session.stop.asked):  # what was trained is saved
                        raise KeyboardInterrupt

        scores = taylor(problem, rows(), session.device, session.compute, session.ranks)
    if not torch.isfinite(scores).all():
        give_up(solving, Diverged(len(solving.history), solver.progress.last_good))
    return scores


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
