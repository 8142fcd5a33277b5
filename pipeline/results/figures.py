"""The figures of a report, drawn as SVG text that can stand inside an HTML page.

Text is drawn as outlines, so that a figure looks the same wherever it is opened, and every
figure prefixes its element ids, so that several can share one page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from strata.pipeline.progress import duration, size
from strata.stages.solve.evaluate import NAMES, SHARES, chief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any]

BLUE, OCHRE, SLATE = "#1f5f99", "#c2691c", "#6b7280"
ANNOTATED = 20  # classes up to which the cells of the confusion matrix carry their counts
NAMED = 40  # classes up to which its axes carry names
POOLED = 200  # cells a side above which classes are pooled, which bounds the page's size
BYTES = [(1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")]
SECONDS = [(1.0, "s"), (60.0, "min"), (3600.0, "h")]
FINE = 10_000  # test samples from which a second decimal of a percentage means something

STYLE = {
    "svg.hashsalt": "strata",
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],  # ships with matplotlib, so it is there on every machine
    "font.size": 9.0,
    "text.parse_math": False,  # a class may be called "$"
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def human_percent(fraction: float | None, test_rows: int) -> str:
    """Write a fraction as a percentage, as precise as the number of test samples allows."""
    if fraction is None:
        return "—"
    return f"{100 * fraction:.{2 if test_rows >= FINE else 1}f} %"


def human_figure(name: str, value: float | None, test_rows: int) -> str:
    """Write a metric: shares as percentages, other numbers as they are."""
    if name in SHARES or value is None:
        return human_percent(value, test_rows)
    return f"{value:.3f}"


def draw(paint: Callable[[Figure, Any], str], shown: Any) -> str:
    """Draw a figure as SVG text; empty where there is nothing to see.

    Args:
        paint: puts ``shown`` on a figure. Returns what is to be seen, for those who do not see it;
            empty if nothing is. The name of the function is the prefix of the elements' ids.
    """
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    # Starting from "default" keeps a user's own matplotlibrc out of the picture.
    with style.context(["default", STYLE]):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        if not (label := paint(figure, shown)):
            return ""
        # Metadata would put the clock and links to vocabularies into the file.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    parts = r"^.*?(?=<svg)|<!--.*?-->\s*|<style.*?</style>"
    svg = re.sub(parts, "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{paint.__name__}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()


def depth(figure: Figure, report: Report) -> str:
    """Paint test accuracy after each layer, with the ensemble's and the claim's."""
    layers, rows = report["layers"], report["data"]["test"]
    if not layers:
        return ""
    figure.set_size_inches(6.6, 3.7)
    axes = figure.subplots()
    depths = [one["layer"] for one in layers]
    best = chief(layers[-1]["test"])
    scale = 100 if best in SHARES else 1
    for key, marker in ((best, "o"), *[("top5", "^")] * (best == "top1")):
        words = NAMES[key]
        own = [one["test"][key] for one in layers]
        joint = [one["ensemble"]["probabilities"].get(key) for one in layers]
        if own[-1] is None:  # too few classes for the best five to say anything
            continue
        lines = (("Layer", own, "-", BLUE), ("Ensemble", joint, "--", OCHRE))
        look = {"marker": marker, "mfc": None if key == best else "white"}
        for who, values, dash, colour in lines:
            if values[-1] is None:  # no logits were kept to make an ensemble of
                continue
            name = f"{who}, {words}: {human_figure(key, values[-1], rows)}"
            heights = scale * np.asarray(values, dtype=float)
            axes.plot(depths, heights, dash, color=colour, label=name, **look)
    for key, colour, words in (("last", BLUE, "last layer"), ("ensemble", OCHRE, "ensemble")):
        if (claim := report["claim"][key]) is not None:
            name = f"Claim, {words}: {claim:g} %"
            axes.axhline(claim, color=colour, linestyle=":", linewidth=1.2, label=name)
    depth_axis(axes)
    axes.set_ylabel("Test accuracy (%)" if best == "top1" else f"Test {labelled(best)}")
    axes.set_xlim(depths[0] - 0.5, depths[-1] + 0.5)
    figure.legend(loc="outside upper left", ncols=2)
    spoken = [
        f"layer {one['layer']} {human_figure(best, one['test'][best], rows)}" for one in layers
    ]
    return f"Test {NAMES[best]} against depth: {', '.join(spoken)}"


def labelled(metric: str) -> str:
    """The name of a metric at an axis."""
    return f"{NAMES[metric]} (%)" if metric in SHARES else NAMES[metric]


def training(figure: Figure, report: Report) -> str:
    """Paint loss and accuracy, or what else is measured, by epoch, one layer after another."""
    layers = [one for one in report["layers"] if one["epochs"]]
    if not layers:
        return ""
    epochs, best = sum(len(one["epochs"]) for one in layers), chief(layers[-1]["test"])
    scale = 100 if best in SHARES else 1
    figure.set_size_inches(6.6, 4.6)
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    _layer_bands([loss, accuracy], layers)
    _curve(loss, layers, "train_loss", 1, OCHRE, "training")
    _curve(accuracy, layers, f"train_{best}", scale, OCHRE, "training")
    _curve(accuracy, layers, f"test_{best}", scale, BLUE, "test")
    is_nats = report["recipe"].get("loss", {}).get("name", "cross-entropy") == "cross-entropy"
    loss.set_ylabel("Loss (nats)" if is_nats else "Loss")
    loss.set_ylim(bottom=0)
    accuracy.set_ylabel("Top-1 accuracy (%)" if best == "top1" else labelled(best))
    accuracy.set_xlabel("Epoch, counted through all layers")
    accuracy.locator_params(axis="x", integer=True, min_n_ticks=1)
    accuracy.set_xlim(0.5, epochs + 0.5)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    what = "accuracy" if best == "top1" else NAMES[best]
    return f"Training loss and {what} over {epochs} epochs of {len(layers)} layers"


def cost(figure: Figure, report: Report) -> str:
    """Paint the time and the bytes each step took as horizontal bars."""
    steps = report["steps"]
    if not steps:
        return ""
    figure.set_size_inches(6.6, 0.9 + 0.23 * len(steps))
    time, space = figure.subplots(1, 2, sharey=True)
    _bars(time, "Time", [one["seconds"] for one in steps], OCHRE)
    _bars(space, "Written", [one["bytes"] for one in steps], BLUE)
    names = [drawable(one["step"], str(place)) for place, one in enumerate(steps, 1)]
    time.set_yticks(range(len(steps)), names)
    time.set_ylim(len(steps) - 0.4, -0.6)
    longest = max(steps, key=lambda one: one["seconds"])
    return f"Seconds and bytes of {len(steps)} steps; the longest is {longest['step']}"


def confusion(figure: Figure, report: Report) -> str:
    """Paint the confusion matrix, coloured by the share of the true class."""
    if not report["confusion"]:
        return ""
    counts = np.asarray(report["confusion"]["matrix"], dtype=float)
    classes = report["data"]["classes"]
    figure.set_size_inches(6.0, 5.4)
    axes = figure.subplots()
    _cells(axes, counts)
    if len(classes) > NAMED:
        axes.set(xticks=[], yticks=[])
    else:
        names = [drawable(name, str(place)) for place, name in enumerate(classes)]
        places = np.arange(len(classes)) + 0.5
        axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(places, names)
        axes.tick_params(length=0, labelsize=8 if len(classes) <= ANNOTATED else 6)
    axes.set(aspect="equal", xlabel="Predicted class", ylabel="True class")
    return f"Confusion matrix over {len(classes)} classes, {report['confusion']['of']}"


def depth_axis(axes: Axes) -> None:
    """Make x the depth, in whole layers, with lines across at the ticks of y."""
    axes.set_xlabel("Depth (layers)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(axis="y")


def _layer_bands(panels: list[Axes], layers: list[Report]) -> None:
    start = 0.5
    for axes in panels:
        axes.grid(axis="y")
    for place, one in enumerate(layers):
        end = start + len(one["epochs"])
        for axes in panels:
            axes.axvspan(start, end, color="#f3f4f6", alpha=place % 2, linewidth=0, zorder=0)
        name = f"layer {one['layer']}" if len(layers) <= 6 else f"{one['layer']}"
        top = panels[0].get_xaxis_transform()
        panels[0].text((start + end) / 2, 1.02, name, transform=top, ha="center", color=SLATE)
        start = end


def _curve(
    axes: Axes, layers: list[Report], key: str, scale: float, colour: str, label: str
) -> None:
    before = 0
    for one in layers:
        heights = scale * np.asarray([epoch.get(key) for epoch in one["epochs"]], dtype=float)
        epochs = before + 1 + np.arange(len(heights))
        known = np.isfinite(heights)  # test accuracy need not be taken at every epoch
        marker = "." if len(heights) <= 20 else ""
        axes.plot(epochs[known], heights[known], color=colour, marker=marker, label=label)
        before, label = before + len(heights), "_nolegend_"


def _bars(axes: Axes, name: str, values: list[float], colour: str) -> None:
    """Draw seconds (``Time``) or bytes as bars, each with its value in words."""
    units, words = (SECONDS, duration) if name == "Time" else (BYTES, size)
    scale, unit = max((one for one in units if one[0] <= max(values)), default=units[0])
    axes.set_xlabel(f"{name} ({unit})")
    bars = axes.barh(range(len(values)), np.divide(values, scale), color=colour, height=0.68)
    names = [words(value) if value else "" for value in values]
    axes.bar_label(bars, names, padding=3, fontsize=7.5, color="#374151")
    axes.set_xlim(0, 1.32 * max(values) / scale or 1)  # room for the words after the longest bar
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _cells(axes: Axes, counts: np.ndarray) -> None:
    """Shade the cells, of few classes with their counts; many are pooled."""
    edges = np.arange(0, len(counts), -(-len(counts) // POOLED))
    pooled = np.add.reduceat(np.add.reduceat(counts, edges, axis=0), edges, axis=1)
    # A square root lifts the few errors out of the white without hiding the diagonal.
    shades = np.sqrt(pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1))
    box = (0, len(counts), len(counts), 0)
    # Without interpolation every browser draws the cells themselves, unblurred.
    axes.imshow(shades, cmap="Blues", vmin=0, vmax=1, interpolation="none", extent=box)
    for row, column in np.argwhere(counts > 0) if len(counts) <= ANNOTATED else ():
        ink = "white" if shades[row, column] > 0.55 else "#111827"
        look = {"color": ink, "fontsize": 8 if len(counts) <= 12 else 6}
        words = f"{counts[row, column]:.0f}"
        axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", **look)


def drawable(name: str, otherwise: str) -> str:
    """A name on one line of at most 18 letters; ``otherwise`` where the font lacks one of them."""
    from matplotlib.font_manager import findfont, get_font

    name = " ".join(name.split())
    font = get_font(findfont("DejaVu Sans"))
    # The page lists the classes by number, so a script the font lacks is still legible there.
    if not name or not all(font.get_char_index(ord(letter)) for letter in name):
        return otherwise
    return name if len(name) <= 18 else name[:17] + "…"
