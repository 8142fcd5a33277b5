"""x_depth of one split as device tensors, by row: read from a level, or computed from one below.

Whether the values were cached or computed, they are the same; see stages/network/featurize.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from strata.pipeline.feed.delivery import Delivery
from strata.pipeline.feed.ffcv.rows import image_file
from strata.pipeline.feed.level_feed import codec_of
from strata.pipeline.plan.costs import level_geometry
from strata.pipeline.recipe import augmentation as views
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import weights
from strata.pipeline.run.rundir import QUANTISER, WEIGHTS, Run
from strata.pipeline.run.session import Session
from strata.stages.data import augment
from strata.stages.errors import NotFinite
from strata.stages.features.quantise import Codec, codec, needs_scales
from strata.stages.network.blocks import AnyLayer, Origin
from strata.stages.network.featurize import Frozen, featurize, placed
from strata.stages.network.network import build
from strata.store.errors import LevelAbsent
from strata.store.level.level import Level


@dataclass(frozen=True)
class Features:
    """A source of x_depth of one split: levels, and the layers above them."""

    session: Session
    levels: Mapping[str, Level]
    """The nearest levels below (or at) ``depth``, by view; x_0 has the one view ``clean``."""
    base: int
    """Depth of those levels."""
    stored: Codec | None
    """The codec of those levels, on the device; None where the base is x_0: images."""
    layers: Sequence[Frozen]
    """Frozen layers base + 1 … depth, on the device, in eval mode."""

    def delivery(self, views: Sequence[str] = (), *, once: bool = False) -> Delivery:
        """The base levels' rows on the device. Close it.

        Args:
            views: the levels to read, in this order, where there are several; none: the only one.
            once: every row is read once, in order.
        """
        session = self.session
        levels = [self.levels[name] for name in (views if self.base and views else self.levels)]
        images = image_file(session, levels[0]) if self.base == 0 else None
        rows = sum(len(level) for level in levels)
        with session.report.task(f"reading x_{self.base}", rows, "rows") as tick:
            return Delivery(levels, session.read_options, once=once, beton=images, tick=tick)

    def values(self, stored: Tensor, draws: Draws | None, *, encode: bool = False) -> Tensor:
        """x_depth of some rows, for example (B, C, H, W), decoded or rounded as it is stored, in
        float16, bfloat16 or float32; for x_0, normalised images.

        Args:
            stored: elements of the base level, on the device.
            draws: flip and offset of each row, used where the base is x_0.
            encode: give the form in which it is stored; there must be layers.
        """
        recipe, compute = self.session.run.recipe, self.session.compute
        if self.stored is not None:
            x = self.stored.decode(stored, next(iter(self.levels.values())).geometry.features)
        else:
            assert draws is not None
            x = image_views(recipe, stored, draws)
        block = recipe.cache.block
        return featurize(self.layers, x, block=block, compute=compute, encode=encode)


def image_views(recipe: Recipe, images: Tensor, draws: Draws) -> Tensor:
    """crop(flip(canvas), offset), transformed if the recipe says so, and normalised: float32
    (B, C, H, W) from uint8 images; what is no image as layer 1 sees it. Raises UnusableNetwork: the
    transform fails, or gives something else."""
    if recipe.data.shape:
        return augment.standardise(images, recipe.data.mean, recipe.data.std)
    flipped, offsets = (
        torch.from_numpy(drawn).to(images.device) for drawn in (draws.flipped, draws.offsets)
    )
    x = augment.flip(augment.pad(images, recipe.augment.pad), flipped)
    if len(offsets):
        x = augment.crop(x, offsets, recipe.augment.crop)
    if draws.seeds is not None and isinstance(own := recipe.augment.transform, Origin):
        x = augment.transformed(x, (own.name, own.code or "", own.folder), draws.seeds)
    return augment.normalise(x, recipe.data.mean, recipe.data.std)


def level_draws(recipe: Recipe, seed: int, view: str, samples: int) -> Draws:
    """The draws that make a cached level: of a fixed view, of a whole canvas, or of none."""
    whole = np.empty((0, 2), np.int64)
    if views.mode(recipe) == "canvas":
        return Draws(np.full(samples, view == "flipped"), whole)
    if view == "clean":
        return views.centre_draws(recipe, samples)
    return views.view_draws(recipe, seed, int(view.removeprefix("v")), samples)


def features(
    session: Session, depth: int, split: str, *, base: int | None = None, clean: bool = False
) -> Features:
    """x_depth of a split, from the levels of x_base.

    Args:
        base: 0 for the images; None: the nearest that is complete.
        clean: only of the un-augmented images.
    """
    at = nearest(session, depth, split, clean=clean) if base is None else base
    names = views.views_at(session.run.recipe, at, split, clean=clean)
    try:
        levels = {view: session.store.open(session.key(at, split, view)) for view in names}
    except LevelAbsent:
        if base is not None or not at:
            raise
        return features(session, depth, split, clean=clean)  # evicted meanwhile: the next nearest
    base = at
    layers = frozen_layers(session.run, range(base + 1, depth + 1), session.device)
    stored = codec_of(next(iter(levels.values())), session.device)  # all views have the same scales
    return Features(session, levels, base, stored, layers)


def nearest(session: Session, depth: int, split: str, *, clean: bool = False) -> int:
    """Depth of the nearest complete levels at or below ``depth``: 0 where there are only images."""
    for d in range(depth, 0, -1):
        names = views.views_at(session.run.recipe, d, split, clean=clean)
        states = [session.store.state(session.key(d, split, view)).state for view in names]
        if states and all(state == "complete" for state in states):
            return d
    return 0


def frozen_layer(run: Run, j: int, device: torch.device) -> Frozen:
    """Solved layer j on the device, in eval mode, and how x_j is stored. Raises as
    :func:`frozen_layers`."""
    return frozen_layers(run, [j], device)[0]


def frozen_layers(run: Run, those: Sequence[int], device: torch.device) -> list[Frozen]:
    """Solved layers, as :func:`frozen_layer` gives them. Their modules are made together: to make
    one block of a named network, the whole network is cut.

    Raises:
        LevelDamaged: weights or scales are not those that a layer's record speaks of.
    """
    made = build([run.recipe.layers[j - 1] for j in those], None)
    return [_frozen_layer(run, j, layer, device) for j, layer in zip(those, made, strict=True)]


def _frozen_layer(run: Run, j: int, layer: nn.Module, device: torch.device) -> Frozen:
    record, recipe, directory = run.layer(j), run.recipe, run.layer_directory(j)
    assert record is not None
    layer = _loaded(layer, weights.read_checked(directory / WEIGHTS, record["weights"]), device)
    scales: Mapping[str, Tensor] = {}
    if needs_scales(recipe.cache.precision):
        scales = weights.read_checked(directory / QUANTISER, record["scales"] or "none")
    before, after = (level_geometry(recipe, depth, 1).axis for depth in (j - 1, j))
    return Frozen(layer, codec(recipe.cache.precision, scales, after).to(device), before)


def read_layer(spec: AnyLayer, path: Path, digest: str, device: torch.device) -> nn.Module:
    """A frozen layer from the file of its weights. Raises LevelDamaged: these have another
    digest."""
    return frozen(spec, weights.read_checked(path, digest), device)


def frozen(spec: AnyLayer, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A layer of these weights, which are not copied, on the device, in eval mode."""
    return _loaded(build([spec], None)[0], state, device)


def _loaded(layer: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    layer.load_state_dict(state, assign=True)
    return placed(layer.requires_grad_(False).eval(), device)


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
