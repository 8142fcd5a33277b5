"""Rows to measure packing on: x_1 of the run's own images, as far as there are any yet, whole
canvases where these are cached.

What packs well is zeros and what is alike, so noise says little of features. Of a run that has its
images, x_1 comes from layer 1 as it was solved, or else as it will begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import views
from pipeline.images import have_images
from pipeline.overview import Overview
from pipeline.recipe import Recipe
from pipeline.source import read_layer
from stages import augment
from stages.calibrate import calibrate
from stages.network import Layer, blank_layer, initialise
from stages.quantise import codec, needs_scales
from store.layout import LevelKey

BATCH = 256


@dataclass(frozen=True)
class Sample:
    """Stored rows of x_1, (n, channel, y, x), and what they are, for people."""

    rows: np.ndarray
    what: str


def sample(found: Overview, count: int) -> Sample:
    """
    Args:
        count: rows; images are taken again and again until there are as many.
    """
    recipe = found.recipe
    images = _images(found, count)
    if images is None:
        side = views.cached_size(recipe)
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(min(count, 4 * BATCH), recipe.data.channels, side, side, generator=noise)
        what = "noise: there are no images yet"
    else:
        border = recipe.augment.pad if views.mode(recipe) == "canvas" else 0
        padded = augment.pad(torch.from_numpy(images), border)
        x = augment.normalise(padded, recipe.data.mean, recipe.data.std)
        what = "features of x_1"
    rows = _stored(recipe, _features(_layer(found), x))
    return Sample(np.resize(rows, (count, *rows.shape[1:])), what)


def _images(found: Overview, most: int) -> np.ndarray | None:
    if found.run is None or not have_images(found.run, found.store):
        return None
    key = LevelKey(0, found.run.nodes()[0].fingerprint, "train", "clean")
    level = found.store.open(key)
    return level.read(0, min(len(level), most))


def _layer(found: Overview) -> Layer:
    """Layer 1 in eval mode if it is solved; else as it begins, its statistics those of a batch."""
    spec, run = found.recipe.layers[0], found.run
    if run and run.solved() and (record := run.layer(1)):
        path = run.layer_directory(1) / "weights.safetensors"
        return read_layer(spec, path, record["weights"], torch.device("cpu"))
    layer = blank_layer(spec)
    initialise(layer, torch.Generator().manual_seed(0))
    return layer.train()


@torch.no_grad()
def _features(layer: Layer, x: Tensor) -> Tensor:
    return torch.cat([layer(part) for part in x.split(BATCH)])


def _stored(recipe: Recipe, values: Tensor) -> np.ndarray:
    cache, scales = recipe.cache, {}
    if needs_scales(cache.precision):
        found = calibrate(iter([values[:BATCH]]), cache.precision, cache.percentile)
        scales = found.quantiser.tensors()
    return codec(cache.precision, scales).encode(values).contiguous().numpy()
