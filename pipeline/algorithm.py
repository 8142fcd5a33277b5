"""Algorithm 1: for every layer, solve its auxiliary problem, then write its representation.

What is missing is decided first (plan.py), then done, as make does. Nothing flows backwards.
"""

from __future__ import annotations

from pipeline import levels
from pipeline.errors import LayerRange
from pipeline.evaluation import evaluate
from pipeline.ingest import ensure_images
from pipeline.materialize import materialize
from pipeline.plan import Step, steps
from pipeline.progress import size
from pipeline.session import Session
from pipeline.train import solve


def run_all(session: Session, *, evict: bool = False) -> tuple[Step, ...]:
    """Algorithm 1: solve layers 1 … J, caching x_1 … x_{J-1} on the way.

    Args:
        evict: remove x_{j-1} once x_j is complete, to stay within a disk budget.
    """
    return _make(session, solve_to=session.run.layers, evict=evict)


def train_layer(session: Session, j: int) -> tuple[Step, ...]:
    """Solve layer j and whatever it needs."""
    check_layer(session.run.name, session.run.layers, j)
    return _make(session, solve_to=j)


def write_layer(session: Session, j: int) -> tuple[Step, ...]:
    """Write x_j and whatever it needs."""
    check_layer(session.run.name, session.run.layers, j)
    return _make(session, write_to=j)


def _make(
    session: Session, *, solve_to: int = 0, write_to: int = 0, evict: bool = False
) -> tuple[Step, ...]:
    ensure_images(session)
    have = levels.inventory(session.run, session.store)
    todo = steps(have, solve=solve_to, write=write_to)
    _say_skipped(session, have, max(solve_to, write_to), write_to)
    for step in todo:
        if step.kind == "solve":
            solve(session, step.j)
            evaluate(session)
        else:
            materialize(session, step.j)
            if evict and step.j > 1:
                _evict(session, step.j - 1)
    return todo


def _say_skipped(session: Session, have: levels.Inventory, top: int, write_to: int) -> None:
    for j in range(1, min(have.solved, top) + 1):
        session.report.say(f"layer {j}: solved already")
    if write_to in have.written:
        session.report.say(f"x_{write_to}: complete already")


def _evict(session: Session, j: int) -> None:
    freed = session.store.remove(j, session.run.nodes()[j].fingerprint)
    session.report.say(f"removed x_{j}, which is not needed any more: {size(freed)} freed")


def check_layer(name: str, layers: int, j: int) -> None:
    """Refuse a layer that the network does not have. Raises LayerRange."""
    if not 1 <= j <= layers:
        raise LayerRange(f"layer {j} is out of range: recipe {name} has layers 1 … {layers}")
