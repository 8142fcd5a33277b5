"""docs/depth.svg: test accuracy against depth, drawn from benchmarks/results/paper_small.json.

No measurement: the runs are those of paper_small.py (small networks with k = 1, 2, 3 on all of
CIFAR-10 (JPEG), n = 5 seeds each, two cores of an AMD EPYC). Points are means, bars are 95 %
intervals over the seeds.

    python benchmarks/depth_figure.py
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import checkout
from strata.pipeline.results.figures import BLUE, OCHRE, SLATE, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCE = checkout.ROOT / "benchmarks/results/paper_small.json"
FIGURE = checkout.ROOT / "docs/depth.svg"
LOOKS = ((OCHRE, "o"), (SLATE, "^"), (BLUE, "s"))
"""Colour and marker of each network."""


def label(networks: dict[str, Any]) -> str:
    """The figure in words, for those who cannot see it: every point in percent."""
    spoken = []
    for name, network in networks.items():
        means = ", ".join(f"{layer['mean']:.1f}" for layer in network["layers"])
        spoken.append(f"{name}: {means}")
    return f"Test accuracy in percent after each layer; {'; '.join(spoken)}"


def depth(figure: Figure, networks: dict[str, Any]) -> str:
    """Paint the ``networks`` of the result file."""
    figure.set_size_inches(6.6, 3.3)
    axes = figure.subplots()
    for (name, network), (colour, marker) in zip(networks.items(), LOOKS, strict=True):
        layers = network["layers"]
        means = [layer["mean"] for layer in layers]
        bars = [layer["plus_minus"] for layer in layers]
        depths = range(1, len(layers) + 1)
        axes.errorbar(depths, means, bars, color=colour, marker=marker, capsize=3, label=name)
    axes.set_xlabel("Layers trained")
    axes.set_ylabel("Test accuracy (%)")
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return label(networks)


if __name__ == "__main__":
    networks = json.loads(SOURCE.read_text("utf-8"))["networks"]
    FIGURE.write_text(draw(depth, networks) + "\n", "utf-8")
    print(FIGURE)
