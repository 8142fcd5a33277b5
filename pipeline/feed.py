"""From levels to shuffled batches on the device, for one auxiliary problem.

The order of an epoch, its draws and its views are pure functions of (seed, depth, epoch), so an
epoch can be taken up at any batch. A thread gathers the rows of the next batches meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline import device, ingest, views
from pipeline.progress import size
from pipeline.session import READ_THREADS, Session
from pipeline.source import Features, features, level_draws
from pipeline.views import Draws
from stages.augment import crop
from stages.spec import scale_at
from store.order import batch_count, batches, epoch_order

AHEAD = 3
"""Batches gathered ahead of the one in use."""
SHARE = 0.5
"""Of the free memory, for unpacked levels."""


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch sees of every sample: which level, and which draw."""

    names: tuple[str, ...]
    """Views, by number."""
    view: np.ndarray
    """int64 (samples,): number of the view of each sample."""
    draws: dict[str, Draws]
    """Per view: draws for images, where x_0 is the base."""
    crops: np.ndarray | None
    """int64 (samples, 2): offsets in feature space, in pixels of x_depth; None: no crop."""


class Feed:
    """Batches of (x_{j-1}, y) for layer j. Close it, or use it in a with statement."""

    def __init__(self, session: Session, depth: int, *, cached: bool = True) -> None:
        """
        Args:
            depth: of the features; the problem is that of layer depth + 1.
            cached: False computes x_depth from the images in every batch.
        """
        self.session, self.depth = session, depth
        self.recipe, self.seed = session.run.recipe, session.run.seed
        images = ingest.levels(session)["train"]
        self.labels, self.ids = images.array("labels"), images.array("sample_id")
        self.samples = int(self.ids.max()) + 1
        mode = views.mode(self.recipe)
        self.features = in_memory(
            session, features(session, depth, "train", cached=cached and mode != "fresh")
        )
        self.batch = self.recipe.schedule.batch
        self.batches = max(1, batch_count(len(self.ids), self.batch, drop_last=True))
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="feed")

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches, from batch ``start``: x float (B, C, H, W) and y int64 (B,).

        The last, smaller batch is left out, unless it is the only one.
        """
        order = epoch_order(len(self.ids), self.seed, self.depth, epoch)
        parts = batches(order, self.batch, drop_last=len(order) >= self.batch, start=start)
        yield from self._run(parts, self._plan(epoch))

    def fixed(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given rows (ascending) under one and the same draw: un-augmented, or the
        first fixed view. A risk on them can be compared between epochs."""
        yield from self._run(batches(rows, self.batch, drop_last=False), self._still())

    # ---- which level and which draw --------------------------------------------------------------

    def _plan(self, epoch: int) -> EpochPlan:
        mode = views.mode(self.recipe)
        if mode == "fresh" or self.depth == 0:
            # Layer 1 sees fresh draws in every mode: augmenting images costs next to nothing.
            return self._one_view(
                "fresh", views.epoch_draws(self.recipe, self.seed, epoch, self.samples)
            )
        if mode == "fixed":
            view = views.view_of_epoch(self.recipe, self.seed, epoch, self.samples)
            return EpochPlan(self._names, view, self._level_draws(), None)
        scale = scale_at(self.recipe.layers, self.depth)
        draws = views.epoch_draws(self.recipe, self.seed, epoch, self.samples, scale)
        return EpochPlan(
            self._names, draws.flipped.astype(np.int64), self._level_draws(), draws.offsets // scale
        )

    def _still(self) -> EpochPlan:
        centre = views.centre_draws(self.recipe, self.samples)
        mode = views.mode(self.recipe)
        if mode == "fresh" or self.depth == 0:
            return self._one_view("fresh", centre)
        nothing = np.zeros(self.samples, np.int64)
        crops = (
            centre.offsets // scale_at(self.recipe.layers, self.depth) if mode == "canvas" else None
        )
        return EpochPlan(self._names, nothing, self._level_draws(), crops)

    def _one_view(self, name: str, draws: Draws) -> EpochPlan:
        return EpochPlan((name,), np.zeros(self.samples, np.int64), {name: draws}, None)

    @property
    def _names(self) -> tuple[str, ...]:
        return views.train_views(self.recipe)

    def _level_draws(self) -> dict[str, Draws]:
        if self.features.base > 0:
            return {}
        return {v: level_draws(self.recipe, self.seed, v, self.samples) for v in self._names}

    # ---- batches -------------------------------------------------------------------------------

    def _run(self, parts: list[np.ndarray], plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: deque[Future[list[tuple[str, np.ndarray, np.ndarray]]]] = deque()
        coming = iter(parts)
        try:
            for _ in parts:
                while len(waiting) < AHEAD and (rows := next(coming, None)) is not None:
                    waiting.append(self._pool.submit(self._read, rows, plan))
                yield self._batch(waiting.popleft().result(), plan)
        finally:
            for future in waiting:
                future.cancel()

    def _read(self, rows: np.ndarray, plan: EpochPlan) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Host part: (view, rows, stored values) for each view that the batch uses."""
        used = plan.view[self.ids[rows]]
        parts = []
        for number, name in enumerate(plan.names):
            chosen = rows[used == number]
            if len(chosen):
                parts.append((name, chosen, self.features.read(chosen, name)))
        return parts

    def _batch(
        self, parts: list[tuple[str, np.ndarray, np.ndarray]], plan: EpochPlan
    ) -> tuple[Tensor, Tensor]:
        """Device part: the batch, views one after another."""
        x = torch.cat([self._part(name, rows, stored, plan) for name, rows, stored in parts])
        rows = np.concatenate([rows for _, rows, _ in parts])
        if plan.crops is not None:
            offsets = torch.from_numpy(plan.crops[self.ids[rows]]).to(x.device)
            side = self.recipe.augment.crop // scale_at(self.recipe.layers, self.depth)
            x = crop(x, offsets, side)
        y = torch.from_numpy(self.labels[rows]).to(x.device)
        return x.to(torch.float32, memory_format=torch.channels_last), y

    def _part(self, name: str, rows: np.ndarray, stored: np.ndarray, plan: EpochPlan) -> Tensor:
        draws = plan.draws.get(name)
        return self.features.compute_from(stored, draws and draws.of(self.ids[rows]))


def in_memory(session: Session, found: Features) -> Features:
    """Packed levels decoded once, if they fit: a row of theirs costs a whole chunk to decode."""
    packed = {v: level for v, level in found.levels.items() if level.geometry.profile != "raw"}
    needed = sum(len(level) * level.geometry.row_bytes for level in packed.values())
    free = device.available_memory()
    if needed > SHARE * free:
        session.report.say(
            f"x_{found.base} is packed; unpacked it takes {size(needed)}, too much for the "
            f"{size(free)} of free memory: every row decodes a whole chunk. Raw would be faster"
        )
        return found
    loaded = {view: level.load() for view, level in packed.items()}
    return replace(found, levels={**found.levels, **loaded})


def clean_batches(session: Session, depth: int, *, cached: bool = True) -> Iterator[Tensor]:
    """x_depth of the test images as layer depth + 1 sees them, in row order, float32 on the device.

    In canvas mode a test image goes the same way as a training image: whole canvas, centre crop.
    """
    recipe = session.run.recipe
    images = ingest.levels(session)["test"]
    source = features(session, depth, "test", cached=cached)
    ids = images.array("sample_id")
    samples = int(ids.max()) + 1
    canvas = views.mode(recipe) == "canvas" and depth > 0
    draws = level_draws(recipe, session.run.seed, "clean", samples)
    if depth == 0:
        draws = views.centre_draws(recipe, samples)
    scale = scale_at(recipe.layers, depth)
    for rows in batches(np.arange(len(ids)), recipe.cache.block, drop_last=False):
        x = source.compute_from(source.read(rows, "clean"), draws.of(ids[rows]))
        if canvas:
            offsets = torch.full((len(x), 2), recipe.centre // scale, device=x.device)
            x = crop(x, offsets, recipe.augment.crop // scale)
        yield x.to(torch.float32, memory_format=torch.channels_last)
