"""The report of a run: report.json, all that figures and tables need, and report.html, one page
that needs nothing but itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from strata.pipeline.curves import curve_of
from strata.pipeline.plan import compression
from strata.pipeline.progress import duration, size
from strata.pipeline.recipe import augmentation, builtin
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.recipe.tables import Claim
from strata.pipeline.results import figures, separability
from strata.pipeline.results.figures import Report, human_figure, human_percent
from strata.pipeline.results.status import status
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.probe_results import source_name
from strata.pipeline.run.record import CURVE
from strata.pipeline.run.rundir import Run
from strata.stages.solve.evaluate import NAMES, chief, metrics_in
from strata.store.files.publish import replace

DATA = ("digest", "train", "test", "classes", "broken", "broken_count")
"""Fields of what is known of the images that a report shows."""
PAINTERS = (figures.depth, separability.probes, figures.training, figures.cost, figures.confusion)
LISTED = 200  # broken files and classes shown by name before the page only counts them


def write_report(overview: Overview) -> Report:
    """Write report.json and report.html into the run; returns what the first one holds.

    Raises:
        NotThereYet: nothing has been solved.
    """
    run = overview.existing()
    with run.in_turn():
        report = collect(overview)
        replace(run.directory, "report.json", (json.dumps(report, indent=1) + "\n").encode())
        replace(run.directory, "report.html", render(report).encode("utf-8", "backslashreplace"))
    return report


def collect(overview: Overview) -> Report:
    """Everything a report shows. Raises NotThereYet if no layer is solved."""
    run, left_out = overview.existing(), list[str]()
    data, evaluation, states = run.data(), overview.evaluation(), status(overview)
    assert data is not None
    layers = [
        _layer(run, one["layer"], one, states["layers"][one["layer"] - 1])
        for one in evaluation["layers"][: run.solved() - run.recipe.given]
    ]
    recipe = {k: table for k, table in dataclasses.asdict(run.recipe).items() if table is not None}
    network, head = recipe["network"], recipe["auxiliary"]
    blocks = *network.get("known", ()), *head.get("known", ())
    for source in (network, head.get("source", {}), *(block["source"] for block in blocks)):
        for here in ("folder", "home", "read", "file_of_weights"):  # where it was made
            source.pop(here, None)
    for table, key in (("loss", "name"), ("augment", "transform")):
        if isinstance(own := recipe[table][key], dict):  # a function, with its text
            recipe[table][key] = own["name"]
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
        "claim": dataclasses.asdict(_claim(run.recipe)),
        "layers": layers,
        "confusion": evaluation["confusion"],
        "probes": separability.curves(run, left_out),
        "left_out": left_out,
        "steps": steps,
        "outcomes": list(_outcomes(run)),
        "seconds": sum(step["seconds"] for step in steps),
    }


def _claim(recipe: Recipe) -> Claim:
    """The recipe's claim; an empty one where it was copied from a built-in recipe, and the rest is
    not as there."""
    copied = [one for _, one in map(builtin.load, builtin.names()) if one.claim == recipe.claim]
    own = not copied or any(one.science() == recipe.science() for one in copied)
    return recipe.claim if own else Claim()


def _layer(run: Run, j: int, evaluation: Report, state: Report) -> Report:
    record = run.layer(j)
    assert record is not None
    epochs = curve_of(run.layer_directory(j) / CURVE)
    wrote, now = run.features(j), run.nodes()[j].fingerprint
    written = wrote["levels"] if wrote and wrote["fingerprint"] == now else {}
    trained = len(epochs) * (run.data() or {})["train"]
    return {
        "layer": j,
        "shape": list(run.recipe.shape(j, augmentation.cached_size(run.recipe))),
        **{k: record[k] for k in ("parameters", "auxiliary_parameters", "kept_epoch")},
        "variant": record.get("variant"),
        "compression": compression.summary(record),
        "train": record["train"],
        **{k: evaluation[k] for k in ("test", "ensemble")},
        "epochs": epochs,
        "solve_seconds": record["seconds"],
        # None of a layer that was trained in the window of one below.
        "samples_per_second": trained / spent if (spent := record["seconds"]) else None,
        **{k: record[k] for k in ("peak_memory_bytes", "quantiser")},
        "levels": [
            {k: level[k] for k in ("level", "state", "rows", "bytes")}
            | {"seconds": found.get("seconds"), "written": found.get("bytes")}
            for level in state["levels"]
            for found in [written.get(level["level"], {})]  # empty: another run wrote it
        ],
    }


def _steps(layers: list[Report]) -> list[Report]:
    """Solving and writing in the order they happen."""
    steps = []
    for layer in layers:
        j, spent = layer["layer"], layer["solve_seconds"]
        steps.append({"step": f"solve layer {j}", "seconds": spent, "bytes": 0})
        if seconds := sum(level["seconds"] or 0.0 for level in layer["levels"]):
            nbytes = sum(level["written"] or 0 for level in layer["levels"])
            steps.append({"step": f"write x_{j}", "seconds": seconds, "bytes": nbytes})
    return steps


def _outcomes(run: Run) -> Iterator[Report]:
    """What every step was expected to take, and took, in the order they happen."""
    for j in range(1, run.solved() + 1):
        for name, record in ((f"solve layer {j}", run.layer(j)), (f"write x_{j}", run.features(j))):
            if record and "outcome" in record:
                yield {"step": name, **record["outcome"]}


def _own_version() -> str:
    try:
        return version("strata")
    except PackageNotFoundError:
        return "not installed"


# ---- the page ------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """Return the page of a report, finished or not; the same report gives the same page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=lambda count: "—" if count is None else size(count),
        seconds=lambda taken: "—" if taken is None else duration(taken),
        percent=lambda fraction: human_percent(fraction, report["data"]["test"]),
        count=lambda number: "—" if number is None else f"{number:,.0f}",
        loss=lambda number: "—" if number is None else f"{number:.3f}",
        figure=lambda value, name: human_figure(name, value, report["data"]["test"]),
    )
    return environment.get_template("report.html.j2").render(
        r=report,
        claims=list(_claims(report)),
        recipe={name: list(_settings(group)) for name, group in report["recipe"].items()},
        mistakes=list(_mistakes(report)),
        pool=-(-len(report["data"]["classes"]) // figures.POOLED),
        # matplotlib escapes the text of its SVG, so it goes into the page as it is.
        figures={paint.__name__: Markup(figures.draw(paint, report)) for paint in PAINTERS},
        listed=LISTED,
        best=chief(report["layers"][-1]["test"]) if report["layers"] else "top1",
        kinds=metrics_in(layer["test"] for layer in report["layers"]),
        names={key: name[:1].upper() + name[1:] for key, name in NAMES.items()} | {"map": "mAP"},
    )


def _claims(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """What is claimed: its name, the claim, what the run reached, and the difference."""
    claim, last = report["claim"], (report["layers"] or [None])[-1]
    own, joint = (last["test"], last["ensemble"]["probabilities"]) if last else ({}, {})
    for who, field, found in (("Last layer", "last", own), ("Ensemble", "ensemble", joint)):
        for best, key in ((1, field), (5, f"{field}_top5")):
            if claim[key] is not None:
                share = found.get(f"top{best}")
                got = human_percent(share, report["data"]["test"])
                gap = "—" if share is None else f"{100 * share - claim[key]:+.1f} points"
                gap = gap.replace("-", "\N{MINUS SIGN}")
                yield f"{who}, top-{best}", f"{claim[key]:g} %", got, gap


def _mistakes(report: Report, most: int = 3) -> Iterator[tuple[str, str, int]]:
    """The commonest confusions, as (true class, predicted class, times)."""
    if report["confusion"]:
        names = [n.strip() or f"class {place}" for place, n in enumerate(report["data"]["classes"])]
        wrong = np.array(report["confusion"]["matrix"])
        np.fill_diagonal(wrong, 0)
        for cell in np.argsort(-wrong, axis=None, kind="stable")[:most]:
            row, column = divmod(int(cell), len(wrong))
            if times := int(wrong[row, column]):
                yield names[row], names[column], times


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a recipe's table, tables inside it included."""
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _settings(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name or "value", _setting(value)


def _setting(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
