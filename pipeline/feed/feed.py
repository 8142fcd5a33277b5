"""Rows of one split as shuffled batches: their order, each rank's part of it, views, crops, values
and labels. ``strata.feed`` and the feed of a training problem are this, and what they draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.buffers import MapBuffers
from strata.pipeline.feed.delivery import Delivery
from strata.stages.data import augment
from strata.stages.features.quantise import Codec
from strata.store.read.order import Mixing, batch_count, batches
from strata.store.read.rows import Rows


@dataclass
class Feed:
    """Batches of the rows that a delivery reads. An epoch can be taken up at any batch: nothing but
    its number, the seed and the depth says what it is."""

    delivery: Delivery
    labels: np.ndarray
    """int64 (rows,)."""
    ids: np.ndarray
    """int64 (rows,), the sample id of every row."""
    mixing: Mixing | None
    """How rows are shuffled; None: not at all."""
    seed: int
    depth: int
    batch: int
    """Rows of a batch, over all ranks."""
    drop_last: bool
    """Leave a last, smaller batch out."""
    codec: Codec | None = None
    """Makes values of what is stored; None: x is what is stored."""
    crop: int = 0
    """Side of the window that is cut out where crops are given."""
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        self.samples = int(self.ids.max(initial=-1)) + 1
        """One more than the largest sample id."""
        # A GPU's allocator is as good.
        self._maps = MapBuffers() if self.delivery.device.type == "cpu" else None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return batch_count(len(self.ids), self.batch, drop_last=self.drop_last)

    def parts(self, epoch: int, start: int = 0, view: np.ndarray | None = None) -> list[Rows]:
        """The rows of every batch of an epoch, from batch ``start`` on, over all ranks, ascending.

        Args:
            view: as :meth:`rows`.
        """
        order = np.arange(len(self.ids))
        if self.mixing is not None:
            order = self.mixing.order(self.seed, self.depth, epoch)
        whole = batches(order, self.batch, drop_last=self.drop_last, start=start)
        rows = self.rows(np.concatenate([*whole, order[:0]]), view)
        ends = np.cumsum([len(part) for part in whole]).tolist()
        return [rows[end - len(part) : end] for part, end in zip(whole, ends, strict=True)]

    def rows(self, row: np.ndarray, view: np.ndarray | None) -> Rows:
        """Rows by number (int64), each in the view that its sample is taken from: int64 (samples,),
        by sample id; None: there is only one."""
        return Rows.of(row) if view is None else Rows(view[self.ids[row]], row)

    def mine(self, part: Rows) -> Rows:
        """This rank's part of a batch."""
        begin, end = (len(part) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return part[begin:end]

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.delivery.device)

    def batches(
        self, parts: Sequence[Rows], crops: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y of each part, on the device.

        Args:
            crops: int64 (samples, 2), by sample id: where the window of each map begins, (y, x);
                None: the whole map.

        Returns:
            x is (B, C, H, W): float32, channels last; without a codec as it is stored, and then as
            long valid as :meth:`Delivery.batches` says. y is int64 (B,). While they are used,
            nothing else is held.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        row, lengths = Rows.joined(parts).row, [len(part) for part in parts]
        y, windows = self.on_device(self.labels[row]).split(lengths), [None] * len(parts)
        if crops is not None:
            windows = self.on_device(crops[self.ids[row]]).split(lengths)
        delivered = self.delivery.batches(parts)
        for number in range(len(parts)):
            yield self._values(next(delivered), windows[number]), y[number]

    def _values(self, x: Tensor, window: Tensor | None) -> Tensor:
        """Values of stored elements, cut while one has few bytes."""
        if self.codec is not None:
            x = self.codec.unpacked(x, self.delivery.geometry.sample[2])
        if window is not None:
            x = augment.crop(x, window, self.crop)
        if self.codec is not None:
            return self.codec.values(x, self._maps and self._maps.take(x.shape))
        return x
