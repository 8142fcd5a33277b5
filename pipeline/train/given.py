"""Layers that are not trained here: those that a recipe gives, and copies in runs inside a run.

They get the record that a solved layer has, with scales of their own, so that all else finds them
as it finds solved ones.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from strata.pipeline.feed.features import read_layer
from strata.pipeline.run import weights
from strata.pipeline.run.initial import state_of
from strata.pipeline.run.session import Session
from strata.pipeline.train import scales
from strata.stages.network.given import State
from strata.store.files.publish import make_directory


def take(session: Session, j: int) -> None:
    """Have layer j, which is given, on the x_{j-1} of today. Raises as :func:`copy`."""
    state = state_of(session.run, j)
    assert state is not None
    copy(session, j, state, given=True, lineage=session.run.lineage(j - 1))


def copy(session: Session, j: int, state: State, **facts: Any) -> None:
    """Write layer j, its scales, and the record that vouches for them.

    Args:
        facts: what the record says of it beside that.

    Raises:
        NotFinite: a feature does not fit; names row, sample and channel.
    """
    run = session.run
    run.forget_layer(j)
    path = make_directory(run.layer_directory(j)) / "weights.safetensors"
    weights.write(path, state)
    made_of = {"input": run.nodes()[j - 1].fingerprint, "weights": weights.digest(state)}
    layer = read_layer(run.recipe.layers[j - 1], path, made_of["weights"], session.device)
    run.write_layer(j, {"layer": j, **made_of, **facts, **scales.keep(session, j, layer)})


def begin(session: Session, j: int, layer: nn.Module) -> None:
    """Give a layer that is to be trained the weights that it begins with, if there are any."""
    if (state := state_of(session.run, j)) is not None:
        layer.load_state_dict(state)
