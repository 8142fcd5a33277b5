"""The command `probe`: what it has to do, and doing only that."""

from __future__ import annotations

from collections.abc import Sequence

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.errors import NotThereYet, OptionRange
from strata.pipeline.options import Options
from strata.pipeline.run import levels, probe_results
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.probe_results import Kind
from strata.pipeline.run.rundir import Run
from strata.store.feature_store import Store


def probe(options: Options) -> Answer:
    """Probe what was not probed yet; shows all that is known of the network.

    Raises:
        LayerRange, NotThereYet: there is no such layer, or it is not solved.
        OptionRange: ``--p`` of a linear probe.
    """
    found, linear = lifecycle.find(options), options.kind == "linear"
    if linear and options.p is not None:
        raise OptionRange(
            f"--p {options.p} is of a CNN: add --kind cnn, or leave it out for a linear probe"
        )
    kind = Kind(0 if linear else options.p or 1)
    network = _network(found.existing(), options)
    depths = _depths(found, network, options.layer)
    done: list[str] = []
    todo = [j for j in depths if _is_missing(found.store, network, j, kind, options)]
    for j in depths:
        if j not in todo:
            lifecycle.reporting(options).say(f"{kind.name} probe of x_{j}: there already")
    if todo or lifecycle.names_other_images(options, found):
        done = _perform(found, options, kind, depths)
        network = _network(lifecycle.find(options).existing(), options)
    results = probe_results.results(network)
    trained = probe_results.trained(network)
    of = trained + (f" on {options.transfer}" if options.transfer else "")
    value = {
        "run": str(found.directory),
        "of": trained,
        "images": network.source,
        "done": done,
        "probes": [{k: v for k, v in one.items() if k != "files"} for one in results],
    }
    table = tables.of_probes(f"probes of {found.directory}, {of}", results)
    return Answer(value, (*lifecycle.done_answer(found, done).shown, table))


def _network(run: Run, options: Options) -> Run:
    base = probe_results.end_to_end(run) if options.of == "baseline" else run
    return probe_results.transferred(base, options.transfer) if options.transfer else base


def _depths(found: Overview, network: Run, layer: int | None) -> Sequence[int]:
    """Which x_j are asked for: that of one layer, or all that are there."""
    run = found.existing()
    solved = run.solved() if network.variant is None else run.layers
    if layer is not None:
        found.check_layer(layer)
    first = layer or 1
    if solved < first:
        state, how = "solved", "train"
        if first <= run.recipe.given:
            state, how = "written", "materialize"
        raise NotThereYet(
            f"layer {first} is not {state} in {run.directory}, so there is no x_{first} "
            f"to probe. Run: strata {how} {found.name} --layer {first}"
        )
    return [layer] if layer else range(1, solved + 1)


def _is_missing(store: Store, network: Run, j: int, kind: Kind, options: Options) -> bool:
    """Is there something to do for x_j?"""
    known = network.data()
    if options.transfer and (known is None or not levels.unchanged(network, known)):
        return True
    unwritten = options.materialize and levels.missing_at(network, store, j, clean=True)
    return bool(unwritten) or probe_results.result(network, j, kind) is None


def _perform(found: Overview, options: Options, kind: Kind, depths: Sequence[int]) -> list[str]:
    from strata.pipeline.materialize.materialize import materialize
    from strata.pipeline.study.probe import copy_layers, shown, train_probe

    done = []
    with lifecycle.at_work(found, options) as session:
        own = shown(session, _network(session.run, options))
        copy_layers(own, session.run, max(depths))
        network = _network(session.run, options)
        for j in depths:
            if options.materialize and levels.missing_at(own.run, own.store, j, clean=True):
                materialize(own, j, clean=True)
                done.append(f"write x_{j}")
            if probe_results.result(network, j, kind) is None:
                train_probe(own, j, kind)
                done.append(f"{kind.name} probe of x_{j}")
    return done
