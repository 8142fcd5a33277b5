"""Making the run that stands for a network: x_0 of the images it is shown, copies of its layers.

After that it is a run like any other. What its layers must be copies of, and when they are not any
more, pipeline/run/probe_results.py says.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from strata.pipeline.feed.features import features, read_layer
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.run import record, weights
from strata.pipeline.run.levels import refer_to, unchanged
from strata.pipeline.run.probe_results import with_classes
from strata.pipeline.run.record import DATA, RUN
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.session import Session
from strata.pipeline.train import scales
from strata.stages.data.images import check_probed, open_source
from strata.store.files.publish import make_directory


def shown(session: Session, network: Run) -> Session:
    """A session of the network's run, its images read and x_0 written.

    Args:
        session: of the run that the network belongs to, which is locked.

    Raises:
        DataError: the images have one class, or colour where the network knows none.
    """
    if network.origins is not None:
        network.tidy()
        network = _with_data(session, network)
        record.write(network.directory / RUN, network.facts)  # who it is, also for `gc`
    own = dataclasses.replace(session, run=network)
    ensure_images(own)
    refer_to(network, session.store)
    return own


def _with_data(session: Session, run: Run) -> Run:
    """The same run, with as many classes as its images have; what is known of images that have
    changed since is forgotten."""
    if run.source == session.run.source:
        record.write(run.directory / DATA, session.run.data())
        return run
    known = run.data()
    if known is not None and unchanged(run, known):
        return run
    (run.directory / DATA).unlink(missing_ok=True)
    with open_source(run.source, root=session.data_root, download=session.download) as source:
        check_probed(source, run.recipe.data.channels)
        return with_classes(run, len(source.classes))


def copy_layers(session: Session, origin: Run, depth: int) -> None:
    """Have layers 1 … ``depth`` in a session of a network's run, with scales of their own where
    features are stored as codes: chosen as ever, on the images that are shown.

    Args:
        origin: the run that has the weights; if it is the network's own, there is nothing to do.

    Raises:
        LevelDamaged: the weights are not those that the record speaks of.
        NotFinite: a feature does not fit; names row, sample and channel.
    """
    run = session.run
    if run.origins is None:
        return
    for j in range(run.solved() + 1, depth + 1):
        run.forget_layer(j)
        state = _state(origin, run.variant, j)
        path = make_directory(run.layer_directory(j)) / "weights.safetensors"
        weights.write(path, state)
        digest = weights.digest(state)
        layer = read_layer(run.recipe.layers[j - 1], path, digest, session.device)
        quantised = scales.keep(session, j, layer, features(session, j - 1, "train"))
        body = {
            "layer": j,
            "input": run.nodes()[j - 1].fingerprint,
            "weights": digest,
            "origin": run.origins[j - 1],
            **quantised,
        }
        run.write_layer(j, body)
    refer_to(run, session.store)


def _state(run: Run, variant: str | None, j: int) -> dict[str, Tensor]:
    """Weights and buffers of layer j of a run as solved, or of its network trained end to end."""
    if variant is None:
        path, known = run.layer_directory(j) / "weights.safetensors", run.layer(j)
        return weights.read_checked(path, (known or {})["weights"])
    path, known = run.baseline_directory(variant) / "weights.safetensors", run.baseline(variant)
    whole, prefix = weights.read_checked(path, (known or {})["weights"]), f"layers.{j - 1}."
    return {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
