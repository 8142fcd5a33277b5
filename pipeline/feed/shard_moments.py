"""What the channels of one shard hold: the same here and in a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from math import prod

import torch
from torch import Tensor

from strata.pipeline.feed.level_feed import codec_of
from strata.stages.features.moments import Moments
from strata.stages.features.quantise import Codec
from strata.store.level.level import Level

PART_VALUES = 4 << 20
"""Values that are looked at together, in float32 16 MiB."""


Look = Callable[[int], Moments]
"""At a shard, by its number. Raises LevelDamaged if a row is not the one that was written; names
file and row."""


def looking_at(level: Level) -> Look:
    """What the channels of each shard of a level hold, for whoever asks. Threads may share it."""
    return partial(_of_shard, level, codec_of(level))


def _of_shard(level: Level, codec: Codec | None, shard: int) -> Moments:
    return reduce(Moments.merged, _parts(level, codec, shard))


def _parts(level: Level, codec: Codec | None, shard: int) -> Iterator[Moments]:
    shape = level.geometry
    first, last = shape.shard_range(shard)
    rows = max(1, PART_VALUES // prod(shape.sample))
    for begin in range(first, last, rows):
        stored = torch.from_numpy(level.read(begin, min(last, begin + rows)))
        yield Moments.of(_values(codec, stored, shape.sample) if codec else stored)


def _values(codec: Codec, stored: Tensor, sample: tuple[int, int, int]) -> Tensor:
    """float32, (rows, *sample), NCHW: channel by channel is how they will be looked at."""
    return codec.values(codec.unpacked(stored, sample[-1]), torch.empty(len(stored), *sample))
