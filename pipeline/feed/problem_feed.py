"""Batches of (x_{j-1}, y) for one auxiliary problem, from levels or from images.

The order of an epoch, its draws and its views are pure functions of (seed, depth, epoch), so an
epoch can be taken up at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.features import Crops, features, level_draws
from strata.pipeline.feed.level_feed import shuffle_text, view_of_epoch
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.run.session import Session
from strata.stages.network.blocks import scale_at
from strata.store.read.order import Mixing, batch_count, batches, mixing


@dataclass(frozen=True)
class EpochPlan:
    """The level and the draw of every sample in an epoch. Arrays are by sample id."""

    view: np.ndarray
    """int64 (samples,): number of the view."""
    draws: Draws | None
    """Flip and offset, where the images are the base."""
    crops: np.ndarray | None
    """int64 (samples, 2): offsets in feature space, in pixels of x_depth; None: no crop."""


class MicroBatches:
    """Rows of a batch that are made a micro-batch at a time, when they are split."""

    def __init__(self, made: Iterator[Tensor], rows: int) -> None:
        self._made, self._rows = made, rows

    def split(self, rows: int) -> Iterator[Tensor]:
        """Float (b, C, H, W), one after another, as a tensor's ``split`` gives them."""
        assert rows == self._rows, "the feed and the schedule divide batches alike"
        return self._made


class ProblemFeed(AbstractContextManager["ProblemFeed"]):
    """Batches for layer depth + 1. Close it, or use it in a with statement."""

    def __init__(
        self, session: Session, depth: int, *, cached: bool = True, augmented: bool = True
    ) -> None:
        """
        Args:
            depth: of the features; the problem is that of layer depth + 1.
            cached: False computes x_depth from the images in every batch.
            augmented: False gives the un-augmented images in every epoch.
        """
        self.session, self.depth = session, depth
        self.recipe, self.seed = session.run.recipe, session.run.seed
        images = session.images()["train"]
        self.labels, self.ids = images.array("labels"), images.array("sample_id")
        self.samples = int(self.ids.max()) + 1
        self._augmented = augmented
        self._mode = "fresh" if depth == 0 else augmentation.mode(self.recipe)
        if self._mode == "fixed" and not augmented:
            self._mode = "fresh"
        from_images = not cached or (self._mode == "fresh" and augmented)
        base = 0 if from_images else None
        self.features = features(session, depth, "train", base=base, clean=not augmented)
        # By the recipe, whatever lies on disk: what a run sees does not depend on that. Where the
        # profile is left open, it is as for packed levels: raw rows can be read in any order.
        self.mixing = Mixing(len(self.ids))
        if self._mode != "fresh":
            shape, profile = session.geometry(depth, "train"), self.recipe.cache.profile
            self.mixing = mixing(replace(shape, profile="lz4" if profile == "auto" else profile))
        self._scale = scale_at(self.recipe.layers, depth)
        self._views = augmentation.train_views(self.recipe)
        self.batch = self.recipe.schedule.batch
        self.batches = max(1, batch_count(len(self.ids), self.batch, drop_last=True))
        self.delivery = self.features.delivery(self._views if augmented else ())
        choice = self.delivery.choice
        session.report.say(f"{choice.reason}: from {choice.tier}, {shuffle_text(self.mixing)}")

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.delivery.close()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches, from batch ``start``: x float (B, C, H, W) and y int64 (B,); of several
        ranks, every one has its part of each.

        The last, smaller batch is left out, unless it is the only one.
        """
        plan = self._plan(epoch)
        return self._run([self._mine(part) for part in self._parts(epoch, start, plan)], plan)

    def epoch_in_parts(
        self, epoch: int, start: int, accumulate: int
    ) -> Iterator[tuple[MicroBatches, Tensor]]:
        """Batches as :meth:`epoch` gives them, but x is made while it is split, a micro-batch at a
        time: no more than one is on the device. Split each once, before the next is asked for.

        Args:
            accumulate: micro-batches in a batch.
        """
        plan, pieces = self._plan(epoch), []
        for part in self._parts(epoch, start, plan):
            micro = -(-len(part) // accumulate)
            pieces.append([self._mine(part[at : at + micro]) for at in range(0, len(part), micro)])
        made = self._values([piece for some in pieces for piece in some], plan)
        for some in pieces:
            x = MicroBatches(islice(made, len(some)), len(some[0]))
            yield x, self._labels(np.concatenate(some))

    def fixed(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows (ascending) under one and the same draw: un-augmented, or the
        first fixed view. A risk on them can be compared between epochs."""
        plan, parts = self._still(), batches(rows, self.batch, drop_last=False)
        return self._run([self._sorted(part, plan) for part in parts], plan)

    def _plan(self, epoch: int) -> EpochPlan:
        if not self._augmented:
            return self._still()
        if self._mode == "fixed":
            ids = np.arange(self.samples)
            view = view_of_epoch(self.seed, epoch, ids, len(self._views))
            return EpochPlan(view, self._level_draws(view), None)
        scale = 1 if self._mode == "fresh" else self._scale
        draws = augmentation.epoch_draws(self.recipe, self.seed, epoch, self.samples, scale)
        if self._mode == "fresh":
            # Layer 1 sees fresh draws in every mode: augmenting images costs next to nothing.
            return EpochPlan(np.zeros(self.samples, np.int64), draws, None)
        view = draws.flipped.astype(np.int64)
        return EpochPlan(view, self._level_draws(view), draws.offsets // scale)

    def _still(self) -> EpochPlan:
        """The plan of un-augmented images, or of the first fixed view."""
        first = np.zeros(self.samples, np.int64)
        centre = augmentation.centre_draws(self.recipe, self.samples)
        if self._mode == "fresh":
            return EpochPlan(first, centre, None)
        crops = centre.offsets // self._scale if self._mode == "canvas" else None
        return EpochPlan(first, self._level_draws(first), crops)

    def _level_draws(self, view: np.ndarray) -> Draws | None:
        """Per sample, the draw that its view was made with; None where levels are read."""
        if self.features.base > 0:
            return None
        drawn = [level_draws(self.recipe, self.seed, v, self.samples) for v in self._views]
        flipped = np.stack([draws.flipped for draws in drawn])
        offsets = np.stack([draws.offsets for draws in drawn])
        samples = np.arange(self.samples)
        return Draws(flipped[view, samples], offsets[view, samples] if offsets.size else offsets[0])

    def _parts(self, epoch: int, start: int, plan: EpochPlan) -> list[np.ndarray]:
        order = self.mixing.order(self.seed, self.depth, epoch)
        parts = batches(order, self.batch, drop_last=len(order) >= self.batch, start=start)
        return [self._sorted(part, plan) for part in parts]

    def _sorted(self, part: np.ndarray, plan: EpochPlan) -> np.ndarray:
        """Numbers of some rows over all views, view · rows + row, ascending: in a batch, rows are
        sorted by view and then by row, wherever they come from."""
        return np.sort(plan.view[self.ids[part]] * len(self.ids) + part)

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        """The row that each number over all views is of."""
        return numbers % len(self.ids)

    def _mine(self, rows: np.ndarray) -> np.ndarray:
        """This rank's part, of the size of every other one's."""
        ranks = self.session.ranks
        return np.split(rows, ranks.count)[ranks.rank]

    def _run(self, parts: Sequence[np.ndarray], plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor]]:
        made = self._values(parts, plan)
        for part in parts:
            yield next(made), self._labels(part)

    def _labels(self, part: np.ndarray) -> Tensor:
        return torch.from_numpy(self.labels[self._rows(part)]).to(self.session.device)

    def _values(self, parts: Sequence[np.ndarray], plan: EpochPlan) -> Iterator[Tensor]:
        """x of each part. While it is used, nothing but it is held."""
        numbers = parts if self.features.base else [self._rows(part) for part in parts]
        delivered, side = self.delivery.batches(numbers), self.recipe.augment.crop // self._scale
        for part in parts:
            stored, ids, crops = next(delivered), self.ids[self._rows(part)], None
            if plan.crops is not None:
                crops = Crops(torch.from_numpy(plan.crops[ids]).to(self.session.device), side)
            x = self.features.values(stored, plan.draws and plan.draws.of(ids), crops)
            del stored, crops
            x = x.to(torch.float32, memory_format=torch.channels_last)
            yield x
            del x


def clean_batches(
    session: Session, depth: int, split: str = "test", *, cached: bool = True
) -> Iterator[Tensor]:
    """x_depth of the un-augmented images of a split as layer depth + 1 sees them, in row order,
    float32 on the device.

    In canvas mode a test image goes the same way as a training image: whole canvas, centre crop.
    """
    recipe, scale = session.run.recipe, scale_at(session.run.recipe.layers, depth)
    ids = session.images()[split].array("sample_id")
    samples = int(ids.max()) + 1
    draws = level_draws(recipe, session.run.seed, "clean", samples)
    if depth == 0:
        draws = augmentation.centre_draws(recipe, samples)
    source = features(session, depth, split, base=None if cached else 0, clean=True)
    parts = batches(np.arange(len(ids)), recipe.cache.block, drop_last=False)
    with source.delivery(once=True) as delivery:
        for part, stored in zip(parts, delivery.batches(parts), strict=True):
            crops = None
            if depth > 0 and augmentation.mode(recipe) == "canvas":
                offsets = torch.full((len(part), 2), recipe.centre // scale, device=stored.device)
                crops = Crops(offsets, recipe.augment.crop // scale)
            x = source.values(stored, draws.of(ids[part]), crops)
            yield x.to(torch.float32, memory_format=torch.channels_last)
