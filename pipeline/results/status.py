"""What a run has: layers, accuracies, levels. Reads small files only; no torch, no zarr."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from strata.pipeline.plan import compression
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import baselines, sweep_results
from strata.pipeline.run.levels import keys_at, state_of
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import CHECKPOINT, Run
from strata.store.errors import LevelDamaged
from strata.store.feature_store import LevelState, Store
from strata.store.level.layout import LevelKey, depth_directory


def status(overview: Overview) -> dict[str, Any]:
    """The state of a run as JSON; a run that does not exist yet has nothing."""
    run, store, recipe = overview.run, overview.store, overview.recipe
    accuracy = _accuracies(run)
    return {
        "recipe": overview.name,
        "run": str(overview.directory),
        "store": str(store.root),
        "exists": run is not None,
        "seed": run.seed if run else None,
        "images": _levels(run, store, recipe, 0),
        "layers": [
            _layer(run, store, recipe, j, accuracy) for j in range(1, len(recipe.layers) + 1)
        ],
        "finals": _finals(run) if run else [],
        "baselines": baselines.known(run) if run else [],
    }


def _layer(
    run: Run | None, store: Store, recipe: Recipe, j: int, accuracy: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    solved = run is not None and run.solved() >= j
    found = accuracy.get(j, {}) if solved else {}
    lost = compression.summary(run.layer(j)) if run and solved else None
    return ({"compression": lost} if lost else {}) | {
        "layer": j,
        "state": _layer_state(run, j, solved),
        "trained": solved,
        "test_accuracy": found.get("test", {}).get("top1"),
        "ensemble_accuracy": found.get("ensemble", {}).get("probabilities", {}).get("top1"),
        "levels": _levels(run, store, recipe, j),
    }


def _finals(run: Run) -> list[dict[str, Any]]:
    """Classifiers of x_J that were trained, or begun, after layer J."""
    return [
        {"name": name, "state": state, "test_accuracy": one and one["test"]["top1"]}
        for name, (state, one) in sweep_results.finals(run).items()
    ]


def _layer_state(run: Run | None, j: int, solved: bool) -> str:
    """``solved``; ``stale``: on features that have changed since; ``partial``; ``absent``."""
    if solved:
        return "solved"
    if run is not None and run.layer(j) is not None:
        return "stale"
    begun = run is not None and (run.layer_directory(j) / CHECKPOINT).exists()
    return "partial" if begun else "absent"


def _levels(run: Run | None, store: Store, recipe: Recipe, depth: int) -> list[dict[str, Any]]:
    if keys := keys_at(run, depth) if run else []:
        return [_level(key, _or_stale(run, store, key, _state(store, key))) for key in keys]
    absent = [LevelKey(depth, "", *level) for level in augmentation.levels_at(recipe, depth)]
    return [_level(key, _or_stale(run, store, key, LevelState("absent"))) for key in absent]


def _or_stale(run: Run | None, store: Store, key: LevelKey, state: LevelState) -> LevelState:
    """``stale`` where the level is absent but one the run made from other inputs is there."""
    record = run.features(key.depth) if run is not None and key.depth else None
    if state.state != "absent" or record is None or record["fingerprint"] == key.fingerprint:
        return state
    earlier = LevelKey(key.depth, record["fingerprint"], key.split, key.view)
    found = LevelState("absent")
    if store.files.exists(depth_directory(store.root, earlier.depth, earlier.fingerprint)):
        found = store.state(earlier)
    return LevelState("stale", found.rows, found.nbytes) if found.state != "absent" else state


def _state(store: Store, key: LevelKey) -> LevelState:
    """The state of a level, ``damaged`` where the others would stop."""
    try:
        return state_of(store, key)
    except LevelDamaged:
        return LevelState("damaged")


def _level(key: LevelKey, state: LevelState) -> dict[str, Any]:
    fields = {k: v for k, v in asdict(key).items() if k in ("split", "view")}
    return {
        **fields,
        "level": key.name,
        "state": state.state,
        "rows": state.rows,
        "bytes": state.nbytes,
        "fingerprint": key.fingerprint or None,
    }


def _accuracies(run: Run | None) -> dict[int, dict[str, Any]]:
    evaluation = run.evaluation() if run else None
    if run is None or evaluation is None:
        return {}
    current = [(run.layer(j) or {}).get("weights") for j in range(1, run.layers + 1)]
    pairs = zip(evaluation["layers"], evaluation["solved"], current, strict=False)
    return {layer["layer"]: layer for layer, was, now in pairs if was == now}
