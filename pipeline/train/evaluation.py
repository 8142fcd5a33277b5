"""How good each layer and the ensemble up to it are on the test images, from the logits kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from strata.pipeline.errors import NotThereYet
from strata.pipeline.run import record, sweep_results
from strata.pipeline.run.levels import keys_at
from strata.pipeline.run.rundir import EVALUATION, LOGITS, Run
from strata.stages.solve.evaluate import accuracies, confusion, cross_entropy, ensemble, softmax
from strata.store.feature_store import Store
from strata.store.files.publish import read_npy


def evaluate(run: Run, store: Store) -> dict[str, Any]:
    """Top-1, top-5 and ensembles of every solved layer, and with every final classifier; confusion
    matrix of the last ensemble. Raises NotThereYet: no layer is solved."""
    with run.in_turn():
        result = _evaluation(run, store)
        record.write(run.directory / EVALUATION, result)
    return result


def _evaluation(run: Run, store: Store) -> dict[str, Any]:
    solved = run.solved()
    if not solved:
        raise NotThereYet(f"no layer is solved in {run.directory}. Run: strata run {run.name}")
    test = next(key for key in keys_at(run, 0) if key.split == "test")
    labels = store.open(test).array("label")
    files = [run.layer_directory(j) / LOGITS for j in range(1, solved + 1)]
    logits = [read_npy(path) for path in files]
    probabilities = [softmax(z) for z in logits]
    return {
        "solved": [run.layer(j)["weights"] for j in range(1, solved + 1)],  # pyright: ignore
        "samples": len(labels),
        "layers": [_layer(j, logits, probabilities, labels) for j in range(1, solved + 1)],
        "finals": _finals(run, logits, labels),
        "confusion": {
            "of": f"ensemble of layers 1 … {solved} (probabilities)",
            "matrix": confusion(ensemble(probabilities), labels).tolist(),
        },
    }


def _layer(
    j: int, logits: list[np.ndarray], probabilities: list[np.ndarray], labels: np.ndarray
) -> dict[str, Any]:
    z = logits[j - 1]
    return {
        "layer": j,
        "test": {"loss": cross_entropy(z, labels), **accuracies(z, labels)},
        "ensemble": {
            "logits": accuracies(ensemble(logits[:j]), labels),
            "probabilities": accuracies(ensemble(probabilities[:j]), labels),
        },
    }


def _finals(run: Run, logits: Sequence[np.ndarray], labels: np.ndarray) -> list[dict[str, Any]]:
    """Test of every final classifier, in the place of layer J's own C_J."""
    found = []
    for name, (_, one) in sweep_results.finals(run).items():
        if one is not None:
            path = run.sweep_directory(run.layers + 1) / name / LOGITS
            scores = [*logits[:-1], read_npy(path)]
            whole = _layer(run.layers, scores, [softmax(z) for z in scores], labels)
            found.append({"name": name, "auxiliary": one["auxiliary"], **whole})
    return found
