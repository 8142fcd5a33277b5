"""Rows to measure storing on: x_1 of the run's own images, as far as there are any yet, whole
canvases where these are cached.

What packs well is zeros and what is alike, so noise says little of features. Of a run that has its
images, x_1 comes from layer 1 as it was solved, or else as it will begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from strata.pipeline.feed.features import read_layer
from strata.pipeline.plan.caching import FEATURES
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.levels import have_images
from strata.pipeline.run.overview import Overview
from strata.stages.data import augment
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Codec, codec, needs_scales
from strata.stages.network.network import build_layer
from strata.store.level.layout import LevelKey

BATCH = 256


@dataclass(frozen=True)
class Sample:
    """Some of a run's images and maps."""

    images: np.ndarray
    """uint8 (n, channel, y, x), of x_0; noise where there are none yet."""
    maps: Tensor
    """float32 (n, channel, y, x), of x_1, channels last."""
    what: str
    """They are, for people."""


def sample(found: Overview, count: int) -> Sample:
    """
    Args:
        count: most rows.
    """
    recipe, data = found.recipe, found.recipe.data
    images, what = _images(found, count), FEATURES
    if images is None:
        shape = (min(count, 4 * BATCH), data.channels, data.size, data.size)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        what = "noise: there are no images yet"
    x = augment.pad(torch.from_numpy(images), recipe.augment.pad)
    if augmentation.mode(recipe) != "canvas":
        begin, end = recipe.centre, recipe.centre + recipe.augment.crop
        x = x[..., begin:end, begin:end]
    maps = _features(_layer(found), augment.normalise(x, data.mean, data.std))
    return Sample(images, maps.contiguous(memory_format=torch.channels_last), what)


def _images(found: Overview, most: int) -> np.ndarray | None:
    if found.run is None or not have_images(found.run, found.store):
        return None
    key = LevelKey(0, found.run.nodes()[0].fingerprint, "train", "clean")
    level = found.store.open(key)
    return level.read(0, min(len(level), most))


def _layer(found: Overview) -> nn.Module:
    """Layer 1 in eval mode if it is solved; else as it begins, its statistics those of a batch."""
    spec, run = found.recipe.layers[0], found.run
    if run and run.solved() and (record := run.layer(1)):
        path = run.layer_directory(1) / "weights.safetensors"
        return read_layer(spec, path, record["weights"], torch.device("cpu"))
    return build_layer(spec, 0).train()


@torch.no_grad()
def _features(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([layer(part) for part in x.split(BATCH)])


def codec_for(recipe: Recipe, precision: str, maps: Tensor) -> Codec:
    """How maps are stored in a precision, with scales that suit them."""
    scales = {}
    if needs_scales(precision):
        found = calibrate(iter([maps[:BATCH]]), precision, recipe.cache.percentile)
        scales = found.quantiser.tensors()
    return codec(precision, scales)
