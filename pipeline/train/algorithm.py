"""Algorithm 1: for every layer, solve its auxiliary problem, then write its representation.

What is missing is decided first (plan.py), then done, as make does. Nothing flows backwards.
"""

from __future__ import annotations

from collections.abc import Collection

from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.plan.plan import Step, steps, steps_below
from strata.pipeline.progress import size
from strata.pipeline.run.levels import inventory, refer_to
from strata.pipeline.run.session import Session
from strata.pipeline.train.evaluation import evaluate
from strata.pipeline.train.train import solve
from strata.store.errors import LevelBusy


def execute(session: Session, todo: tuple[Step, ...], *, evict: bool = False) -> tuple[Step, ...]:
    """Do the steps that ``plan.steps`` found missing, in their order; returns them.

    Args:
        evict: remove the features below once x_j is complete, to stay within a disk budget.
    """
    run, store, ranks = session.run, session.store, session.ranks
    for step in todo:
        if ranks.leads:
            refer_to(run, store)  # what another run wrote is only read, and used
        if step.kind == "solve":
            solve(session, step.j)
        if ranks.leads:  # the part of a step that one process does for all of them
            if step.kind == "images":
                ensure_images(session)
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


def make(
    session: Session,
    *,
    solve: int = 0,
    write: int = 0,
    evict: bool = False,
    cached: Collection[int] | None = None,
) -> tuple[Step, ...]:
    """Have layers 1 … ``solve`` solved and x_``write`` complete; returns the steps done."""
    have = inventory(session.run, session.store)
    todo = session.ranks.by_leader(lambda: steps(have, solve=solve, write=write, cached=cached))
    return execute(session, todo, evict=evict)


def prepare(session: Session, j: int, *, cached: Collection[int] | None = None) -> tuple[Step, ...]:
    """Have all there that solving layer j needs; returns the steps done."""
    have = inventory(session.run, session.store)
    return execute(session, steps_below(have, j, cached=cached))
