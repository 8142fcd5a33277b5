"""What there is of a level that is not committed: which shards a writer need not make again.

A receipt is published once its shard is durable. So names say enough, and a million of them are
listed in seconds; no file is opened. The last shards, which a crash or a failing disk may have met,
are hashed as well, up to ``RECHECKED`` bytes of them, which is all of a level of usual size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from strata.store.files.files import Files
from strata.store.level.layout import Geometry, shard_name
from strata.store.level.level import RECEIPTS, receipt_name
from strata.store.parallel import map_in_threads

HASH_THREADS = 2
RECHECKED = 4 << 30
"""Bytes of finished shards that are hashed before a writer goes on."""


def unfinished(
    directory: Path, geometry: Geometry, files: Files, is_whole: Callable[[int], bool]
) -> tuple[list[int], list[int]]:
    """Shards that are to be written: those without a receipt, or that are not what it says.

    Args:
        is_whole: does a shard lie there as its receipt says? Asked of the last ones, one at least.

    Returns:
        Their numbers, ascending; and which of them something is there of.
    """
    names, receipts = set(files.names(directory)), set(files.names(directory / RECEIPTS))
    shards = range(geometry.shards)
    there = np.fromiter((shard_name(shard) in names for shard in shards), bool, len(shards))
    vouched = np.fromiter((receipt_name(shard) in receipts for shard in shards), bool, len(shards))
    sound = there & vouched
    last, left = [], RECHECKED
    for shard in np.flatnonzero(sound)[::-1].tolist():
        left -= files.size(directory / shard_name(shard))
        if last and left < 0:
            break
        last.append(shard)
    last.reverse()
    for shard, whole in zip(last, map_in_threads(is_whole, last, HASH_THREADS), strict=True):
        sound[shard] = whole
    return np.flatnonzero(~sound).tolist(), np.flatnonzero(~sound & (there | vouched)).tolist()
