"""What a run has: layers, accuracies, levels. Reads small files only; no torch, no zarr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from safetensors import SafetensorError, safe_open

from strata.pipeline.plan import compression
from strata.pipeline.recipe import augmentation
from strata.pipeline.run import sweep_results
from strata.pipeline.run.levels import keys_at, state_of
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.record import CHECKPOINT, RESULT
from strata.pipeline.run.rundir import NOTE, Run
from strata.store.errors import LevelDamaged, LevelStale
from strata.store.feature_store import LevelState
from strata.store.level.layout import LevelKey, depth_directory


def status(overview: Overview) -> dict[str, Any]:
    """The state of a run as JSON; a run that does not exist yet has nothing."""
    run, solved = overview.run, overview.run.solved() if overview.run else 0
    found = _accuracies(run)
    finals = sweep_results.finals(run) if run else {}
    return {
        "recipe": overview.name,
        "run": str(overview.directory),
        "store": str(overview.store.root),
        "exists": run is not None,
        "seed": run.seed if run else None,
        "images": _levels(overview, 0),
        "layers": [
            _layer(overview, j, j <= solved, found.get(j, {}) if j <= solved else {})
            for j in range(1, len(overview.recipe.layers) + 1)
        ],
        "finals": [
            {"name": name, "state": state} | _tested(one) for name, (state, one) in finals.items()
        ],
        "baselines": _baselines(run) if run else [],
    }


def _layer(overview: Overview, j: int, solved: bool, accuracy: dict[str, Any]) -> dict[str, Any]:
    run, state = overview.run, "solved" if solved else "absent"
    if run is not None and not solved:
        begun = (run.layer_directory(j) / CHECKPOINT).exists()
        # Stale: solved on features that have changed since.
        state = "stale" if run.layer(j) is not None else "partial" if begun else "absent"
    if given := j <= overview.recipe.given:
        state = "given"
    lost = compression.summary(run.layer(j)) if run and solved else None
    return ({"compression": lost} if lost else {}) | {
        "layer": j,
        "state": state,
        "trained": solved and not given,
        **_tested(accuracy),
        "ensemble": accuracy.get("ensemble", {}).get("probabilities"),
        "ensemble_accuracy": accuracy.get("ensemble", {}).get("probabilities", {}).get("top1"),
        "levels": _levels(overview, j),
    }


def _tested(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a record says of the test images: all figures, and top-1 by itself; None: nothing."""
    test = (found or {}).get("test")
    return {"test": test, "test_accuracy": test and test["top1"]}


def _baselines(run: Run) -> list[dict[str, Any]]:
    """Every variant trained end to end, or begun: its name, ``trained``, ``partial``, or ``stale``
    where the images have changed or a file is damaged; epochs done, and test top-1."""
    found: list[dict[str, Any]] = []
    for name in run.baselines():
        record, directory = run.baseline(name), run.baseline_directory(name)
        state = "trained" if record else "stale" if (directory / RESULT).exists() else "partial"
        epochs = run.recipe.schedule.epochs if state != "partial" else None
        with suppress(OSError, SafetensorError):  # of a checkpoint that cannot be read: not known
            if state == "partial":
                with safe_open(str(directory / CHECKPOINT), framework="numpy") as file:
                    epochs = json.loads(file.metadata()[NOTE])["progress"]["epoch"]
        found.append({"variant": name, "state": state, "epochs": epochs} | _tested(record))
    return found


def _levels(overview: Overview, depth: int) -> list[dict[str, Any]]:
    """The levels that x_depth has, or will have once it has a name."""
    named = keys_at(overview.run, depth) if overview.run else []
    nameless = augmentation.levels_at(overview.recipe, depth)
    keys = named or [LevelKey(depth, "", split, view) for split, view in nameless]
    return [
        {
            "split": key.split,
            "view": key.view,
            "level": key.name,
            "state": state.state,
            "rows": state.rows,
            "bytes": state.nbytes,
            "fingerprint": key.fingerprint or None,
        }
        for key in keys
        for state in [_state(overview, key)]
    ]


def _state(overview: Overview, key: LevelKey) -> LevelState:
    """The state of a level: ``damaged`` where the others would stop; ``stale`` where it has another
    format, or is absent but one that the run made from other inputs is there."""
    run, store = overview.run, overview.store
    try:
        state = state_of(store, key) if key.fingerprint else LevelState("absent")
    except LevelDamaged as error:
        state = LevelState("stale" if isinstance(error, LevelStale) else "damaged")
    record = run.features(key.depth) if run is not None and key.depth else None
    if state.state != "absent" or record is None or record["fingerprint"] == key.fingerprint:
        return state
    earlier = replace(key, fingerprint=record["fingerprint"])
    if not store.files.exists(depth_directory(store.root, key.depth, earlier.fingerprint)):
        return state
    with suppress(LevelDamaged):
        found = store.state(earlier)
        return LevelState("stale", found.rows, found.nbytes) if found.state != "absent" else state
    return state


def _accuracies(run: Run | None) -> dict[int, dict[str, Any]]:
    evaluation = run.evaluation() if run else None
    if run is None or evaluation is None:
        return {}
    trained = range(run.recipe.given + 1, run.layers + 1)
    current = [(run.layer(j) or {}).get("weights") for j in trained]
    pairs = zip(evaluation["layers"], evaluation["solved"], current, strict=False)
    return {layer["layer"]: layer for layer, was, now in pairs if was == now}
