"""Batches of (x_{j-1}, y) for one auxiliary problem, from levels or from images.

The order of an epoch, its draws and its views are pure functions of (seed, depth, epoch), so an
epoch can be taken up at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.delivery import Delivery
from strata.pipeline.feed.features import Features, features, level_draws
from strata.pipeline.feed.feed import Feed
from strata.pipeline.feed.level_feed import shuffle_text, view_of_epoch
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.run.session import Session
from strata.stages.data import augment
from strata.stages.network.blocks import scale_at
from strata.store.level.level import Level
from strata.store.read.order import Mixing, cut, mixing
from strata.store.read.rows import Rows


@dataclass(frozen=True)
class EpochPlan:
    """The level and the draw of every sample in an epoch. Arrays are by sample id."""

    view: np.ndarray | None
    """int64 (samples,): number of the view; None: there is only one."""
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
        self._recipe, self.seed = session.run.recipe, session.run.seed
        self._augmented, images = augmented, session.images()["train"]
        self._mode = "fresh" if depth == 0 else augmentation.mode(self._recipe)
        if self._mode == "fixed" and not augmented:
            self._mode = "fresh"
        from_images = not cached or (self._mode == "fresh" and augmented)
        base = 0 if from_images else None
        self.features = features(session, depth, "train", base=base, clean=not augmented)
        # By the recipe, whatever lies on disk: what a run sees does not depend on that. Where the
        # profile is left open, it is as for packed levels: raw rows can be read in any order.
        self.mixing = Mixing(len(images))
        if self._mode != "fresh":
            shape, profile = session.geometry(depth, "train"), self._recipe.cache.profile
            self.mixing = mixing(replace(shape, profile="lz4" if profile == "auto" else profile))
        self._scale = scale_at(self._recipe.layers, depth)
        self._views = augmentation.train_views(self._recipe)
        self.batch = self._recipe.schedule.batch
        delivery = self.features.delivery(self._views if augmented else ())
        order = self.mixing, self.batch, len(images) >= self.batch
        self._feed = _feed(self.features, delivery, depth, images, *order)
        self.labels, self.ids = self._feed.labels, self._feed.ids
        self.batches = len(self._feed)
        choice = delivery.choice
        session.report.say(f"{choice.reason}: from {choice.tier}, {shuffle_text(self.mixing)}")

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._feed.delivery.close()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches, from batch ``start``: x float (B, C, H, W) and y int64 (B,); of several
        ranks, every one has its part of each.

        The last, smaller batch is left out, unless it is the only one.
        """
        plan = self._plan(epoch)
        rows, lengths = self._feed.mine(*self._order(epoch, start, plan))
        return _made(self.features, self._feed, rows, lengths, plan)

    def epoch_in_parts(
        self, epoch: int, start: int, accumulate: int
    ) -> Iterator[tuple[MicroBatches, Tensor]]:
        """Batches as :meth:`epoch` gives them, but x is made while it is split, a micro-batch at a
        time: no more than one is on the device. Split each once, before the next is asked for.

        Args:
            accumulate: micro-batches in a batch.
        """
        plan = self._plan(epoch)
        rows, lengths = self._order(epoch, start, plan)
        pieces = [cut(length, -(-length // accumulate)) for length in lengths]
        rows, flat = self._feed.mine(rows, [piece for some in pieces for piece in some])
        made = map(itemgetter(0), _made(self.features, self._feed, rows, flat, plan))
        left = iter(flat)
        own = [list(islice(left, len(some))) for some in pieces]
        labels = self._feed.on_device(self.labels[rows.row]).split([sum(some) for some in own])
        for some, y in zip(own, labels, strict=True):
            yield MicroBatches(islice(made, len(some)), some[0]), y

    def fixed(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows (ascending) under one and the same draw: un-augmented, or the
        first fixed view. A risk on them can be compared between epochs."""
        asked = Rows.of(rows), cut(len(rows), self.batch)
        return _made(self.features, self._feed, *asked, self._still())

    def _order(self, epoch: int, start: int, plan: EpochPlan) -> tuple[Rows, list[int]]:
        """The batches of an epoch: in each, rows are sorted by view and then by row, wherever they
        come from."""
        rows, lengths = self._feed.order(epoch, start, plan.view)
        if plan.view is not None:
            batch = np.repeat(np.arange(len(lengths)), lengths)
            rows = rows[np.lexsort((rows.view, batch))]
        return rows, lengths

    def _plan(self, epoch: int) -> EpochPlan:
        if not self._augmented:
            return self._still()
        samples = self._feed.samples
        if self._mode == "fixed":
            view = view_of_epoch(self.seed, epoch, np.arange(samples), len(self._views))
            return EpochPlan(view, self._level_draws(view), None)
        scale = 1 if self._mode == "fresh" else self._scale
        draws = augmentation.epoch_draws(self._recipe, self.seed, epoch, samples, scale)
        if self._mode == "fresh":
            # Layer 1 sees fresh draws in every mode: augmenting images costs next to nothing.
            return EpochPlan(None, draws, None)
        view = draws.flipped.astype(np.int64)
        return EpochPlan(view, self._level_draws(view), draws.offsets // scale)

    def _still(self) -> EpochPlan:
        """The plan of un-augmented images, or of the first fixed view."""
        centre = augmentation.centre_draws(self._recipe, self._feed.samples)
        if self._mode == "fresh":
            return EpochPlan(None, centre, None)
        crops = centre.offsets // self._scale if self._mode == "canvas" else None
        return EpochPlan(None, self._level_draws(np.zeros(self._feed.samples, np.int64)), crops)

    def _level_draws(self, view: np.ndarray) -> Draws | None:
        """Per sample, the draw that its view was made with; None where levels are read."""
        if self.features.base > 0:
            return None
        samples = np.arange(self._feed.samples)
        drawn = [level_draws(self._recipe, self.seed, v, len(samples)) for v in self._views]
        flipped = np.stack([draws.flipped for draws in drawn])
        offsets = np.stack([draws.offsets for draws in drawn])
        return Draws(flipped[view, samples], offsets[view, samples] if offsets.size else offsets[0])


def clean_batches(
    session: Session, depth: int, split: str = "test", *, cached: bool = True
) -> Iterator[Tensor]:
    """x_depth of the un-augmented images of a split as layer depth + 1 sees them, in row order,
    float32 on the device.

    In canvas mode a test image goes the same way as a training image: whole canvas, centre crop.
    """
    recipe, images = session.run.recipe, session.images()[split]
    source = features(session, depth, split, base=None if cached else 0, clean=True)
    with source.delivery(once=True) as delivery:
        feed = _feed(source, delivery, depth, images, None, recipe.cache.block, drop_last=False)
        draws = level_draws(recipe, session.run.seed, "clean", feed.samples)
        if depth == 0:
            draws = augmentation.centre_draws(recipe, feed.samples)
        crops = None
        if depth > 0 and augmentation.mode(recipe) == "canvas":
            centre = recipe.centre // scale_at(recipe.layers, depth)
            crops = np.full((feed.samples, 2), centre)
        plan = EpochPlan(None, draws, crops)
        yield from map(itemgetter(0), _made(source, feed, *feed.order(0), plan))


def _feed(
    source: Features,
    delivery: Delivery,
    depth: int,
    images: Level,
    mixing: Mixing | None,
    batch: int,
    drop_last: bool,
) -> Feed:
    """The rows of a source of x_depth. What is not x_depth as it is read has no codec here."""
    session = source.session
    recipe, seed, ranks = session.run.recipe, session.run.seed, session.ranks
    codec = None if source.layers else source.stored
    crop = recipe.augment.crop // scale_at(recipe.layers, depth)
    known, order = (images.array("labels"), images.array("sample_id")), (mixing, seed, depth)
    rank = ranks.rank, ranks.count
    return Feed(delivery, *known, *order, batch, drop_last, codec, crop, *rank)


def _made(
    source: Features, feed: Feed, rows: Rows, lengths: list[int], plan: EpochPlan
) -> Iterator[tuple[Tensor, Tensor]]:
    """x_depth of some rows as batches, float32 and channels last, with labels: read, or computed
    from the images or from the level below. While it is used, nothing but it is held."""
    if feed.codec is not None:
        return feed.batches(rows, lengths, plan.crops)
    read = feed.batches(rows if source.base else Rows.of(rows.row), lengths)
    return _computed(source, feed, rows, lengths, plan, read)


def _computed(
    source: Features,
    feed: Feed,
    rows: Rows,
    lengths: list[int],
    plan: EpochPlan,
    read: Iterator[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    end = 0
    for length in lengths:
        begin, end = end, end + length
        ids, (stored, y) = feed.ids[rows.row[begin:end]], next(read)
        x = source.values(stored, plan.draws and plan.draws.of(ids))
        del stored
        if plan.crops is not None:
            x = augment.crop(x, feed.on_device(plan.crops[ids]), feed.crop)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        yield x, y
        del x
