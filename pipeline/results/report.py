"""The report of a run: report.json, all that figures and tables need, and report.html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from strata.pipeline.plan import compression
from strata.pipeline.recipe import augmentation
from strata.pipeline.results import separability
from strata.pipeline.results.page import render
from strata.pipeline.results.status import status
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.probe_results import source_name
from strata.pipeline.run.record import CURVE
from strata.pipeline.run.rundir import Run
from strata.store.files.publish import replace

DATA = ("digest", "train", "test", "classes", "broken", "broken_count")
"""Fields of what is known of the images that a report shows."""


def write_report(overview: Overview) -> Path:
    """Write report.json and report.html into the run. Returns the page's path.

    Raises:
        NotThereYet: nothing has been solved.
    """
    run, report = overview.existing(), collect(overview)
    replace(run.directory, "report.json", (json.dumps(report, indent=1) + "\n").encode())
    replace(run.directory, "report.html", render(report).encode())
    return run.directory / "report.html"


def collect(overview: Overview) -> dict[str, Any]:
    """Everything a report shows. Raises NotThereYet if no layer is solved."""
    run = overview.existing()
    data, evaluation, states = run.data(), overview.evaluation(), status(overview)
    assert data is not None
    layers = [
        _layer(run, j, evaluation["layers"][j - 1], states["layers"][j - 1])
        for j in range(1, run.solved() + 1)
    ]
    recipe = {k: table for k, table in dataclasses.asdict(run.recipe).items() if table is not None}
    steps = _steps(layers)
    return {
        "name": run.name,
        "recipe": recipe,
        "seed": run.seed,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": run.facts["device"],
        "compute": run.compute,
        "mode": augmentation.mode(run.recipe),
        "machine": run.facts["machine"],
        "versions": {**run.facts["versions"], "strata": _own_version()},
        "data": {**{k: data[k] for k in DATA}, "source": source_name(run.source)},
        "claim": recipe["claim"],
        "layers": layers,
        "confusion": evaluation["confusion"],
        "probes": separability.curves(run),
        "steps": steps,
        "outcomes": list(_outcomes(run)),
        "seconds": sum(step["seconds"] for step in steps),
    }


def _layer(run: Run, j: int, evaluation: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    record = run.layer(j)
    assert record is not None
    lines = (run.layer_directory(j) / CURVE).read_text("utf-8").splitlines()
    written = (run.features(j) or {"levels": {}})["levels"]
    trained = len(lines) * (run.data() or {})["train"]
    return {
        "layer": j,
        "shape": list(run.recipe.shape(j, augmentation.cached_size(run.recipe))),
        **{k: record[k] for k in ("parameters", "auxiliary_parameters", "kept_epoch")},
        "variant": record.get("variant"),
        "compression": compression.summary(record),
        "train": record["train"],
        **{k: evaluation[k] for k in ("test", "ensemble")},
        "epochs": [json.loads(line) for line in lines],
        "solve_seconds": record["seconds"],
        "samples_per_second": trained / record["seconds"],
        **{k: record[k] for k in ("peak_memory_bytes", "quantiser")},
        "levels": [
            {k: level[k] for k in ("level", "state", "rows", "bytes")}
            | {"seconds": written.get(level["level"], {}).get("seconds")}
            for level in state["levels"]
        ],
    }


def _steps(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Solving and writing in the order they happen."""
    steps = []
    for layer in layers:
        j, spent = layer["layer"], layer["solve_seconds"]
        steps.append({"step": f"solve layer {j}", "seconds": spent, "bytes": 0})
        if seconds := sum(level["seconds"] or 0.0 for level in layer["levels"]):
            nbytes = sum(level["bytes"] for level in layer["levels"])
            steps.append({"step": f"write x_{j}", "seconds": seconds, "bytes": nbytes})
    return steps


def _outcomes(run: Run) -> Iterator[dict[str, Any]]:
    """What every step was expected to take, and took, in the order they happen."""
    for j in range(1, run.solved() + 1):
        for name, record in ((f"solve layer {j}", run.layer(j)), (f"write x_{j}", run.features(j))):
            if record and "outcome" in record:
                yield {"step": name, **record["outcome"]}


def _own_version() -> str:
    with suppress(PackageNotFoundError):
        return version("strata")
    return "not installed"
