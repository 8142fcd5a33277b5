"""Removing features, or layers with their features; all of it can be made again on demand."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from pipeline.overview import Overview
from pipeline.rundir import Run
from store.feature_store import Store, used_bytes
from store.layout import depth_directory


@dataclass(frozen=True)
class Removal:
    """What a clean would remove."""

    features: tuple[tuple[int, str], ...]
    """(depth, fingerprint) of levels of this run."""
    layers: tuple[int, ...]
    """Layers whose weights go."""
    baselines: tuple[str, ...]
    """Networks trained end to end that go."""
    whole_run: bool
    nbytes: int

    @property
    def names(self) -> list[str]:
        levels = [f"x_{depth}-{fingerprint[:12]}" for depth, fingerprint in self.features]
        trained = [f"layer {j}" for j in self.layers]
        return levels + trained + [f"baseline {variant}" for variant in self.baselines]


def removal(overview: Overview, layer: int | None, *, features_only: bool) -> Removal:
    """What is there to remove: of one layer, or of the whole run with its baselines."""
    run = overview.existing()
    layers = [layer] if layer else list(range(1, run.layers + 1))
    named = [(j, fp) for j in layers for fp in sorted(_fingerprints(run, j))]
    features = [(j, fp) for j, fp in named if depth_directory(overview.store.root, j, fp).exists()]
    trained = () if features_only else tuple(j for j in layers if run.layer_directory(j).exists())
    whole = layer is None and not features_only
    baselines = tuple(run.baselines()) if whole else ()
    nbytes = _nbytes(run, overview.store, features, trained)
    nbytes += sum(used_bytes(run.baseline_directory(variant)) for variant in baselines)
    return Removal(tuple(features), trained, baselines, whole, nbytes)


def _fingerprints(run: Run, j: int) -> set[str]:
    """Of x_j as it would be named now, and as it was last written."""
    nodes, record = run.nodes(), run.features(j)
    now = {nodes[j].fingerprint} if j < len(nodes) else set()
    return now | ({record["fingerprint"]} if record else set())


def _nbytes(
    run: Run, store: Store, features: list[tuple[int, str]], layers: tuple[int, ...]
) -> int:
    stored = sum(used_bytes(depth_directory(store.root, j, fp)) for j, fp in features)
    return stored + sum(used_bytes(run.layer_directory(j)) for j in layers)


def remove(overview: Overview, what: Removal) -> None:
    """Remove it. Features first, so that no record is left of what is gone while levels remain."""
    run = overview.existing()
    for depth, fingerprint in what.features:
        overview.store.remove(depth, fingerprint)
    for j in what.layers:
        run.forget_layer(j)
    if what.whole_run:
        shutil.rmtree(run.directory)
