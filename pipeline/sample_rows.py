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

from pipeline import views, weights
from pipeline.images import have_images
from pipeline.overview import Overview
from pipeline.recipe import Recipe
from stages import augment
from stages.calibrate import calibrate
from stages.network import Layer, blank_layer, initialise
from stages.quantise import Codec, codec, needs_scales
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
    layer = blank_layer(found.recipe.layers[0])
    record = found.run and found.run.solved() and found.run.layer(1)
    if not record:
        initialise(layer, torch.Generator().manual_seed(0))
        return layer.train()
    assert found.run is not None
    path = found.run.layer_directory(1) / "weights.safetensors"
    layer.load_state_dict(weights.read_checked(path, record["weights"]))
    return layer.eval()


@torch.no_grad()
def _features(layer: Layer, x: Tensor) -> Tensor:
    return torch.cat([layer(part) for part in x.split(BATCH)])


def _stored(recipe: Recipe, values: Tensor) -> np.ndarray:
    precision = recipe.cache.precision
    found: Codec = codec("float32", {})
    if needs_scales(precision):
        found = calibrate(iter([values[:BATCH]]), precision, recipe.cache.percentile).quantiser
    else:
        found = codec(precision, {})
    return found.encode(values).contiguous().numpy()
