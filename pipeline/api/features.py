"""Features as people use them from Python: an array to look into, a data set of torch, a feed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from strata.pipeline.feed.delivery import stored_dtype
from strata.pipeline.feed.level_feed import LevelFeed, codec_of
from strata.store.errors import LevelConflict
from strata.store.feature_store import open_level
from strata.store.files.files import Files
from strata.store.level.level import Level
from strata.store.memory import aligned
from strata.store.read.mapped import MappedRows
from strata.store.read.rows import Rows, RowSource, TakenRows, same_geometry

Index = int | slice | Sequence[int] | np.ndarray | Tensor


class LevelFeatures:
    """Features of some samples on disk, in the order of their data set: ``x[i]`` is sample i of
    those that there are. An array to look into, a data set for torch, and a feed.

    Values are float32, whatever the precision on disk; of x_0, as they are: uint8 images, int32
    tokens. It can be pickled: the other process opens the same files.
    """

    def __init__(self, levels: Level | Sequence[Level]) -> None:
        """
        Args:
            levels: one, or views of the same samples; what is indexed is the first view.
        """
        self.levels = (levels,) if isinstance(levels, Level) else tuple(levels)
        same_geometry(self.levels)
        level = self.levels[0]
        ids = level.array("sample_id")
        self._rows, self._codec = np.argsort(ids), codec_of(level)
        self.ids: np.ndarray = ids[self._rows]
        """int64 (n,): the number of every sample in its data set; ascending."""
        self.labels: Tensor = torch.from_numpy(level.array("label")[self._rows])
        """int64 (n,) or (n, token), or float32; -1 where samples have none."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, channel, y, x), (n, token, feature), (n, feature), …"""
        return len(self), *self.levels[0].geometry.sample

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what indexing gives: float32, or of x_0 its own."""
        return torch.float32 if self._codec else stored_dtype(self.levels[0].geometry)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        level = self.levels[0]
        views = f", {len(self.levels)} views" * (len(self.levels) > 1)
        stored = f"{level.geometry.precision}, {level.geometry.profile}"
        return f"<Features {self.shape}{views}, stored as {stored} in {level.directory}>"

    def __getitem__(self, index: Index) -> Tensor:
        """Values of a sample, for example (C, H, W), or of several, (n, C, H, W), which a slice, a
        mask or a list of numbers names: a tensor of its own memory on the CPU.

        Raises:
            IndexError: there is no such sample.
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        index = index.numpy() if isinstance(index, Tensor) else index
        rows = self._rows[np.asarray(index) if isinstance(index, Sequence) else index]
        return self._values(np.atleast_1d(rows)).reshape(*np.shape(rows), *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All values, as numpy and scikit-learn ask for them."""
        return np.asarray(self[:].numpy(), dtype)

    def view(self, number: int) -> LevelFeatures:
        """One view of several, by itself."""
        return LevelFeatures(self.levels[number])

    def dataset(self) -> FeatureDataset:
        """A data set of torch: ``[i]`` is (x, y). A DataLoader takes it with any number of workers;
        whole batches are read at once."""
        return FeatureDataset(self)

    def feed(self, batch: int, device: str | torch.device = "cpu", **how: Any) -> LevelFeed:
        """Shuffled batches of all views on a device, as ``strata.feed`` makes them.

        Args:
            how: any other argument of ``strata.feed``.
        """
        return LevelFeed(self.levels, batch=batch, device=device, **how)

    @cached_property
    def _source(self) -> RowSource:
        """Where single rows come from: maps, as long as there may be one of each shard."""
        level = self.levels[0]
        raw, files = level.geometry.profile == "raw", level.files
        mapped = raw and files.mapped and level.geometry.shards <= files.maps_kept
        return (MappedRows if mapped else TakenRows)([level])

    def _values(self, rows: np.ndarray) -> Tensor:
        """Values of rows of the level, in their order."""
        shape = self.levels[0].geometry
        found = aligned(len(rows) * shape.row_bytes)
        self._source.take(Rows.of(rows), found.reshape(len(rows), shape.row_bytes))
        lying = found.view(shape.dtype).reshape(len(rows), *shape.lying)
        x = torch.from_numpy(np.moveaxis(lying, -1, shape.axis))
        return self._codec.decode(x, shape.features) if self._codec else x

    def __reduce__(self) -> tuple[Any, ...]:
        places = [(str(one.directory), one.content_root, one.files) for one in self.levels]
        return _reopened, (type(self), places)


Features = LevelFeatures
"""The class, under the name that people use."""


def _reopened(kind: type[LevelFeatures], places: list[tuple[str, str, Files]]) -> LevelFeatures:
    """Features in another process. Raises LevelConflict: they were written anew meanwhile."""
    levels = [open_level(directory, files) for directory, _, files in places]
    for level, (directory, root, _) in zip(levels, places, strict=True):
        if level.content_root != root:
            raise LevelConflict(f"{directory} holds other values than when it was opened")
    return kind(levels)


class FeatureDataset(Dataset[tuple[Tensor, Tensor]]):
    """Features and labels as a map-style data set of torch."""

    def __init__(self, features: LevelFeatures) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """x, for example float32 (C, H, W), and y, int64 () or (token,), or float32."""
        return self.features[i], self.features.labels[i]

    def __getitems__(self, indices: Sequence[int]) -> WholeBatch:
        """The samples of a batch, read at once: what DataLoader asks for."""
        numbers = np.asarray(indices)
        return WholeBatch(self.features[numbers], self.features.labels[torch.from_numpy(numbers)])


class Pair(tuple[Tensor, Tensor]):
    """x and y of a sample, in a batch that was read at once."""


class WholeBatch(Sequence[Pair]):
    """The samples of a batch. torch's own collation takes it as it is, and stacks nothing."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: Any) -> Any:
        return Pair((self.x[i], self.y[i]))


def _collated(batch: Sequence[Pair], *, collate_fn_map: Any = None) -> Any:
    if isinstance(batch, WholeBatch):
        return [batch.x, batch.y]
    return collate([tuple(one) for one in batch], collate_fn_map=collate_fn_map)


default_collate_fn_map[Pair] = _collated
