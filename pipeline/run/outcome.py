"""What a step was expected to take, kept beside what it took: seconds, bytes on disk, peak memory.

Bytes and peaks are arithmetic. Seconds need the rates of this machine (`calibrate`, or --machine);
without them there is no expectation, and none is made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from strata.pipeline.plan import memory
from strata.pipeline.plan.choose import X0, CachedDepth
from strata.pipeline.plan.costs import RecipeCosts, level_geometry
from strata.pipeline.run import levels
from strata.pipeline.run.session import Session
from strata.store.level.layout import LevelKey

Outcome = dict[str, Any]
"""``expected`` and ``measured``, each with ``seconds``, ``bytes`` and ``peak_bytes``, where None is
not known; ``whole``: False where an earlier process did a part, so that seconds say nothing; and
``rates``: where those behind the expected seconds are from."""


def kept(
    session: Session, expected: dict[str, Any], measured: dict[str, Any], *, whole: bool
) -> Outcome:
    """What a record keeps of a step's expected and measured figures."""
    rates = session.rates.source if session.rates else None
    return {"expected": expected, "measured": measured, "whole": whole, "rates": rates}


def figures(seconds: float | None, nbytes: int | None, peak: int | None) -> dict[str, Any]:
    """Seconds, bytes on disk, and peak bytes of tensors on the device; None: not known."""
    return {"seconds": seconds, "bytes": nbytes, "peak_bytes": peak}


def of_solving(session: Session, j: int, base: int) -> dict[str, Any]:
    """Figures expected of solving layer j.

    Args:
        base: depth of the levels that x_{j-1} is read or computed from.
    """
    run, costs = session.run, _costs(session)
    peak = memory.peak(run.recipe, j, session.room, run.accumulate[j - 1], base)
    return figures(costs and costs.solve(_stored(session, base), j), None, peak)


def of_writing(session: Session, keys: Sequence[LevelKey], base: int) -> dict[str, Any]:
    """Figures expected of writing levels of one x_j.

    Args:
        base: depth of the levels that it is computed from.
    """
    recipe, costs, j = session.run.recipe, _costs(session), keys[0].depth
    peak = memory.computing(recipe, base, j, session.room)
    data = session.run.data()
    assert data is not None
    rows = [data[key.split] for key in keys]
    below, node = _stored(session, base), _stored(session, j)
    seconds = costs and sum(costs.write_level(below, node, n) for n in rows)
    nbytes = None  # of a packed level only with a ratio that was measured, or is given
    if session.rates or node.form == "raw":
        rate = session.rates and session.rates.row_rate(node.form, recipe.cache.precision)
        ratio = rate.ratio if rate and node.form != "raw" else 1.0
        nbytes = round(sum(level_geometry(recipe, j, n).nbytes for n in rows) / ratio)
    return figures(seconds, nbytes, peak)


def _costs(session: Session) -> RecipeCosts | None:
    data, rates = session.run.data(), session.rates
    if rates is None or data is None:
        return None
    counts = data["train"], data["test"]
    recipe, loader, tier = session.run.recipe, session.options.loader, session.options.tier
    return RecipeCosts(recipe, rates, *counts, loader=loader, tier=tier)


def _stored(session: Session, depth: int) -> CachedDepth:
    """x_depth, as its levels are stored."""
    if depth == 0:
        return X0
    return CachedDepth(depth, levels.profile_at(session.run, session.store, depth) or "raw")
