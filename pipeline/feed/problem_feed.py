"""Batches of (x_{j-1}, y) for one auxiliary problem, from levels or from images.

The order of an epoch, its draws and its views are pure functions of (seed, depth, epoch), so an
epoch can be taken up at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from strata.pipeline.feed.features import features, level_draws
from strata.pipeline.feed.feed import Feed
from strata.pipeline.feed.level_feed import shuffle_text, view_of_epoch
from strata.pipeline.plan.costs import level_geometry
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.run.session import Session
from strata.stages.data import augment
from strata.stages.features.quantise import memory_format
from strata.stages.network.blocks import scale_at
from strata.stages.network.spec import LayerSpec
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
    images: Draws
    """Flip and offset of the images that x_depth is made of."""


class MicroBatches:
    """Rows of a batch that are made a micro-batch at a time, when they are split."""

    def __init__(self, made: Iterator[Tensor], rows: int) -> None:
        self._made, self._rows = made, rows

    def split(self, rows: int) -> Iterator[Tensor]:
        """Float (b, …), one after another, as a tensor's ``split`` gives them."""
        assert rows == self._rows, "the feed and the schedule divide batches alike"
        return self._made


class ProblemFeed(Feed):
    """Batches for layer depth + 1."""

    def __init__(
        self,
        session: Session,
        depth: int,
        split: str = "train",
        *,
        cached: bool = True,
        augmented: bool = True,
        once: bool = False,
        dtype: torch.dtype = torch.float32,
        context: int | None = None,
    ) -> None:
        """
        Args:
            depth: of the features; the problem is that of layer depth + 1.
            cached: False computes x_depth from the images in every batch.
            augmented: False gives the un-augmented images in every epoch.
            once: every row is read once, in order.
            dtype: of x; see :func:`feed_of`.
            context: depth of features, of the same draw, that are x's last channels, averaged to
                the size of x_depth; None: there are none.
        """
        recipe = self._recipe = session.run.recipe
        self._augmented, images = augmented, session.images()[split]
        self._mode = "fresh" if depth == 0 else augmentation.mode(recipe)
        if self._mode == "fixed" and not augmented:
            self._mode = "fresh"
        from_images = not cached or (self._mode == "fresh" and augmented)
        base = 0 if from_images else None
        self.features = features(session, depth, split, base=base, clean=not augmented)
        # By the recipe, whatever lies on disk: what a run sees does not depend on that. Where the
        # profile is left open, it is as for packed levels: raw rows can be read in any order.
        mixed = Mixing(len(images))
        if self._mode != "fresh":
            shape, profile = session.geometry(depth, split), recipe.cache.profile
            mixed = mixing(replace(shape, profile="lz4" if profile == "auto" else profile))
        self._scale = scale_at(recipe.layers, depth)
        self._axis = level_geometry(recipe, depth, 1).axis
        self._views = augmentation.train_views(recipe)
        delivery = self.features.delivery(self._views if augmented else (), once=once)
        known, batch = (images.array("label"), images.array("sample_id")), recipe.schedule.batch
        # What is not x_depth as it is read has no codec here.
        codec = None if self.features.layers else self.features.stored
        order = mixed, True, session.run.seed, depth, batch, len(images) >= batch
        crop, ranks = recipe.augment.crop // self._scale, session.ranks
        super().__init__(delivery, *known, *order, codec, crop, ranks.rank, ranks.count, dtype)
        self.batches = len(self)
        self._context: ProblemFeed | None = None
        if context is not None:
            self._context = ProblemFeed(
                session, context, split, cached=cached, augmented=augmented, once=once, dtype=dtype
            )
        choice = delivery.choice
        if not once:
            session.report.say(f"{choice.reason}: from {choice.tier}, {shuffle_text(mixed)}")

    def close(self) -> None:
        super().close()
        if self._context is not None:
            self._context.close()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches, from batch ``start``: x float, for example (B, C, H, W), or x_0's
        integers, and y int64 (B,) or (B, token); of several ranks, every one has its part of each.

        The last, smaller batch is left out, unless it is the only one.
        """
        plan = self._plan(epoch)
        rows, lengths = self.mine(*self._order(epoch, start, plan))
        return self._made(rows, lengths, plan)

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
        rows, flat = self.mine(rows, [piece for some in pieces for piece in some])
        made = map(itemgetter(0), self._made(rows, flat, plan))
        left = iter(flat)
        own = [list(islice(left, len(some))) for some in pieces]
        labels = self.on_device(self.labels[rows.row]).split([sum(some) for some in own])
        for some, y in zip(own, labels, strict=True):
            yield MicroBatches(islice(made, len(some)), some[0]), y

    def fixed(self, rows: np.ndarray, batch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows (ascending) under one and the same draw: un-augmented, or the
        first fixed view. A risk on them can be compared between epochs."""
        return self._made(Rows.of(rows), cut(len(rows), batch or self.batch), self._still())

    def _order(self, epoch: int, start: int, plan: EpochPlan) -> tuple[Rows, list[int]]:
        """The batches of an epoch: in each, rows are sorted by view and then by row, wherever they
        come from."""
        rows, lengths = self.order(epoch, start, plan.view)
        if plan.view is not None:
            batch = np.repeat(np.arange(len(lengths)), lengths)
            rows = rows[np.lexsort((rows.view, batch))]
        return rows, lengths

    def _plan(self, epoch: int) -> EpochPlan:
        if not self._augmented:
            return self._still()
        samples = self.samples
        if self._mode == "fixed":
            view = view_of_epoch(self.seed, epoch, np.arange(samples), len(self._views))
            return EpochPlan(view, self._level_draws(view), None, self._view_draws(view))
        scale = 1 if self._mode == "fresh" else self._scale
        draws = augmentation.epoch_draws(self._recipe, self.seed, epoch, samples, scale)
        if self._mode == "fresh":
            # Layer 1 sees fresh draws in every mode: augmenting images costs next to nothing.
            return EpochPlan(None, draws, None, draws)
        view = draws.flipped.astype(np.int64)
        return EpochPlan(view, self._level_draws(view), draws.offsets // scale, draws)

    def _still(self) -> EpochPlan:
        """The plan of un-augmented images, or of the first fixed view."""
        centre = augmentation.centre_draws(self._recipe, self.samples)
        if self._mode == "fresh":
            return EpochPlan(None, centre, None, centre)
        first = np.zeros(self.samples, np.int64)
        if self._mode == "canvas":
            crops = centre.offsets // self._scale
            return EpochPlan(None, self._level_draws(first), crops, centre)
        return EpochPlan(None, self._level_draws(first), None, self._view_draws(first))

    def _level_draws(self, view: np.ndarray) -> Draws | None:
        """Per sample, the draw that its view was made with; None where levels are read."""
        return None if self.features.base > 0 else self._view_draws(view)

    def _view_draws(self, view: np.ndarray) -> Draws:
        """Per sample, the draw of its view."""
        samples = np.arange(self.samples)
        drawn = [level_draws(self._recipe, self.seed, v, len(samples)) for v in self._views]
        flipped = np.stack([draws.flipped for draws in drawn])
        offsets = np.stack([draws.offsets for draws in drawn])
        offsets = offsets[view, samples] if offsets.size else offsets[0]
        seeds = [draws.seeds for draws in drawn if draws.seeds is not None]
        own = np.stack(seeds)[view, samples] if seeds else None
        return Draws(flipped[view, samples], offsets, own)

    def _made(
        self, rows: Rows, lengths: list[int], plan: EpochPlan
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """x_depth of some rows as batches, laid out as ``quantise.memory_format`` says, with
        labels: read, or computed from the images or from the level below. While it is used, nothing
        but it is held."""
        made = self._alone(rows, lengths, plan)
        if self._context is None:
            return made
        return _beside(made, self._context._alone(rows, lengths, self._context._same(plan)))

    def _same(self, plan: EpochPlan) -> EpochPlan:
        """The plan of features above these, for these: the same images, flipped and cut alike."""
        if self._mode == "fresh":
            return EpochPlan(None, plan.images, None, plan.images)
        view = np.zeros(self.samples, np.int64) if plan.view is None else plan.view
        crops = None if plan.crops is None else plan.images.offsets // self._scale
        return replace(plan, draws=self._level_draws(view), crops=crops)

    def _alone(
        self, rows: Rows, lengths: list[int], plan: EpochPlan
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of x_depth and nothing beside it."""
        if self.codec is not None:
            return self.read(rows, lengths, plan.crops)
        found = self.read(rows if self.features.base else Rows.of(rows.row), lengths)
        return self._computed(rows, lengths, plan, found)

    def _computed(
        self,
        rows: Rows,
        lengths: list[int],
        plan: EpochPlan,
        found: Iterator[tuple[Tensor, Tensor]],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        end = 0
        for length in lengths:
            begin, end = end, end + length
            ids, (stored, y) = self.ids[rows.row[begin:end]], next(found)
            x = self.features.values(stored, plan.draws and plan.draws.of(ids))
            del stored
            if plan.crops is not None:
                x = augment.crop(x, self.on_device(plan.crops[ids]), self.crop)
            form = memory_format(x, self._axis)
            x = x.to(self.dtype if x.is_floating_point() else x.dtype, memory_format=form)
            yield x.contiguous(memory_format=form), y
            del x


def _beside(
    made: Iterator[tuple[Tensor, Tensor]], context: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with those of the context as last channels."""
    for x, y in made:
        seen = adaptive_avg_pool2d(next(context)[0], (x.shape[-2], x.shape[-1])).to(x.dtype)
        yield torch.cat([x, seen], 1).contiguous(memory_format=torch.channels_last), y


def feed_of(session: Session, j: int, *, cached: bool = True) -> ProblemFeed:
    """What layer j is trained from; ``cached`` as of :class:`ProblemFeed`.

    x is in the dtype of the layer's convolutions, if it begins with one, so that nothing is rounded
    that would not be at once. A block of a named network, or a classifier, may add x to something
    or average it first, and gets float32.
    """
    recipe = session.run.recipe
    convolves = j <= len(recipe.layers) and isinstance(recipe.layers[j - 1], LayerSpec)
    dtype = session.compute if convolves else torch.float32
    return ProblemFeed(session, j - 1, cached=cached, dtype=dtype, context=recipe.context_of(j))


def clean_batches(
    session: Session,
    depth: int,
    split: str = "test",
    *,
    cached: bool = True,
    context: int | None = None,
) -> Iterator[Tensor]:
    """x_depth of the un-augmented images of a split as layer depth + 1 sees them, in row order,
    float32 on the device; ``context`` as of :class:`ProblemFeed`.

    In canvas mode a test image goes the same way as a training image: whole canvas, centre crop.
    """
    how: Any = {"cached": cached, "augmented": False, "once": True, "context": context}
    with ProblemFeed(session, depth, split, **how) as feed:
        rows = np.arange(len(feed.ids))
        yield from map(itemgetter(0), feed.fixed(rows, session.run.recipe.cache.block))
