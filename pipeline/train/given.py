"""Layers that are not trained here: those that a recipe gives, and copies in runs inside a run.

They get the record that a solved layer has, with scales of their own, so that all else finds them
as it finds solved ones.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from strata.pipeline.feed.features import read_layer
from strata.pipeline.run import weights
from strata.pipeline.run.rundir import WEIGHTS, Run
from strata.pipeline.run.session import Session
from strata.pipeline.run.sweep_results import AUXILIARY
from strata.pipeline.train import scales
from strata.stages.features.quantise import needs_scales
from strata.stages.network.given import State
from strata.stages.network.network import AuxiliaryNetwork, Problem
from strata.store.files.publish import make_directory, replace


def take(session: Session, j: int, held: scales.Held) -> None:
    """Have layer j, which is given, on the x_{j-1} of today; ``held`` as of :func:`scales.keep`.
    Raises as :func:`copy`."""
    run = session.run
    run.forget_layer(j)
    path, digest = weights.initial_file(run, j)
    replace(make_directory(run.layer_directory(j)), WEIGHTS, path.read_bytes())
    _record(session, j, digest, held, given=True, lineage=run.lineage(j - 1))


def copy(session: Session, j: int, state: State, **facts: Any) -> None:
    """Write layer j, its scales, and the record that vouches for them.

    Args:
        facts: what the record says of it beside that.

    Raises:
        LevelDamaged: the weights are not what they were.
        NotFinite: a feature does not fit; names row, sample and channel.
    """
    session.run.forget_layer(j)
    weights.write(make_directory(session.run.layer_directory(j)) / WEIGHTS, state)
    _record(session, j, weights.digest(state), None, **facts)


def _record(session: Session, j: int, digest: str, held: scales.Held | None, **facts: Any) -> None:
    run = session.run
    made_of = {"input": run.nodes()[j - 1].fingerprint, "weights": digest}
    found: dict[str, Any] = {"scales": None, "quantiser": None}
    if needs_scales(run.recipe.cache.precision):
        path = run.layer_directory(j) / WEIGHTS
        layer = read_layer(run.recipe.layers[j - 1], path, digest, session.device)
        found = scales.keep(session, j, layer, held=held)
    run.write_layer(j, {"layer": j, **made_of, **facts, **found})


def begin(session: Session, j: int, layer: nn.Module) -> None:
    """Give a layer that is to be trained the weights that it begins with, if there are any."""
    if (state := weights.initial_state(session.run, j)) is not None:
        layer.load_state_dict(state)


def begin_problem(session: Session, j: int, problem: Problem) -> None:
    """Give a problem what it begins with: the weights of :func:`begin`; or those that the window
    before has left, of layer j, and, where that froze several layers, of all that sees it."""
    run, recipe = session.run, session.run.recipe
    begin(session, j, problem.layer)
    if j <= recipe.given + 1 or not recipe.auxiliaries[j - 2].above:
        return
    known = (run.layer(j - 1) or {})["auxiliary"]
    left = weights.read_checked(run.layer_directory(j - 1) / AUXILIARY, known)
    problem.layer.load_state_dict(_part(left, "above.0."))
    if recipe.has_problem(j):
        return
    if not isinstance(problem.auxiliary, AuxiliaryNetwork):
        problem.auxiliary.load_state_dict(_part(left, "patched.0."))
        return
    own = problem.auxiliary.state_dict()
    names = {f"above.{i + 1}.": f"above.{i}." for i in range(len(problem.auxiliary.above))}
    for old, new in {"patched.": "patched.", **names}.items():
        own |= {f"{new}{name}": tensor for name, tensor in _part(left, old).items()}
    problem.auxiliary.load_state_dict(own)


def told(run: Run, j: int) -> dict[str, Any]:
    """What the record of layer j says of it as a line of a curve, for a layer that was trained with
    it."""
    known = run.layer(j) or {}
    train, test = known["train"], {f"test_{name}": value for name, value in known["test"].items()}
    line = {"epoch": 0, "lr": 0.0, "train_loss": train["loss"], "train_top1": train["top1"]}
    return {**line, "test_top1": test.get("test_top1"), "seconds": 0.0}


def _part(state: State, prefix: str) -> State:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
