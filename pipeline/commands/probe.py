"""What the command `probe` has to do, and doing only that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from strata.pipeline.commands import lifecycle
from strata.pipeline.commands.lifecycle import Answer, Options
from strata.pipeline.errors import NotThereYet, OptionRange
from strata.pipeline.results import separability
from strata.pipeline.run import levels, probe_results
from strata.pipeline.run.levels import unchanged
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.probe_results import Kind, ProbedNetwork
from strata.pipeline.run.rundir import Run
from strata.store.feature_store import Store

if TYPE_CHECKING:
    from strata.pipeline.run.session import Session


def probe(options: Options) -> Answer:
    """Probe what was not probed yet; shows all that is known of the network.

    Raises:
        LayerRange, NotThereYet: there is no such layer, or it is not solved.
        OptionRange: ``--p`` of a linear probe.
    """
    found, kind = lifecycle.find(options), _kind(options)
    network = _network(found.existing(), options)
    depths = _depths(found, network, options["layer"])
    done: list[str] = []
    todo = [j for j in depths if _is_missing(found.store, network, j, kind, options)]
    for j in depths:
        if j not in todo:
            lifecycle.reporting(options).say(f"{kind.name} probe of x_{j}: there already")
    if todo or (options["data"] not in (None, found.existing().source)):
        done = _do(found, options, kind, depths)
        network = _network(lifecycle.find(options).existing(), options)
    results = probe_results.results(network)
    of = network.trained + (f" on {options['transfer']}" if options["transfer"] else "")
    value = {
        "run": str(found.directory),
        "of": network.trained,
        "images": network.run.source,
        "done": done,
        "probes": [{k: v for k, v in one.items() if k != "files"} for one in results],
    }
    said = f"done: {', '.join(done)}" if done else "nothing to do: everything is there"
    table = separability.table(f"probes of {found.directory}, {of}", results)
    return Answer(value, (said, table))


def _kind(options: Options) -> Kind:
    if options["kind"] == "linear" and options["p"] is not None:
        raise OptionRange(
            f"--p {options['p']} is of a CNN: add --kind cnn, or leave it out for a linear probe"
        )
    return Kind(0 if options["kind"] == "linear" else options["p"] or 1)


def _network(run: Run, options: Options) -> ProbedNetwork:
    base = (
        probe_results.end_to_end(run) if options["of"] == "baseline" else probe_results.greedy(run)
    )
    return probe_results.transferred(base, options["transfer"]) if options["transfer"] else base


def _depths(found: Overview, network: ProbedNetwork, layer: int | None) -> Sequence[int]:
    """Which x_j are asked for: that of one layer, or all that are there."""
    run = found.existing()
    solved = run.solved() if network.variant is None else run.layers
    if layer is not None:
        found.check_layer(layer)
    if solved < (layer or 1):
        raise NotThereYet(
            f"layer {layer or 1} is not solved in {run.directory}, so there is no x_{layer or 1} "
            f"to probe. Run: strata train {found.name} --layer {layer or 1}"
        )
    return [layer] if layer else range(1, solved + 1)


def _is_missing(store: Store, network: ProbedNetwork, j: int, kind: Kind, options: Options) -> bool:
    """Is there something to do for x_j?"""
    known = network.run.data()
    if options["transfer"] and (known is None or not unchanged(network.run, known)):
        return True
    if probe_results.result(network, j, kind) is None:
        return True
    return options["materialize"] and bool(levels.missing_at(network.run, store, j, clean=True))


def _do(found: Overview, options: Options, kind: Kind, depths: Iterable[int]) -> list[str]:
    from strata.pipeline.study.probe import train_probe
    from strata.pipeline.study.replica import copy_layers, shown, states_of

    done = []
    with lifecycle.at_work(found, options) as session:
        network = _network(session.run, options)
        own = shown(session, network)
        if network.origins is not None:
            states = states_of(session.run, network.variant)
            copy_layers(own, network, max(depths), states)
        network = _network(session.run, options)
        for j in depths:
            if options["materialize"]:
                done += _written(own, j)
            if probe_results.result(network, j, kind) is None:
                train_probe(own, j, kind)
                done.append(f"{kind.name} probe of x_{j}")
    return done


def _written(session: Session, j: int) -> list[str]:
    from strata.pipeline.materialize.materialize import materialize

    if not levels.missing_at(session.run, session.store, j, clean=True):
        return []
    materialize(session, j, clean=True)
    return [f"write x_{j}"]
