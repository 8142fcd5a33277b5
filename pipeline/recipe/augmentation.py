"""Which augmentation every sample gets, as pure functions of (seed, view or epoch, sample id).

Three modes, named by the recipe (``augment.views``):

    fresh    0         new draws every epoch; the layers below are recomputed
    fixed    V         V draws, each a level; sample i of epoch e uses view (e + offset_i) mod V
    canvas   "canvas"  the whole canvas, plain and flipped; the crop is cut in feature space

A view is crop(flip(canvas), offset). What is no image has one fixed view, ``clean``. A draw never
depends on a worker or on a row's position.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np

from strata.pipeline.recipe.recipe import Recipe
from strata.store.read.order import generator


@dataclass(frozen=True)
class Draws:
    """One draw per sample."""

    flipped: np.ndarray
    """bool (n,)"""
    offsets: np.ndarray
    """int64 (n, 2): (y, x) of the crop in the canvas, in pixels of x_0; (0, 2): no crop, the whole
    canvas."""
    seeds: np.ndarray | None = None
    """int64 (n,): what ``augment.transform`` draws from; None: it is not applied."""

    def of(self, ids: np.ndarray) -> Draws:
        """The draws of the samples ``ids``; a whole canvas stays one."""
        offsets = self.offsets[ids] if len(self.offsets) else self.offsets
        return Draws(self.flipped[ids], offsets, None if self.seeds is None else self.seeds[ids])


def mode(recipe: Recipe) -> str:
    """``fresh``, ``fixed`` or ``canvas``."""
    views = recipe.augment.views
    if isinstance(views, str):
        return views
    return "fixed" if views else "fresh"


def train_views(recipe: Recipe) -> tuple[str, ...]:
    """Names of the cached training levels of a depth; none in fresh mode."""
    if mode(recipe) == "canvas":
        return ("plain", "flipped") if recipe.augment.flip else ("plain",)
    if recipe.data.shape:
        return ("clean",)
    return tuple(f"v{v}" for v in range(int(recipe.augment.views)))


def views_at(recipe: Recipe, depth: int, split: str, *, clean: bool = False) -> tuple[str, ...]:
    """Names of the views of x_depth that are levels of a split; none in fresh mode.

    Args:
        clean: only that of the un-augmented images: in canvas mode the plain canvas; else one of
            its own, which only probes read.
    """
    if depth == 0 or split == "test":
        return ("clean",)
    if clean:
        return ("plain" if mode(recipe) == "canvas" else "clean",)
    return train_views(recipe)


def levels_at(recipe: Recipe, depth: int, *, clean: bool = False) -> list[tuple[str, str]]:
    """(split, view) of every level of x_depth, x_0 included. ``clean`` as in :func:`views_at`."""
    splits = ("train", "test")
    return [(s, view) for s in splits for view in views_at(recipe, depth, s, clean=clean)]


def cached_size(recipe: Recipe) -> int:
    """Side in pixels of x_0 of what is cached: the canvas in canvas mode, else the crop."""
    return recipe.canvas if mode(recipe) == "canvas" else recipe.augment.crop


def epoch_draws(recipe: Recipe, seed: int, epoch: int, samples: int, scale: int = 1) -> Draws:
    """The draws of an epoch in fresh and canvas mode.

    Args:
        scale: offsets are multiples of this many pixels, the downsampling at the depth of the crop.
    """
    uniform = generator("epoch draws", seed, epoch).random((samples, 3))
    flipped = uniform[:, 0] < 0.5
    if recipe.augment.flips == "alternated":
        flipped = _alternated(seed, epoch, samples)
    seeds = _seeds(recipe, "transform of an epoch", seed, epoch, samples)
    return Draws(flipped & recipe.augment.flip, _offsets(recipe, uniform[:, 1:], scale), seeds)


def view_draws(recipe: Recipe, seed: int, view: int, samples: int) -> Draws:
    """The draws of fixed view ``view``."""
    uniform = generator("view draws", seed, view).random((samples, 2))
    flipped = _alternated(seed, view, samples)
    if recipe.augment.flips == "random":
        flipped = generator("view flip", seed, view).random(samples) < 0.5
    seeds = _seeds(recipe, "transform of a view", seed, view, samples)
    return Draws(flipped & recipe.augment.flip, _offsets(recipe, uniform, 1), seeds)


def _seeds(recipe: Recipe, what: str, seed: int, number: int, samples: int) -> np.ndarray | None:
    if not recipe.augment.transform:
        return None
    return generator(what, seed, number).integers(0, 2**63, samples)


def _alternated(seed: int, number: int, samples: int) -> np.ndarray:
    """bool (n,): the other way round than in the epoch, or the view, before."""
    return (generator("first flip", seed).random(samples) < 0.5) ^ bool(number % 2)


def _offsets(recipe: Recipe, uniform: np.ndarray, scale: int) -> np.ndarray:
    step = lcm(scale, recipe.augment.stride)
    positions = (recipe.canvas - recipe.augment.crop) // step + 1
    return (uniform * positions).astype(np.int64) * step


def centre_draws(recipe: Recipe, samples: int) -> Draws:
    """No flip, centre crop: the un-augmented image."""
    return Draws(np.zeros(samples, bool), np.full((samples, 2), recipe.centre, np.int64))
