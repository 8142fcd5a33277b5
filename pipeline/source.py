"""x_depth of one split as device tensors, by row: read from a level, or computed from one below.

The one seam where stored arrays become tensors. Whether the values were cached or computed, they
are the same; see stages/featurize.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import views, weights
from pipeline.recipe import Recipe
from pipeline.session import Session
from pipeline.views import Draws
from stages import augment
from stages.featurize import featurize
from stages.network import Layer, blank_layer
from store.level import Level


@dataclass(frozen=True)
class Features:
    """Where x_depth of one split comes from."""

    recipe: Recipe
    levels: Mapping[str, Level]
    """The nearest levels below (or at) ``depth``, by view; x_0 has the one view ``clean``."""
    base: int
    """Depth of those levels."""
    layers: Sequence[Layer]
    """Frozen layers base + 1 … depth, on the device, in eval mode."""
    device: torch.device
    compute: torch.dtype

    def read(self, rows: np.ndarray, view: str) -> np.ndarray:
        """Host part: stored values of rows (ascending int64) of the base level."""
        level = self.levels["clean" if self.base == 0 else view]
        out = np.empty((len(rows), *level.geometry.sample), level.geometry.dtype)
        level.take(rows, out)
        return out

    def compute_from(self, stored: np.ndarray, draws: Draws | None) -> Tensor:
        """Device part: x_depth of those rows in its stored precision; for x_0, normalised images.

        Args:
            draws: flip and offset of each row, used where the base is x_0.
        """
        x = torch.from_numpy(stored).to(self.device, non_blocking=True)
        if self.base == 0:
            assert draws is not None
            x = image_views(self.recipe, x, draws)
        if not self.layers:
            return x
        cache = self.recipe.cache
        return featurize(
            self.layers, x, precision=cache.precision, block=cache.block, compute=self.compute
        )


def image_views(recipe: Recipe, images: Tensor, draws: Draws) -> Tensor:
    """crop(flip(canvas), offset), normalised: float32 (B, C, H, W) from uint8 images."""
    device = images.device
    x = augment.flip(
        augment.pad(images, recipe.augment.pad), torch.from_numpy(draws.flipped).to(device)
    )
    if len(draws.offsets):
        x = augment.crop(x, torch.from_numpy(draws.offsets).to(device), recipe.augment.crop)
    return augment.normalise(x, recipe.data.mean, recipe.data.std)


def level_draws(recipe: Recipe, seed: int, view: str, samples: int) -> Draws:
    """The draws that make a cached level: of a fixed view, of a whole canvas, or of none."""
    whole = np.empty((0, 2), np.int64)
    if views.mode(recipe) == "canvas":
        return Draws(np.full(samples, view == "flipped"), whole)
    if view == "clean":
        return views.centre_draws(recipe, samples)
    return views.view_draws(recipe, seed, int(view.removeprefix("v")), samples)


def features(session: Session, depth: int, split: str, *, cached: bool = True) -> Features:
    """x_depth from the nearest complete levels, or with ``cached=False`` from the images."""
    base = _nearest(session, depth, split) if cached else 0
    names = _view_names(session.run.recipe, base, split)
    levels = {view: session.store.open(session.key(base, split, view)) for view in names}
    layers = [load_layer(session, j) for j in range(base + 1, depth + 1)]
    return Features(session.run.recipe, levels, base, layers, session.device, session.compute)


def _view_names(recipe: Recipe, depth: int, split: str) -> tuple[str, ...]:
    return ("clean",) if depth == 0 or split == "test" else views.train_views(recipe)


def _nearest(session: Session, depth: int, split: str) -> int:
    for d in range(depth, 0, -1):
        names = _view_names(session.run.recipe, d, split)
        states = [session.store.state(session.key(d, split, view)).state for view in names]
        if states and all(state == "complete" for state in states):
            return d
    return 0


def load_layer(session: Session, j: int) -> Layer:
    """Solved layer j on the device, in eval mode, its weights checked against their digest."""
    record = session.run.layer(j)
    assert record is not None
    path = session.run.layer_directory(j) / "weights.safetensors"
    layer = blank_layer(session.run.recipe.layers[j - 1])
    layer.load_state_dict(weights.read_checked(path, record["weights"]))
    layer.requires_grad_(False)
    return layer.eval().to(session.device, memory_format=torch.channels_last)  # pyright: ignore
