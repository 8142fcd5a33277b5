"""The shards of one level of x_j, computed from the levels below: by the process that has locked
the level, or by a worker that it has told what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.buffers import Ring, host_memory
from strata.pipeline.feed.features import Features, level_draws, naming_rows
from strata.pipeline.materialize.timing import ALONE, Line, ShardRows, Turn
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.run import device
from strata.pipeline.run.session import Session
from strata.stages.memory import watched
from strata.store.level.layout import Geometry, LevelKey
from strata.store.write.writer import PUBLISHERS


@dataclass(frozen=True)
class Computed:
    """A level of x_j as it is computed."""

    session: Session
    key: LevelKey
    shape: Geometry
    source: Features
    view: str
    """Of the level that is read."""
    ids: np.ndarray
    """int64 (rows,), the sample of every row."""
    draws: Draws

    @classmethod
    def of(cls, session: Session, key: LevelKey, shape: Geometry, source: Features) -> Computed:
        ids = session.images()[key.split].array("sample_id")
        draws = level_draws(session.run.recipe, session.run.seed, key.view, int(ids.max()) + 1)
        view = "clean" if source.base == 0 else key.view
        return cls(session, key, shape, source, view, ids, draws)

    def shards(self, todo: Sequence[int], line: Line, turn: Turn = ALONE) -> ShardRows:
        """Stored elements of each shard. Their memory is used again once they are published.

        Args:
            turn: held while a shard is computed, from when its first rows are there: so of several
                threads one computes, and the next one has read.
        """
        shape, session = self.shape, self.session
        blocks = [_blocks(shape, shard, session.run.recipe.cache.block) for shard in todo]
        memory = host_memory(session.device)
        ring = Ring(shape.shard_rows * shape.row_bytes, PUBLISHERS + 1, memory)
        with self.source.delivery([self.view], once=True) as delivery:
            coming = line.reading(delivery.batches([part for parts in blocks for part in parts]))
            for shard, parts in zip(todo, blocks, strict=True):
                first, last = shape.shard_range(shard)
                whole = ring.take()[: (last - first) * shape.row_bytes]
                out = whole.view(shape.dtype).reshape(-1, *shape.stored)
                del whole
                here = chain([next(coming)], coming)
                with turn:
                    for part, stored in zip(parts, here, strict=False):
                        self._fill(out[part[0] - first : part[-1] + 1 - first], part, stored, line)
                    device.finish(session.device)
                yield shard, out
                del out

    def _fill(self, out: np.ndarray, part: np.ndarray, stored: Tensor, line: Line) -> None:
        """One block of a shard; on a GPU only begun."""
        with naming_rows(self.key.label, self.key.split, part, self.ids):
            x = self._encoded(stored, self.draws.of(self.ids[part]), line)
        torch.from_numpy(out).copy_(x, non_blocking=True)
        line.tick(len(part))

    def _encoded(self, stored: Tensor, draws: Draws, line: Line) -> Tensor:
        """One block of a level; of the first, which is as large as any, tensors are counted."""
        if line.peak_bytes:
            return self.source.encoded(stored, draws)
        frozen = [p for layer in self.source.layers for p in layer.layer.parameters()]
        with watched(self.session.device, frozen) as peak:
            x = self.source.encoded(stored, draws)
        line.peak_bytes = peak.nbytes
        return x


def _blocks(shape: Geometry, shard: int, block: int) -> list[np.ndarray]:
    first, last = shape.shard_range(shard)
    return [np.arange(at, min(last, at + block)) for at in range(first, last, block)]
