"""The command `clean`: features, or layers with their features, are removed; all of it can be made
again on demand."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from strata.pipeline.commands import lifecycle
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.options import Options
from strata.pipeline.progress import size
from strata.pipeline.run import sweep_results
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.record import RESULT, RUN
from strata.pipeline.run.rundir import TRANSFER, Run
from strata.store.feature_store import Store, used_bytes
from strata.store.files.files import DISK
from strata.store.level.layout import depth_directory


def clean(options: Options) -> Answer:
    """Remove features, and if not only these, layers. What was swept goes with ``--sweeps``, or
    with the whole run and its baselines and probes. Asks before anything trained goes.

    Raises:
        LevelBusy: somebody works on the run or its features, or reads them; says who.
    """
    found = replace(lifecycle.find(options), held=None)
    if options.layer is not None:
        found.check_layer(options.layer)
    found.existing()
    if options.dry_run:
        return _clean(options, found)
    with lifecycle.locked(found):
        return _clean(options, replace(found.again(options), held=None))


def _clean(options: Options, found: Overview) -> Answer:
    """The same, of a run that nobody else works on."""
    run, store, layer = found.existing(), found.store, options.layer
    everything = not (options.features or options.sweeps)
    whole = everything and layer is None
    layers = [layer] if layer else list(range(1, run.layers + 1))
    problems = layers if layer else [*layers, run.layers + 1]
    levels = _levels(run, store, layers) if options.features or everything else {}
    trained = [j for j in layers if everything and run.layer_directory(j).exists()]
    swept = [j for j in problems if (options.sweeps or whole) and run.sweep_directory(j).exists()]
    gone = {f"layer {j}": run.layer_directory(j) for j in trained}
    gone |= {f"baseline {v}": run.baseline_directory(v) for v in run.baselines() if whole}
    title = partial(sweep_results.title, run.recipe)
    gone |= {f"the sweep of {title(j)}": run.sweep_directory(j) for j in swept}
    probes = len(list(run.directory.glob(f"**/probe_*/*/{RESULT}"))) if whole else 0

    names = [f"x_{depth}-{fingerprint[:12]}" for depth, fingerprint in levels] + list(gone)
    names += [f"{probes} probe{'s' * (probes > 1)}"] if probes else []
    of_probes = [*map(run.probe_directory, layers), run.directory / TRANSFER] if whole else []
    nbytes = sum(used_bytes(place, store.files) for place in levels.values())
    nbytes += sum(map(used_bytes, (*gone.values(), *of_probes)))

    text = f"{', '.join(names) or 'nothing'} ({size(nbytes)})"
    if len(names) > len(levels) and not (options.yes or options.dry_run):
        options.confirm(f"remove {text}?")
    if not options.dry_run:
        what, files = f"the run {run.directory}", [run.directory / RUN] * bool(gone or whole)
        with DISK.alone(files, what, None):
            for depth, fingerprint in levels:  # first: a level without a record is found by nobody
                store.remove(depth, fingerprint)
            for j in trained:
                run.forget_layer(j)
            for directory in map(run.sweep_directory, swept):
                shutil.rmtree(directory)
            if whole:
                run.remove()
    said = f"{'would remove' if options.dry_run else 'removed'} {text}"
    removed = [] if options.dry_run else names
    return Answer({"removed": removed, "would_remove": names, "bytes": nbytes}, (said,))


def _levels(run: Run, store: Store, layers: Iterable[int]) -> dict[tuple[int, str], Path]:
    """Directories of every x_j in the store, by depth and fingerprint: as it would be named now,
    and as it was last written."""
    nodes, found = run.nodes(), {}
    for j in layers:
        names, record = {node.fingerprint for node in nodes[j : j + 1]}, run.features(j)
        names |= {record["fingerprint"]} if record else set()
        found |= {(j, name): depth_directory(store.root, j, name) for name in sorted(names)}
    return {one: place for one, place in found.items() if store.files.exists(place)}
