"""Separability against depth (paper Figure 3): a table of probes, and curves for the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from strata.pipeline.errors import RunConflict
from strata.pipeline.results.figures import depth_axis, draw, drawable
from strata.pipeline.run import probe_results, rundir
from strata.pipeline.run.probe_results import Kind, ProbeResult
from strata.pipeline.run.rundir import RUN, Run
from strata.store.errors import LevelDamaged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5f99", "#c2691c", "#6b7280", "#3f7d4e", "#8a4f9e")
MARKERS = ("o", "^", "s", "D", "v")


def table(title: str, results: Sequence[ProbeResult]) -> Table:
    """Probes as a table: one row per depth, accuracies on the test and the training images."""
    kinds = sorted({Kind.of(one["kind"]) for one in results})
    found = {(one["layer"], one["kind"]): one for one in results}
    heads = [(f"{kind.name}, test", "train", *["C"] * (not kind.hidden)) for kind in kinds]
    columns = [Column(head, overflow="fold") for some in heads for head in some]
    shown = Table("x_j", *columns, title=title, title_justify="left")
    for j in sorted({one["layer"] for one in results}):
        cells = (_cells(found.get((j, kind.name)), kind) for kind in kinds)
        shown.add_row(f"x_{j}", *(cell for some in cells for cell in some))
    return shown


def _cells(one: ProbeResult | None, kind: Kind) -> list[str]:
    if one is None:
        return [""] * (2 if kind.hidden else 3)
    cells = [f"{100 * one[split]['top1']:.2f} %" for split in ("test", "train")]
    if not kind.hidden:
        cells.append(f"{one['regularisation']:g}{'' if one['converged'] else ', not converged'}")
    return cells


# ---- curves over runs ----------------------------------------------------------------------------


def curves(run: Run) -> list[dict[str, Any]]:
    """Test accuracy against depth for every network, images and kind of probe that the run has,
    over the runs of the same recipe beside it, one for each seed.

    Returns:
        As JSON: ``of``, ``images`` (None: the run's own), ``kind``, and ``points`` with ``depth``,
        ``test`` and ``train`` (means), ``spread`` (standard deviation of ``test`` over the runs;
        None of one) and ``runs``.
    """
    results = [list(_results(one)) for one in (run, *_beside(run))]
    found = []
    for name in dict.fromkeys(name for name, _ in results[0]):
        depths: dict[int, list[ProbeResult]] = {}
        for one in (one for some in results for n, one in some if n == name):
            depths.setdefault(one["layer"], []).append(one)
        points = [_point(depth, depths[depth]) for depth in sorted(depths)]
        of, images, _, kind = name
        found.append({"of": of, "images": images, "kind": kind, "points": points})
    return found


def _results(run: Run) -> Iterator[tuple[tuple[str, str | None, str | None, str], ProbeResult]]:
    """Results, and what each is of: network, images and their digest (None: the run's own), and
    kind of probe."""
    for network in probe_results.networks(run):
        images, digest, source = None, None, network.source
        if source != run.source:
            images = probe_results.source_name(source)
            digest = (network.data() or {}).get("digest")
        for one in probe_results.results(network):
            yield (probe_results.trained(network), images, digest, one["kind"]), one


def _beside(run: Run) -> Iterator[Run]:
    """Runs of the same recipe in the same directory, one for every other seed."""
    seeds, science = {run.seed}, run.recipe.science()
    for path in sorted(run.directory.resolve().parent.glob(f"*/{RUN}")):
        with suppress(RunConflict, LevelDamaged, OSError):  # it is not this run that is reported
            other = rundir.find(path.parent)
            if other and other.recipe.science() == science and other.seed not in seeds:
                seeds.add(other.seed)
                yield other


def _point(depth: int, results: Sequence[ProbeResult]) -> dict[str, Any]:
    test, train = ([one[split]["top1"] for one in results] for split in ("test", "train"))
    return {
        "depth": depth,
        "test": statistics.fmean(test),
        "train": statistics.fmean(train),
        "spread": statistics.stdev(test) if len(test) > 1 else None,
        "runs": len(test),
    }


# ---- the figure ----------------------------------------------------------------------------------


def separability(report: dict[str, Any]) -> str:
    """Draw test accuracy of probes against depth, linear and CNN-p; empty if there are none."""
    found = report["probes"]
    linear = [one for one in found if one["kind"] == "linear"]
    cnns = [one for one in found if one["kind"] != "linear"]
    sides = [side for side in (("Linear", linear), ("CNN-p", cnns)) if side[1]]
    if not sides:
        return ""
    label = "; ".join(f"{_title(one)}: {_spoken(one)}" for one in found)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, len(sides), squeeze=False)[0]
        for axes, (title, some) in zip(panels, sides, strict=True):
            for number, one in enumerate(some):
                _plot(axes, one, number)
            axes.set_title(f"{title} separability", fontsize=9.5)
            depth_axis(axes)
            axes.legend(fontsize=8)
        panels[0].set_ylabel("Test accuracy (%)")

    return draw("probes", (3.5 * len(sides) if len(sides) > 1 else 5.0, 3.4), label, paint)


def _plot(axes: Axes, one: dict[str, Any], number: int) -> None:
    points = one["points"]
    depth = [point["depth"] for point in points]
    mean = [100 * point["test"] for point in points]
    spread = [100 * (point["spread"] or 0.0) for point in points]
    look = {"color": COLOURS[number % 5], "marker": MARKERS[number % 5], "capsize": 2.5}
    bars = spread if any(spread) else None
    axes.errorbar(depth, mean, yerr=bars, label=_title(one, short=True), **look)


def _title(one: dict[str, Any], *, short: bool = False) -> str:
    parts = [one["of"]]
    if one["images"]:
        folder = one["images"].partition(":")[2] or one["images"]
        parts.append(f"on {drawable(folder, 'other images')}")
    if one["kind"] != "linear" or not short:
        parts.append("linear" if one["kind"] == "linear" else f"p = {Kind.of(one['kind']).hidden}")
    return ", ".join(parts)


def _spoken(one: dict[str, Any]) -> str:
    return ", ".join(f"x_{p['depth']} {100 * p['test']:.1f} %" for p in one["points"])
