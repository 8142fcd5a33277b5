"""Rows of one split as shuffled batches: their order, each rank's part of it, views, crops, values
and labels. ``strata.feed`` and the feed of a training problem are this, and what they draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.buffers import MapBuffers
from strata.pipeline.feed.delivery import Delivery
from strata.stages.data import augment
from strata.stages.features.quantise import Codec, memory_format
from strata.store.read.order import Mixing, batch_count, batches
from strata.store.read.rows import Rows


@dataclass(eq=False)
class Feed:
    """Batches of the rows that a delivery reads. An epoch can be taken up at any batch: nothing but
    its number, the seed and the depth says what it is. Close it, or use it in a with statement."""

    delivery: Delivery
    labels: np.ndarray
    """int64 (rows,), or of every token (rows, token); or float32 (rows,) or (rows, number)."""
    ids: np.ndarray
    """int64 (rows,), the sample id of every row."""
    mixing: Mixing
    """How rows are shuffled."""
    shuffle: bool
    """False keeps the order of the rows."""
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
    dtype: torch.dtype = torch.float32
    """What values are made in; without a codec x is what is stored."""

    def __post_init__(self) -> None:
        self.samples = int(self.ids.max(initial=-1)) + 1
        """One more than the largest sample id."""
        # A GPU's allocator is as good.
        self._maps = MapBuffers() if self.delivery.device.type == "cpu" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and let the memory go. What was handed out on a CPU stays valid."""
        self.delivery.close()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return batch_count(len(self.ids), self.batch, drop_last=self.drop_last)

    def order(
        self, epoch: int, start: int = 0, view: np.ndarray | None = None
    ) -> tuple[Rows, list[int]]:
        """The rows of an epoch, over all ranks and from batch ``start`` on, ascending in each
        batch, and the lengths of the batches.

        Args:
            view: int64 (samples,), by sample id: the view that each is taken from; None: there is
                only one.
        """
        order = (
            self.mixing.order(self.seed, self.depth, epoch)
            if self.shuffle
            else np.arange(len(self.ids))
        )
        row, lengths = batches(order, self.batch, drop_last=self.drop_last, start=start)
        return Rows.of(row) if view is None else Rows(view[self.ids[row]], row), lengths

    def mine(self, rows: Rows, lengths: list[int]) -> tuple[Rows, list[int]]:
        """This rank's part of every batch."""
        if self.ranks == 1:
            return rows, lengths
        edges = [(n * self.rank // self.ranks, n * (self.rank + 1) // self.ranks) for n in lengths]
        begins = (np.cumsum(lengths) - lengths).tolist()
        own = [np.arange(at + a, at + b) for at, (a, b) in zip(begins, edges, strict=True)]
        return rows[np.concatenate([*own, np.arange(0)])], [b - a for a, b in edges]

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.delivery.device)

    def read(
        self, rows: Rows, lengths: list[int], crops: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y of some rows, as batches of these lengths, on the device.

        Args:
            crops: int64 (samples, 2), by sample id: where the window of each map begins, (y, x);
                None: the whole map.

        Returns:
            x is values in :attr:`dtype`, laid out as ``quantise.memory_format`` says: (B, C, H, W)
            with channels last, or (B, token, feature), ...; without a codec as it is stored, and
            then as long valid as :meth:`Delivery.batches` says. y is as labels.
            While they are used, nothing else is held.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        y, windows = self.on_device(self.labels[rows.row]).split(lengths), [None] * len(lengths)
        if crops is not None:
            windows = self.on_device(crops[self.ids[rows.row]]).split(lengths)

        # What is of the whole epoch is made now: the first batch may be made in the middle of a
        # step whose memory is counted.
        def found() -> Iterator[tuple[Tensor, Tensor]]:
            delivered = self.delivery.batches(rows, lengths)
            for number in range(len(lengths)):
                yield self._values(next(delivered), windows[number]), y[number]

        return found()

    def _values(self, x: Tensor, window: Tensor | None) -> Tensor:
        """Values of stored elements, cut while one has few bytes."""
        if window is not None:
            x = augment.crop(x, window, self.crop)
        if self.codec is not None:
            x = self.codec.unpacked(x, self.delivery.geometry.features)
            lying = memory_format(x, self.codec.axis) == torch.channels_last
            out = self._maps and self._maps.take(x.shape, self.dtype, lying=lying)
            return self.codec.values(x, out, self.dtype)
        return x
