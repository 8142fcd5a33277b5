"""Making the run that stands for a network: x_0 of the images it is shown, copies of its layers.

After that it is a run like any other. What its layers must be copies of, and when they are not any
more, pipeline/run/probe_results.py says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from strata.pipeline.feed.features import features, read_layer
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.run import weights
from strata.pipeline.run.levels import refer_to, unchanged
from strata.pipeline.run.probe_results import ProbedNetwork, with_classes
from strata.pipeline.run.rundir import DATA, RUN, Run
from strata.pipeline.run.session import Session
from strata.pipeline.train import scales
from strata.stages.data.images import check_probed, open_source
from strata.store.files.publish import make_directory

States = Callable[[int], dict[str, Tensor]]
"""Function of j that gives the weights and buffers of layer j."""


def shown(session: Session, network: ProbedNetwork) -> Session:
    """A session of the network's run, its images read and x_0 written.

    Args:
        session: of the run that the network belongs to, which is locked.

    Raises:
        DataError: the images have one class, or colour where the network knows none.
    """
    if network.origins is None:
        ensure_images(session)
        return session
    network.run.tidy()
    run = _with_data(session, network.run)
    run.write(run.directory / RUN, run.facts)  # who it is, also for `gc`
    own = dataclasses.replace(session, run=run)
    ensure_images(own)
    refer_to(run, session.store)
    return own


def _with_data(session: Session, run: Run) -> Run:
    """The same run, with as many classes as its images have; what is known of images that have
    changed since is forgotten."""
    if run.source == session.run.source:
        run.write(run.directory / DATA, session.run.data())
        return run
    known = run.data()
    if known is not None and unchanged(run, known):
        return run
    (run.directory / DATA).unlink(missing_ok=True)
    with open_source(run.source, root=session.data_root, download=session.download) as source:
        check_probed(source, run.recipe.data.channels)
        return with_classes(run, len(source.classes))


def copy_layers(session: Session, network: ProbedNetwork, depth: int, states: States) -> None:
    """Have layers 1 … ``depth`` in a session of the network's run, with scales of their own where
    features are stored as codes: chosen as ever, on the images that are shown.

    Raises:
        NotFinite: a feature does not fit; names row, sample and channel.
    """
    assert network.origins is not None
    run = session.run
    for j in range(dataclasses.replace(network, run=run).solved + 1, depth + 1):
        run.forget_layer(j)
        state, path = states(j), make_directory(run.layer_directory(j)) / "weights.safetensors"
        weights.write(path, state)
        digest = weights.digest(state)
        layer = read_layer(run.recipe.layers[j - 1], path, digest, session.device)
        quantised = scales.keep(session, j, layer, features(session, j - 1, "train"))
        record = {
            "layer": j,
            "input": run.nodes()[j - 1].fingerprint,
            "weights": digest,
            "origin": network.origins[j - 1],
            **quantised,
        }
        run.write_layer(j, record)
    refer_to(run, session.store)


def states_of(run: Run, variant: str | None) -> States:
    """Weights and buffers of a run's layers as solved, or of its network trained end to end.

    Raises:
        LevelDamaged: they are not those that the record speaks of.
    """
    if variant is None:
        return lambda j: weights.read_checked(
            run.layer_directory(j) / "weights.safetensors", (run.layer(j) or {})["weights"]
        )
    path = run.baseline_directory(variant) / "weights.safetensors"
    whole = weights.read_checked(path, (run.baseline(variant) or {})["weights"])

    def layer(j: int) -> dict[str, Tensor]:
        prefix = f"layers.{j - 1}."
        return {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}

    return layer
