"""Statistics of the channels of one shard: the same here and in a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from math import prod

import torch

from strata.pipeline.feed.level_feed import codec_of
from strata.stages.features.moments import Moments
from strata.store.level.level import Level

PART_VALUES = 4 << 20
"""Values that are counted together, in float32 16 MiB."""

ShardMoments = Callable[[int], Moments]
"""The number of a shard to the moments of its channels. Threads may share it. Raises LevelDamaged
if a row is not the one that was written; names file and row."""


def moments_of(level: Level) -> ShardMoments:
    """A function that computes the moments of every channel over one shard of a level."""
    shape, codec = level.geometry, codec_of(level)
    rows = max(1, PART_VALUES // prod(shape.sample))

    def parts(shard: int) -> Iterator[Moments]:
        first, last = shape.shard_range(shard)
        for begin in range(first, last, rows):
            x = torch.from_numpy(level.read(begin, min(last, begin + rows)))
            if codec is not None:  # NCHW: they are counted channel by channel
                out = torch.empty(len(x), *shape.sample)
                x = codec.values(codec.unpacked(x, shape.sample[-1]), out)
            yield Moments.of(x)

    return lambda shard: reduce(Moments.merged, parts(shard))
