"""What the channels of one shard hold: the same here and in a worker."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from math import prod

import torch
from torch import Tensor

from stages.moments import Moments
from stages.quantise import Codec
from store.level import Level

PART_VALUES = 4 << 20
"""Values that are looked at together, in float32 16 MiB."""


def of_shard(level: Level, codec: Codec | None, shard: int) -> Moments:
    """What the channels of one shard hold.

    Args:
        codec: of the level; None: images, uint8.

    Raises:
        LevelDamaged: a row is not the one that was written; names file and row.
    """
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
