"""How good each layer and the ensemble up to it are on the test images, from the logits kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from strata.pipeline.errors import NotThereYet
from strata.pipeline.run import record, sweep_results
from strata.pipeline.run.levels import keys_at
from strata.pipeline.run.rundir import BY_SAMPLE, EVALUATION, LOGITS, Run
from strata.pipeline.run.sweep_results import SweepResult
from strata.stages.solve.evaluate import confusion, ensemble, metrics, probabilities
from strata.store.feature_store import Store
from strata.store.files.publish import read_npy


def evaluate(run: Run, store: Store) -> dict[str, Any]:
    """The metrics of the loss and ensembles of every layer that was trained, and with every final
    classifier; of classes the confusion matrix of the last ensemble. Raises NotThereYet: there is
    no classifier."""
    with run.in_turn():
        result = _evaluation(run, store)
        record.write(run.directory / EVALUATION, result)
    return result


def _evaluation(run: Run, store: Store) -> dict[str, Any]:
    trained = range(run.recipe.given + 1, run.solved() + 1)  # what is given has no classifier
    finals = {n: one for n, (_, one) in sweep_results.finals(run).items() if one is not None}
    places = [run.layer_directory(j) for j in trained]
    of_finals = {name: run.sweep_directory(run.layers + 1) / name for name in finals}
    if any((place / BY_SAMPLE).exists() for place in (*places, *of_finals.values())):
        return _without_logits(run, store, trained, finals)
    logits = [read_npy(place / LOGITS) for place in places]
    scores = {name: read_npy(place / LOGITS) for name, place in of_finals.items()}
    if not (logits or scores):
        what = "run" if trained.start <= run.layers else "final"
        raise NotThereYet(f"no layer is solved in {run.directory}. Run: strata {what} {run.name}")
    test = next(key for key in keys_at(run, 0) if key.split == "test")
    labels, kind = store.open(test).array("label"), run.recipe.loss.kind
    likely = [probabilities(kind, z) for z in logits]
    first, end = trained.start, trained.stop - 1
    last, of = likely, f"ensemble of layers {first} … {end} (probabilities)"
    if not logits:
        name, z = next(iter(scores.items()))
        last, of = [probabilities(kind, z)], f"the final classifier {name}"
    records = [run.layer(j) or {} for j in trained]

    def judged(
        j: int, one: Mapping[str, Any], z: Sequence[np.ndarray], p: Sequence[np.ndarray]
    ) -> dict[str, Any]:
        """How good the last of some classifiers is, by its record, and their ensemble; that of
        layer J may be another than its own C_J."""
        joined = {"logits": ensemble(z), "probabilities": ensemble(p)}
        return {
            "layer": j,
            "test": {"loss": one["test"]["loss"], **metrics(kind, z[-1], labels)},
            "ensemble": {name: metrics(kind, some, labels) for name, some in joined.items()},
        }

    return {
        "solved": [one["weights"] for one in records],
        "samples": len(labels),
        "layers": [
            judged(j, one, logits[:n], likely[:n])
            for n, (j, one) in enumerate(zip(trained, records, strict=True), start=1)
        ],
        "finals": [
            {"name": name, "auxiliary": finals[name]["auxiliary"]}
            | judged(
                run.layers,
                finals[name],
                [*logits[:-1], z],
                [*likely[:-1], probabilities(kind, z)],
            )
            for name, z in scores.items()
        ],
        "confusion": None
        if labels.dtype.kind == "f"
        else {"of": of, "matrix": confusion(ensemble(last), labels).tolist()},
    }


def _without_logits(
    run: Run, store: Store, trained: Iterable[int], finals: Mapping[str, SweepResult]
) -> dict[str, Any]:
    """What is said of layers whose logits are too many to be kept: no ensemble, no matrix."""
    test = next(key for key in keys_at(run, 0) if key.split == "test")
    records = [run.layer(j) or {} for j in trained]
    ensemble = dict.fromkeys(("logits", "probabilities"), dict.fromkeys(("top1", "top5")))
    return {
        "solved": [one["weights"] for one in records],
        "samples": len(store.open(test)),
        "layers": [
            {k: one[k] for k in ("layer", "test")} | {"ensemble": ensemble} for one in records
        ],
        "finals": [
            {"name": name, "auxiliary": one["auxiliary"], "layer": run.layers}
            | {"test": {key: one["test"][key] for key in ("loss", "top1", "top5")}}
            | {"ensemble": ensemble}
            for name, one in finals.items()
        ],
        "confusion": None,
    }
