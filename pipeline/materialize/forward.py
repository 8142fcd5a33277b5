"""The shards of one level of x_j, computed from the levels below: by the process that has locked
the level, or by a worker that has been given the task."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.buffers import Ring, host_memory
from strata.pipeline.feed.features import Features, level_draws, naming_rows
from strata.pipeline.materialize.level import ComputeLock, ShardRows
from strata.pipeline.materialize.timing import Timing
from strata.pipeline.run import device
from strata.pipeline.run.session import Session
from strata.stages.memory import watched
from strata.store.level.layout import Geometry, LevelKey
from strata.store.write.writer import PUBLISHERS


class FeatureShards:
    """The rows of a level of x_j."""

    work = "forward pass"

    def __init__(self, session: Session, key: LevelKey, shape: Geometry, source: Features) -> None:
        self.session, self.key, self.shape, self.source = session, key, shape, source
        self.view = "clean" if source.base == 0 else key.view
        """View of the level that is read."""
        self._ids = session.images()[key.split].array("sample_id")
        samples = int(self._ids.max()) + 1
        self._draws = level_draws(session.run.recipe, session.run.seed, key.view, samples)

    def shards(self, todo: Sequence[int], timing: Timing, lock: ComputeLock) -> ShardRows:
        """Stored elements of each shard; see ``level.ShardSource``. Their memory is used again once
        they are published."""
        shape, session, block = self.shape, self.session, self.session.run.recipe.cache.block
        blocks = [
            [np.arange(at, min(last, at + block)) for at in range(first, last, block)]
            for first, last in map(shape.shard_range, todo)
        ]
        memory = host_memory(session.device)
        ring = Ring(shape.shard_rows * shape.row_bytes, PUBLISHERS + 1, memory)
        with self.source.delivery([self.view], once=True) as delivery:
            coming = timing.reading(delivery.batches([part for parts in blocks for part in parts]))
            for shard, parts in zip(todo, blocks, strict=True):
                first, last = shape.shard_range(shard)
                whole = ring.take()[: (last - first) * shape.row_bytes]
                out = whole.view(shape.dtype).reshape(-1, *shape.stored)
                del whole
                here = chain([next(coming)], coming)
                with lock:
                    for part, stored in zip(parts, here, strict=False):
                        target = out[part[0] - first : part[-1] + 1 - first]
                        self._fill(target, part, stored, timing)
                        del target
                    device.finish(session.device)
                yield shard, out
                del out

    def _fill(self, out: np.ndarray, part: np.ndarray, stored: Tensor, timing: Timing) -> None:
        """Compute one block of a shard; on a GPU only begin to. Of the first block, which is as
        large as any, tensors are counted."""
        draws, layers = self._draws.of(self._ids[part]), self.source.layers
        with naming_rows(self.key.label, self.key.split, part, self._ids):
            if timing.peak_bytes:
                x = self.source.encoded(stored, draws)
            else:
                frozen = [weight for layer in layers for weight in layer.layer.parameters()]
                with watched(self.session.device, frozen) as peak:
                    x = self.source.encoded(stored, draws)
                timing.peak_bytes = peak.nbytes
        torch.from_numpy(out).copy_(x, non_blocking=True)
        timing.tick(len(part))
