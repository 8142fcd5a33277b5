"""Separability against depth (paper Figure 3): what probes have found, and its curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from strata.pipeline.results.figures import (
    BLUE,
    OCHRE,
    SLATE,
    depth_axis,
    drawable,
    human_figure,
    labelled,
)
from strata.pipeline.run import probe_results, rundir
from strata.pipeline.run.probe_results import Kind, ProbeResult
from strata.pipeline.run.rundir import Run
from strata.stages.solve.evaluate import SHARES, chief
from strata.store.errors import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS, MARKERS = (BLUE, OCHRE, SLATE, "#3f7d4e", "#8a4f9e"), [*"o^sDv"]
_Name = tuple[str, str | None, str | None, str]
"""Network, images and their digest (None: the run's own), and kind of probe."""


def curves(run: Run, left_out: list[str]) -> list[dict[str, Any]]:
    """Test accuracy against depth for every network, images and kind of probe that the run has,
    over the runs of the same recipe beside it, one for each seed.

    Args:
        left_out: runs beside it that cannot be read are added, with the reason.

    Returns:
        As JSON: ``of``, ``images`` (None: the run's own), ``kind``, the ``metric``, and ``points``
        with ``depth``, ``test`` and ``train`` (means), ``spread`` (standard deviation of ``test``
        over the runs; None of one) and ``runs``.
    """
    found = defaultdict[_Name, dict[int, list[ProbeResult]]](lambda: defaultdict(list))
    for name, result in _results(run):
        found[name][result["layer"]].append(result)
    for others in _beside(run, left_out):
        for name, result in others:
            if name in found:
                found[name][result["layer"]].append(result)
    return [
        {"of": of, "images": images, "kind": kind, **_points(depths)}
        for (of, images, _, kind), depths in found.items()
    ]


def _results(run: Run) -> Iterator[tuple[_Name, ProbeResult]]:
    """Results, and what each is of."""
    for network in probe_results.networks(run):
        images, digest, source = None, None, network.source
        if source != run.source:
            images = probe_results.source_name(source)
            digest = (network.data() or {}).get("digest")
        for one in probe_results.results(network):
            yield (probe_results.trained(network), images, digest, one["kind"]), one


def _beside(run: Run, left_out: list[str]) -> Iterator[list[tuple[_Name, ProbeResult]]]:
    """Results of the runs of the same recipe in the same directory, one for every other seed."""
    seeds, science = {run.seed}, run.recipe.science()

    def read(directory: Path) -> list[tuple[_Name, ProbeResult]]:
        other = rundir.find(directory)
        if not other or other.recipe.science() != science or other.seed in seeds:
            return []
        found = list(_results(other))
        seeds.add(other.seed)
        return found

    # A file with a suffix is somebody's note; one without lies where a run should.
    found = run.directory.resolve().parent.glob("[!.@]*")
    beside = sorted(path for path in found if not (path.suffix and path.is_file()))
    yield from readable(beside, read, left_out)


def _points(depths: Mapping[int, Sequence[ProbeResult]]) -> dict[str, Any]:
    points, name = [], chief(next(iter(depths.values()))[0]["test"])
    for depth, results in sorted(depths.items()):
        test, train = ([one[split][name] for one in results] for split in ("test", "train"))
        means = {"depth": depth, "test": fmean(test), "train": fmean(train)}
        points.append(
            {**means, "spread": stdev(test) if len(test) > 1 else None, "runs": len(test)}
        )
    return {"metric": name, "points": points}


def probes(figure: Figure, report: dict[str, Any]) -> str:
    """Paint test accuracy of probes against depth, linear and CNN-p (paper Figure 3)."""
    found, sides = report["probes"], dict[str, list[dict[str, Any]]]()
    for one in sorted(found, key=lambda one: one["kind"] != "linear"):
        sides.setdefault("Linear" if one["kind"] == "linear" else "CNN-p", []).append(one)
    if not sides:
        return ""
    metric, scale = found[0]["metric"], 100 if found[0]["metric"] in SHARES else 1
    figure.set_size_inches(3.5 * len(sides) if len(sides) > 1 else 5.0, 3.4)
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    for axes, (title, some) in zip(panels, sides.items(), strict=True):
        axes.set_prop_cycle(color=COLOURS, marker=MARKERS)
        for one in some:
            depths = [point["depth"] for point in one["points"]]
            mean = [scale * point["test"] for point in one["points"]]
            spread = [scale * (point["spread"] or 0.0) for point in one["points"]]
            look = {"label": _probe_name(one, short=True), "capsize": 2.5}
            axes.errorbar(depths, mean, yerr=spread if any(spread) else None, **look)
        axes.set_title(f"{title} separability", fontsize=9.5)
        depth_axis(axes)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("Test accuracy (%)" if metric == "top1" else f"Test {labelled(metric)}")
    said = []
    for one in found:
        points = (f"x_{p['depth']} {human_figure(metric, p['test'], 0)}" for p in one["points"])
        said.append(f"{_probe_name(one)}: {', '.join(points)}")
    return "; ".join(said)


def _probe_name(one: dict[str, Any], *, short: bool = False) -> str:
    parts, kind = [one["of"]], Kind.of(one["kind"])
    if one["images"]:
        folder = one["images"].partition(":")[2] or one["images"]
        parts.append(f"on {drawable(folder, 'other images')}")
    if kind.hidden or not short:
        parts.append(f"p = {kind.hidden}" if kind.hidden else "linear")
    return ", ".join(parts)
