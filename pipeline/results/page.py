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
    """What the template names, beside its filters."""
    from markupsafe import Markup

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
        # matplotlib escapes the text of its SVG, so it goes into the page as it is.
        "figures": {paint.__name__: Markup(paint(report)) for paint in PAINTERS},
        "listed": LISTED,
    }


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
        return ", ".join(_setting(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _moment(text: str) -> str:
    moment = datetime.fromisoformat(text)
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%Y-%m-%d %H:%M} UTC"


def _count(number: float | None) -> str:
    return "—" if number is None else f"{number:,.0f}"
