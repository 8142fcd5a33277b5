"""Batches of (x_{j-1}, y) for one auxiliary problem, from levels or from images.

The order of an epoch, its draws and its views are pure functions of (seed, depth, epoch), so an
epoch can be taken up at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.features import Crops, features, level_draws
from strata.pipeline.feed.level_feed import shuffle_text
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.run.session import Session
from strata.stages.network.spec import scale_at
from strata.store.read.order import Mixing, batch_count, batches, mixing


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch sees of every sample: which level, and which draw. Arrays are by sample id."""

    view: np.ndarray
    """int64 (samples,): number of the view."""
    draws: Draws | None
    """Flip and offset, where the images are the base."""
    crops: np.ndarray | None
    """int64 (samples, 2): offsets in feature space, in pixels of x_depth; None: no crop."""


class MicroBatches:
    """Rows of a batch that are made a micro-batch at a time, when they are split."""

    def __init__(self, made: Iterator[Tensor], rows: int) -> None:
        """
        Args:
            rows: of every micro-batch but the last.
        """
        self._made, self._rows = made, rows

    def split(self, rows: int) -> Iterator[Tensor]:
        """Float (b, C, H, W), one after another, as a tensor's ``split`` gives them."""
        assert rows == self._rows, "the feed and the schedule divide batches alike"
        return self._made


def _pieces(part: np.ndarray, accumulate: int) -> list[np.ndarray]:
    micro = -(-len(part) // accumulate)
    return [part[at : at + micro] for at in range(0, len(part), micro)]


class ProblemFeed:
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
        cached = cached and (self._mode != "fresh" or not augmented)
        self.features = features(session, depth, "train", cached=cached, clean=not augmented)
        self.mixing = self._mixing()
        self.batch = self.recipe.schedule.batch
        self.batches = max(1, batch_count(len(self.ids), self.batch, drop_last=True))
        self.delivery = self.features.delivery(self._names if augmented else ())
        choice = self.delivery.choice
        session.report.say(f"{choice.reason}: from {choice.tier}, {shuffle_text(self.mixing)}")

    def __enter__(self) -> ProblemFeed:
        return self

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
        """As :meth:`epoch`, but x is made while it is split, a micro-batch at a time: no more than
        one is on the device. Split each once, before the next batch is asked for.

        Args:
            accumulate: micro-batches in a batch.
        """
        plan = self._plan(epoch)
        pieces = [_pieces(part, accumulate) for part in self._parts(epoch, start, plan)]
        pieces = [[self._mine(piece) for piece in some] for some in pieces]
        made = self._values([piece for some in pieces for piece in some], plan)
        for some in pieces:
            yield (
                MicroBatches(islice(made, len(some)), len(some[0])),
                self._labels(np.concatenate(some)),
            )

    def fixed(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows (ascending) under one and the same draw: un-augmented, or the
        first fixed view. A risk on them can be compared between epochs."""
        plan, parts = self._still(), batches(rows, self.batch, drop_last=False)
        return self._run([self._sorted(part, plan) for part in parts], plan)

    # ---- which level and which draw --------------------------------------------------------------

    @property
    def _names(self) -> tuple[str, ...]:
        return augmentation.train_views(self.recipe)

    def _mixing(self) -> Mixing:
        """By the recipe, whatever lies on disk: what a run sees does not depend on that. Where the
        profile is left open, it is as for packed levels: raw rows can be read in any order."""
        if self._mode == "fresh":
            return Mixing(len(self.ids))
        shape = self.session.geometry(self.depth, "train")
        profile = self.recipe.cache.profile
        return mixing(replace(shape, profile="lz4" if profile == "auto" else profile))

    def _plan(self, epoch: int) -> EpochPlan:
        if not self._augmented:
            return self._still()
        nothing = np.zeros(self.samples, np.int64)
        if self._mode == "fresh":
            # Layer 1 sees fresh draws in every mode: augmenting images costs next to nothing.
            draws = augmentation.epoch_draws(self.recipe, self.seed, epoch, self.samples)
            return EpochPlan(nothing, draws, None)
        if self._mode == "fixed":
            view = augmentation.view_of_epoch(self.recipe, self.seed, epoch, self.samples)
            return EpochPlan(view, self._level_draws(view), None)
        scale = scale_at(self.recipe.layers, self.depth)
        draws = augmentation.epoch_draws(self.recipe, self.seed, epoch, self.samples, scale)
        view = draws.flipped.astype(np.int64)
        return EpochPlan(view, self._level_draws(view), draws.offsets // scale)

    def _still(self) -> EpochPlan:
        nothing, centre = np.zeros(self.samples, np.int64), self._centre()
        if self._mode == "fresh":
            return EpochPlan(nothing, centre, None)
        scale = scale_at(self.recipe.layers, self.depth)
        crops = centre.offsets // scale if self._mode == "canvas" else None
        return EpochPlan(nothing, self._level_draws(nothing), crops)

    def _centre(self) -> Draws:
        return augmentation.centre_draws(self.recipe, self.samples)

    def _level_draws(self, view: np.ndarray) -> Draws | None:
        """Where the base is x_0: per sample, the draw that its view was made with."""
        if self.features.base > 0:
            return None
        drawn = [level_draws(self.recipe, self.seed, v, self.samples) for v in self._names]
        flipped, offsets = (
            np.stack([d.flipped for d in drawn]),
            np.stack([d.offsets for d in drawn]),
        )
        samples = np.arange(self.samples)
        return Draws(flipped[view, samples], offsets[view, samples] if offsets.size else offsets[0])

    # ---- batches --------------------------------------------------------------------------------

    def _parts(self, epoch: int, start: int, plan: EpochPlan) -> list[np.ndarray]:
        order = self.mixing.order(self.seed, self.depth, epoch)
        parts = batches(order, self.batch, drop_last=len(order) >= self.batch, start=start)
        return [self._sorted(part, plan) for part in parts]

    def _sorted(self, part: np.ndarray, plan: EpochPlan) -> np.ndarray:
        """In a batch, rows are sorted by view and then by row, wherever they come from."""
        return np.sort(plan.view[self.ids[part]] * len(self.ids) + part)

    def _mine(self, rows: np.ndarray) -> np.ndarray:
        """This rank's part, of the size of every other one's."""
        ranks = self.session.ranks
        return np.split(rows, ranks.count)[ranks.rank]

    def _run(self, parts: Sequence[np.ndarray], plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor]]:
        made = self._values(parts, plan)
        for part in parts:
            yield next(made), self._labels(part)

    def _labels(self, part: np.ndarray) -> Tensor:
        return torch.from_numpy(self.labels[part % len(self.ids)]).to(self.session.device)

    def _values(self, parts: Sequence[np.ndarray], plan: EpochPlan) -> Iterator[Tensor]:
        """x of each part. While it is used, nothing but it is held."""
        rows = len(self.ids)
        delivered = self.delivery.batches(
            parts if self.features.base else [part % rows for part in parts]
        )
        for part in parts:
            stored, ids = next(delivered), self.ids[part % rows]
            x = self.features.values(
                stored, plan.draws and plan.draws.of(ids), self._crops(plan, ids)
            )
            del stored
            x = x.to(torch.float32, memory_format=torch.channels_last)
            yield x
            del x

    def _crops(self, plan: EpochPlan, ids: np.ndarray) -> Crops | None:
        if plan.crops is None:
            return None
        offsets = torch.from_numpy(plan.crops[ids]).to(self.session.device)
        return Crops(offsets, self.recipe.augment.crop // scale_at(self.recipe.layers, self.depth))


def clean_batches(
    session: Session, depth: int, split: str = "test", *, cached: bool = True
) -> Iterator[Tensor]:
    """x_depth of the un-augmented images of a split as layer depth + 1 sees them, in row order,
    float32 on the device.

    In canvas mode a test image goes the same way as a training image: whole canvas, centre crop.
    """
    recipe = session.run.recipe
    ids = session.images()[split].array("sample_id")
    samples = int(ids.max()) + 1
    draws = level_draws(recipe, session.run.seed, "clean", samples)
    if depth == 0:
        draws = augmentation.centre_draws(recipe, samples)
    source = features(session, depth, split, cached=cached, clean=True)
    parts = batches(np.arange(len(ids)), recipe.cache.block, drop_last=False)
    scale = scale_at(recipe.layers, depth)
    with source.delivery(once=True) as delivery:
        for part, stored in zip(parts, delivery.batches(parts), strict=True):
            crops = None
            if depth > 0 and augmentation.mode(recipe) == "canvas":
                offsets = torch.full((len(part), 2), recipe.centre // scale, device=stored.device)
                crops = Crops(offsets, recipe.augment.crop // scale)
            x = source.values(stored, draws.of(ids[part]), crops)
            yield x.to(torch.float32, memory_format=torch.channels_last)
