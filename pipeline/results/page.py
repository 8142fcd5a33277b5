"""Renders a report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from strata.pipeline.results.figures import (
    POOLED,
    Report,
    accuracy_against_depth,
    confusion,
    cost_per_step,
    human_bytes,
    human_percent,
    human_seconds,
    training_curves,
)
from strata.pipeline.results.separability import separability

TEMPLATE = "report.html.j2"
PAINTERS = (accuracy_against_depth, separability, training_curves, cost_per_step, confusion)
LISTED = 200  # broken files and classes shown by name before the page only counts them


def render(report: Report) -> str:
    """Return the page of a report, finished or not; the same report gives the same page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=human_bytes,
        seconds=human_seconds,
        percent=lambda fraction: human_percent(fraction, report["data"]["test"]),
        moment=_moment,
        count=_count,
        loss=lambda value: "—" if value is None else f"{value:.3f}",
    )
    return environment.get_template(TEMPLATE).render(**_values(report))


def _values(report: Report) -> dict[str, Any]:
    layers = report["layers"]
    levels = [level for layer in layers for level in layer["levels"]]
    return {
        "r": report,
        "last": layers[-1] if layers else None,
        "compressed": [layer for layer in layers if layer.get("compression")],
        "coded": [layer for layer in layers if layer.get("quantiser")],
        "written": sum(level["bytes"] or 0 for level in levels),
        "claims": list(_claims(report)),
        "recipe": {name: list(_settings(group)) for name, group in report["recipe"].items()},
        "top5": any(layer["test"]["top5"] is not None for layer in layers),
        "mistakes": _mistakes(report),
        "pool": -(-len(report["data"]["classes"]) // POOLED),
        "figures": _figures(report),
        "listed": LISTED,
    }


def _figures(report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    # matplotlib escapes the text of its SVG, so it goes into the page as it is.
    return {paint.__name__: Markup(paint(report)) for paint in PAINTERS}


def _claims(report: Report) -> Iterator[tuple[str, str, str, str]]:
    claim = report["claim"]
    for name, field, share in _ours(report):
        if claim[field] is not None:
            got = human_percent(share, report["data"]["test"])
            gap = "—" if share is None else f"{100 * share - claim[field]:+.1f} points"
            yield name, f"{claim[field]:g} %", got, gap.replace("-", "\N{MINUS SIGN}")


def _ours(report: Report) -> Iterator[tuple[str, str, float | None]]:
    """What a claim may speak of: its name, its field, and what the run reached."""
    last = report["layers"][-1] if report["layers"] else None
    own, joint = (last["test"], last["ensemble"]["probabilities"]) if last else ({}, {})
    for name, field, found in (("Last layer", "last", own), ("Ensemble", "ensemble", joint)):
        yield f"{name}, top-1", field, found.get("top1")
        yield f"{name}, top-5", f"{field}_top5", found.get("top5")


def _mistakes(report: Report, most: int = 3) -> list[tuple[str, str, int]]:
    """The commonest confusions, as (true class, predicted class, times)."""
    if not report["confusion"]:
        return []
    classes = report["data"]["classes"]
    wrong = [
        (times, row, column)
        for row, counts in enumerate(report["confusion"]["matrix"])
        for column, times in enumerate(counts)
        if times and row != column
    ]
    wrong.sort(key=lambda one: (-one[0], one[1], one[2]))
    names = [name.strip() or f"class {place}" for place, name in enumerate(classes)]
    return [(names[row], names[column], times) for times, row, column in wrong[:most]]


def _settings(group: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(group, dict):
        yield prefix or "value", _setting(group)
        return
    for key, value in group.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from _settings(value, name)
        else:
            yield name, _setting(value)


def _setting(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_setting(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _moment(text: str) -> str:
    moment = datetime.fromisoformat(text)
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%Y-%m-%d %H:%M} UTC"


def _count(number: float | None) -> str:
    return "—" if number is None else f"{number:,.0f}"
