"""Levels as shuffled batches of (x, y), with nothing else of Strata around them.

    level = open_level("features/x_1-3c17fd871988/train.plain")
    with feed(level, batch=256, device="cuda") as batches:
        for epoch in range(10):
            for x, y in batches:
                ...

Every pass is an epoch in another order, which is a function of (seed, epoch) alone: not of the
number of threads, the tier or the loader. docs/feed.md has the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.delivery import LOADERS, Delivery
from strata.pipeline.feed.feed import Feed
from strata.pipeline.plan.memory import TIERS
from strata.pipeline.progress import Reporter
from strata.pipeline.run.device import GATHERERS, ReadOptions
from strata.stages.features.moments import Moments
from strata.stages.features.quantise import Codec, codec, needs_scales
from strata.store.level.level import Level
from strata.store.read.order import Mixing, generator, mixing

PART_VALUES = 4 << 20
"""Values that are counted together, in float32 16 MiB."""
WARN_SHARE = 0.01
"""Share of the pairs of a batch that lie in one block; more is worth a warning."""


class LevelFeed(Feed):
    """An iterable of batches (x, y) on a device. Every pass is the next epoch."""

    def __init__(
        self,
        levels: Level | Sequence[Level],
        *,
        batch: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        labels: np.ndarray | None = None,
        ids: bool = False,
        crop: int | None = None,
        stored: bool = False,
        rank: int = 0,
        ranks: int = 1,
        tier: str = "auto",
        loader: str = "native",
        threads: int = GATHERERS,
        report: Reporter | None = None,
    ) -> None:
        """
        Args:
            levels: of one x_j and split; with several views, sample i of epoch e is taken from
                view (e + offset_i) mod their number, so that views change from epoch to epoch.
            batch: rows of a batch, over all ranks.
            shuffle: False keeps the order of the level.
            drop_last: leave a last, smaller batch out.
            labels: int64 (rows,) or (rows, token), or float32 (rows,) or (rows, number), in the
                order of the level's rows; None: the level's own.
            ids: yield (x, y, ids) with the sample id of each row, int64.
            crop: cut a window of this side at a random place of each map, a new one in each epoch;
                of what is no map, None.
            stored: x as the level holds it (float16, codes, …), without making values of it.
            rank, ranks: which slice of every batch to deliver, of how many of equal size.
            tier: ``auto``, ``device``, ``memory`` or ``disk``; see ``plan/memory.py``.
            loader: ``native``, or ``ffcv`` (raw levels).
            report: is told the tier and its reason, and of a shuffle that is not good enough.

        Raises:
            ValueError: an argument that cannot be.
            BudgetError, LoaderError, LevelDamaged: as :class:`Delivery`.
        """
        views = [levels] if isinstance(levels, Level) else list(levels)
        level, self._views, self.device = views[0], len(views), torch.device(device)
        _check(level, batch, crop, rank, ranks)
        for name, given, there in (("tier", tier, TIERS), ("loader", loader, LOADERS)):
            if given not in there:
                raise ValueError(f"{name} is {given!r}; it may be {', '.join(there)}")
        known = _labels(level, labels), level.array("sample_id")
        options, report = ReadOptions(self.device, tier, loader, threads), report or Reporter()
        with report.task(f"reading {level.key.label}", len(views) * len(level), "rows") as tick:
            delivery = Delivery(views, options, tick=tick)
        codec = None if stored else codec_of(level, self.device)
        order = mixing(level.geometry), shuffle, seed, level.key.depth, batch, drop_last
        super().__init__(delivery, *known, *order, codec, crop or 0, rank, ranks)
        self._with_ids, self.choice = ids, delivery.choice
        report.say(f"{self.choice.tier}: {self.choice.reason}")
        if shuffle and self.mixing.same_block > WARN_SHARE:
            warnings.warn(shuffle_text(self.mixing), stacklevel=2)
        self._at, self._next = (0, 0), (0, 0)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The next epoch, or what is left of it after :meth:`load_state_dict`."""
        epoch, start = self._next
        self._at, self._next = (epoch, start), (epoch + 1, 0)
        for number, batch in enumerate(self.epoch(epoch, start), start + 1):
            self._at = (epoch, number)
            yield batch
        self._at = (epoch + 1, 0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch, from batch ``start`` on.

        Returns:
            Pairs (x, y), or triples (x, y, ids). x is float32: maps (B, C, H, W) with channels
            last, tokens (B, token, feature), …; for images uint8, and whatever else x_0 is; with
            ``stored`` the level's dtype. On a CPU, what is not converted is valid as long as it is
            held.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        view, crops = None, None
        if self._views > 1:
            view = view_of_epoch(self.seed, epoch, np.arange(self.samples), self._views)
        if self.crop:
            drawn = generator("feed crops", self.seed, epoch).random((self.samples, 2))
            room = np.array(self.delivery.geometry.sample[1:]) - self.crop + 1
            crops = (drawn * room).astype(np.int64)
        rows, lengths = self.mine(*self.order(epoch, start, view))
        made = self.read(rows, lengths, crops)
        if self.device.type == "cuda" and self.codec is None:  # a buffer that is written to again
            made = ((x.clone(), y) for x, y in made)
        if self._with_ids:
            ids = self.on_device(self.ids[rows.row]).split(lengths)
            return map(lambda batch, own: (*batch, own), made, ids)
        return made

    def state_dict(self) -> dict[str, Any]:
        """The feed's position: all that is needed to go on, whatever the threads were doing."""
        epoch, batch = self._at
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there with the next iteration. Raises ValueError if it is another feed's."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"the state has {name} {state[name]!r}; this feed has {value!r}")
        self._at = self._next = (state["epoch"], state["batch"])

    def _identity(self) -> dict[str, Any]:
        """All that the order depends on; the number of ranks is not among it."""
        return {
            "seed": self.seed,
            "size": self.batch,
            "rows": len(self.ids),
            "block": self.mixing.block if self.mixing.windows > 1 else 1,
        }


feed = LevelFeed
"""The class, where it is called like a function."""


def view_of_epoch(seed: int, epoch: int, ids: np.ndarray, views: int) -> np.ndarray:
    """Which of some views each sample of an epoch is taken from, (epoch + offset_i) mod their
    number: int64, shaped as ``ids``."""
    offsets = generator("view offset", seed).integers(0, views, int(ids.max(initial=0)) + 1)
    return (epoch + offsets[ids]) % views


def codec_of(level: Level, device: str | torch.device = "cpu") -> Codec | None:
    """The codec that makes values on a device of what a level holds; None for images."""
    if level.key.depth == 0:
        return None
    kind = level.geometry.precision
    names = ("scale", "zero") if needs_scales(kind) else ()
    tensors = {name: torch.from_numpy(level.array(name)) for name in names}
    return codec(kind, tensors, level.geometry.axis).to(torch.device(device))


def moments_of(level: Level) -> Callable[[int], Moments]:
    """A function from a shard's number to the moments of its channels. Threads may share it. It
    raises LevelDamaged if a row is not the one that was written; names file and row."""
    shape, codec = level.geometry, codec_of(level)
    rows = max(1, PART_VALUES // prod(shape.sample))

    def parts(shard: int) -> Iterator[Moments]:
        first, last = shape.shard_range(shard)
        for begin in range(first, last, rows):
            x = torch.from_numpy(level.read(begin, min(last, begin + rows)))
            if codec is not None:  # NCHW: they are counted channel by channel
                out = torch.empty(len(x), *shape.sample)
                x = codec.values(codec.unpacked(x, shape.features), out)
            yield Moments.of(x, shape.axis)

    return lambda shard: reduce(Moments.merged, parts(shard))


def shuffle_text(mixing: Mixing) -> str:
    """How good a shuffle is, in a sentence."""
    if mixing.windows == 1:
        return "exact shuffle"
    rows = mixing.rows // mixing.windows
    share = f"{100 * mixing.same_block:.2f} % of the pairs in a batch share a block"
    text = f"shuffle in blocks of {mixing.block} rows, {rows:,} rows at a time: {share}"
    if mixing.same_block > WARN_SHARE:
        text += f", more than {100 * WARN_SHARE:.0f} %. Smaller chunks, or raw levels, mix better"
    return text


def _labels(level: Level, given: np.ndarray | None) -> np.ndarray:
    """The label of every row, or labels of its tokens, int64; or numbers, float32."""
    labels = level.array("label") if given is None else np.asarray(given)
    labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64, copy=False)
    if labels.shape[:1] != (len(level),):
        raise ValueError(
            f"labels has shape {labels.shape}; {level.key.label} has {len(level)} rows"
        )
    return labels


def _check(level: Level, batch: int, crop: int | None, rank: int, ranks: int) -> None:
    """Raises ValueError with what was given and what could be."""
    if not 1 <= batch <= len(level):
        raise ValueError(f"batch is {batch}; {level.key.label} has {len(level):,} rows")
    if not 0 <= rank < ranks or batch % ranks:
        raise ValueError(f"rank {rank} of {ranks} cannot have a part of each batch of {batch}")
    if crop is None:
        return
    if not level.geometry.is_map:
        named = ", ".join(level.geometry.axes)
        raise ValueError(
            f"crop is {crop}; {level.key.label} is no map, but ({named}): leave it out"
        )
    side = min(level.geometry.sample[1:])
    if not 1 <= crop <= side:
        raise ValueError(f"crop is {crop}; maps of {level.key.label} have a side of {side}")
