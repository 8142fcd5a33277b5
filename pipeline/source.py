"""x_depth of one split as device tensors, by row: read from a level, or computed from one below.

The one seam where stored arrays become tensors. Whether the values were cached or computed, they
are the same; see stages/featurize.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import views, weights
from pipeline.recipe import Recipe
from pipeline.rundir import QUANTISER
from pipeline.session import Session
from pipeline.views import Draws
from stages import augment
from stages.errors import NotFinite
from stages.featurize import Frozen, featurize
from stages.network import blank_layer
from stages.quantise import Codec, codec, needs_scales
from store.level import Level


@dataclass(frozen=True)
class Features:
    """Where x_depth of one split comes from."""

    recipe: Recipe
    levels: Mapping[str, Level]
    """The nearest levels below (or at) ``depth``, by view; x_0 has the one view ``clean``."""
    base: int
    """Depth of those levels."""
    stored: Codec | None
    """What those levels hold, on the device; None where the base is x_0: images."""
    layers: Sequence[Frozen]
    """Frozen layers base + 1 … depth, on the device, in eval mode."""
    device: torch.device
    compute: torch.dtype

    def read(self, rows: np.ndarray, view: str) -> np.ndarray:
        """Host part: stored values of rows (ascending int64) of the base level."""
        level = self.levels["clean" if self.base == 0 else view]
        out = np.empty((len(rows), *level.geometry.stored), level.geometry.dtype)
        level.take(rows, out)
        return out

    def compute_from(self, stored: np.ndarray, draws: Draws | None) -> Tensor:
        """Device part: x_depth of those rows, (B, C, H, W), decoded or rounded as it is stored, in
        float16, bfloat16 or float32; for x_0, normalised images.

        Args:
            draws: flip and offset of each row, used where the base is x_0.
        """
        x = torch.from_numpy(stored).to(self.device, non_blocking=True)
        if self.stored is None:
            assert draws is not None
            x = image_views(self.recipe, x, draws)
        else:
            x = self.stored.decode(x, next(iter(self.levels.values())).geometry.sample[2])
        if not self.layers:
            return x
        return featurize(self.layers, x, block=self.recipe.cache.block, compute=self.compute)


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
    stored = _codec_of(session, levels) if base else None
    return Features(
        session.run.recipe, levels, base, stored, layers, session.device, session.compute
    )


def _codec_of(session: Session, levels: Mapping[str, Level]) -> Codec:
    """How to read levels of features: by what lies beside them. All views have the same scales."""
    level = next(iter(levels.values()))
    precision = level.geometry.precision
    names = ("scale", "zero") if needs_scales(precision) else ()
    tensors = {name: torch.from_numpy(level.array(name)) for name in names}
    return codec(precision, tensors).to(session.device)


def _view_names(recipe: Recipe, depth: int, split: str) -> tuple[str, ...]:
    return ("clean",) if depth == 0 or split == "test" else views.train_views(recipe)


def _nearest(session: Session, depth: int, split: str) -> int:
    for d in range(depth, 0, -1):
        names = _view_names(session.run.recipe, d, split)
        states = [session.store.state(session.key(d, split, view)).state for view in names]
        if states and all(state == "complete" for state in states):
            return d
    return 0


def load_layer(session: Session, j: int) -> Frozen:
    """Solved layer j on the device, in eval mode, and how x_j is stored.

    Raises:
        LevelDamaged: weights or scales are not those that the layer's record speaks of.
    """
    record, recipe = session.run.layer(j), session.run.recipe
    assert record is not None
    directory = session.run.layer_directory(j)
    layer = blank_layer(recipe.layers[j - 1])
    layer.load_state_dict(
        weights.read_checked(directory / "weights.safetensors", record["weights"])
    )
    layer.requires_grad_(False)
    layer.eval().to(session.device, memory_format=torch.channels_last)  # pyright: ignore
    scales = record["scales"] and weights.read_checked(directory / QUANTISER, record["scales"])
    return Frozen(layer, codec(recipe.cache.precision, scales or {}).to(session.device))


@contextmanager
def naming_rows(label: str, split: str, rows: np.ndarray, ids: np.ndarray) -> Iterator[None]:
    """Say of a NotFinite which row and sample it is, and what to do.

    Args:
        label: the level, e.g. ``x_2 train.v0``, of ``split``.
        rows: int64 (batch,), the level's rows that are being computed.
        ids: int64, the sample id of every row of the level.
    """
    try:
        yield
    except NotFinite as error:
        row = int(rows[error.sample])
        error.add_note(f"{label}, row {row}, sample {ids[row]} of {split}")
        if math.isfinite(error.value):
            error.add_note("Set 'cache.precision' to float32")
        raise
