"""Removing features, or layers with their features; all of it can be made again on demand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from strata.pipeline.run import sweep_results
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.probe_results import TRANSFER
from strata.pipeline.run.rundir import RESULT, Run
from strata.store.feature_store import used_bytes
from strata.store.level.layout import depth_directory


@dataclass(frozen=True)
class Removal:
    """What a clean would remove."""

    features: tuple[tuple[int, str], ...]
    """(depth, fingerprint) of levels of this run."""
    layers: tuple[int, ...]
    """Layers whose weights go."""
    sweeps: Mapping[int, str]
    """Problems whose variants go, and what they are called; J + 1: final classifiers."""
    baselines: tuple[str, ...]
    """Networks trained end to end that go."""
    probes: int
    """How many go, with the whole run."""
    whole_run: bool
    nbytes: int

    @property
    def names(self) -> list[str]:
        levels = [f"x_{depth}-{fingerprint[:12]}" for depth, fingerprint in self.features]
        trained = [f"layer {j}" for j in self.layers]
        trained += [f"baseline {variant}" for variant in self.baselines]
        trained += [f"the sweep of {whose}" for whose in self.sweeps.values()]
        probes = [f"{self.probes} probe{'s' * (self.probes > 1)}"] if self.probes else []
        return levels + trained + probes

    @property
    def is_costly(self) -> bool:
        """Does anything trained go, which takes time to make again?"""
        return bool(self.layers or self.baselines or self.sweeps or self.probes)


def removal(
    overview: Overview, layer: int | None, *, features: bool = False, sweeps: bool = False
) -> Removal:
    """What is there to remove: of one layer, or of the whole run with its baselines.

    Args:
        features: only these, …
        sweeps: … only these, or with both only these two. Without either: the features and the
            layers; what was swept goes with the whole run, not with one layer.
    """
    run = overview.existing()
    layers = [layer] if layer else list(range(1, run.layers + 1))
    everything = not (features or sweeps)
    named = [(j, fp) for j in layers for fp in sorted(_fingerprints(run, j))]
    root, files = overview.store.root, overview.store.files
    stored = [(j, fp) for j, fp in named if files.exists(depth_directory(root, j, fp))]
    stored = stored if features or everything else []
    whole = layer is None and everything
    trained = [j for j in layers if run.layer_directory(j).exists() and everything]
    problems = layers if layer else [*layers, run.layers + 1]
    gone = [j for j in problems if run.sweep_directory(j).exists() and (sweeps or whole)]
    called = {j: sweep_results.title(run.recipe, j) for j in gone}
    baselines = tuple(run.baselines()) if whole else ()
    places = [run.layer_directory(j) for j in trained] + [run.sweep_directory(j) for j in gone]
    places += [run.baseline_directory(variant) for variant in baselines]
    probes = sum(1 for _ in run.directory.glob(f"**/probe_*/*/{RESULT}")) if whole else 0
    if whole:
        places += [*map(run.probe_directory, layers), run.directory / TRANSFER]
    nbytes = sum(used_bytes(depth_directory(root, j, fp), files) for j, fp in stored)
    nbytes += sum(map(used_bytes, places))
    return Removal(tuple(stored), tuple(trained), called, baselines, probes, whole, nbytes)


def _fingerprints(run: Run, j: int) -> set[str]:
    """Of x_j as it would be named now, and as it was last written."""
    nodes, record = run.nodes(), run.features(j)
    now = {nodes[j].fingerprint} if j < len(nodes) else set()
    return now | ({record["fingerprint"]} if record else set())


def remove(overview: Overview, what: Removal) -> None:
    """Remove it. Features first, so that no record is left of what is gone while levels remain."""
    run = overview.existing()
    for depth, fingerprint in what.features:
        overview.store.remove(depth, fingerprint)
    for j in what.layers:
        run.forget_layer(j)
    for j in what.sweeps:
        shutil.rmtree(run.sweep_directory(j))
    if what.whole_run:
        shutil.rmtree(run.directory)
