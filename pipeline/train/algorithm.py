"""Algorithm 1: for every layer, solve its auxiliary problem, then write its representation.

What is missing is decided first (plan.py), then done, as make does. Nothing flows backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.plan.plan import Step, steps
from strata.pipeline.progress import size
from strata.pipeline.run.levels import inventory, refer_to
from strata.pipeline.run.session import Session
from strata.pipeline.train.evaluation import evaluate
from strata.pipeline.train.given import take
from strata.pipeline.train.scales import Held
from strata.pipeline.train.train import solve
from strata.store.errors import LevelBusy


def make(
    session: Session,
    decide: Callable[..., tuple[Step, ...]] = steps,
    *,
    evict: bool = False,
    **goal: Any,
) -> tuple[Step, ...]:
    """Do what is missing, one step after the other; returns the steps done.

    Args:
        decide: ``plan.steps``, or ``plan.steps_below`` for all that solving a layer needs.
        evict: remove the features below once x_j is complete, to stay within a disk budget.
        goal: what ``decide`` is asked for: ``solve=3``, ``cached=(1, 2)``.
    """
    run, store, ranks = session.run, session.store, session.ranks
    todo = ranks.by_leader(lambda: decide(inventory(run, store), **goal))
    held: Held = {}
    for step in todo:
        if ranks.leads:
            refer_to(run, store)  # what another run wrote is only read, and used
        if step.kind == "solve":
            solve(session, step.j)
        if ranks.leads:  # the part of a step that one process does for all of them
            if step.kind == "images":
                ensure_images(session)
            elif step.kind == "take":
                take(session, step.j, held)
            elif step.kind == "solve":
                evaluate(run, store)
            else:
                materialize(session, step.j)
                if evict:
                    _evict_below(session, step.j)
        ranks.wait()
    if ranks.leads:
        refer_to(run, store)
    return todo


def _evict_below(session: Session, depth: int) -> None:
    """Remove the features below x_depth."""
    nodes = session.run.nodes()
    for j in range(1, depth):
        try:
            if freed := session.store.remove(j, nodes[j].fingerprint):
                said = f"removed x_{j}, which is not needed any more: {size(freed)} freed"
                session.report.say(said)
        except LevelBusy as busy:
            session.report.say(f"x_{j} stays, though it is not needed here any more: {busy}")
