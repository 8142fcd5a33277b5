"""What there is of a level that is not committed: which shards a writer need not make again.

On a disk a receipt is published once its shard is durable. So names say enough, and a million of
them are listed in seconds; no file is opened. The last shards, which a crash or a failing disk may
have met, are hashed as well, up to ``RECHECKED`` bytes of them, which is all of a level of usual
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from strata.store.errors import LevelDamaged, refusals
from strata.store.files.files import Files
from strata.store.files.publish import unseal
from strata.store.level.layout import VALUES, Geometry
from strata.store.level.level import RECEIPT, RECEIPTS, receipt_name, receipt_path
from strata.store.parallel import map_in_threads
from strata.store.write.shard import Published, ShardWriter

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
    names, receipts = (set(files.names(directory / place)) for place in (VALUES, RECEIPTS))
    shards = range(geometry.shards)
    keys = (geometry.shard_key(shard).rpartition("/")[2] in names for shard in shards)
    there = np.fromiter(keys, bool, len(shards))
    vouched = np.fromiter((receipt_name(shard) in receipts for shard in shards), bool, len(shards))
    sound = there & vouched
    last, left = [], RECHECKED
    for shard in np.flatnonzero(sound)[::-1].tolist():
        left -= files.size(directory / geometry.shard_key(shard))
        if last and left < 0:
            break
        last.append(shard)
    last.reverse()
    for shard, whole in zip(last, map_in_threads(is_whole, last, HASH_THREADS), strict=True):
        sound[shard] = whole
    return np.flatnonzero(~sound).tolist(), np.flatnonzero(~sound & (there | vouched)).tolist()


def unvouched(writer: ShardWriter) -> tuple[list[int], list[int]]:
    """Shards of a level in an object store that are to be written, and which of them something is
    there of, as :func:`unfinished` has them. Another may be writing: a shard whose receipt is
    missing or speaks of other bytes (its writer was killed between the two) is vouched for, since
    an object is whole or not there."""
    listed = writer.files.listed(writer.directory)

    def is_there(shard: int) -> bool:
        """Is a shard there and vouched for, if need be now?"""
        name = writer.geometry.shard_key(shard)
        if name in listed and f"{RECEIPTS}/{receipt_name(shard)}" in listed:
            with suppress(LevelDamaged, FileNotFoundError):
                receipt = unseal(receipt_path(writer.directory, shard), writer.files, RECEIPT)
                if receipt["nbytes"] == listed[name]:
                    return True
        return name in listed and writer.adopt(shard)

    whole = map_in_threads(is_there, range(writer.geometry.shards), writer.files.requests)
    missing = [shard for shard, is_whole in enumerate(whole) if not is_whole]
    begun = {name.rpartition("/")[2] for name in listed}
    parts = [s for s in missing if not begun.isdisjoint((writer.path(s).name, receipt_name(s)))]
    return missing, parts


def unsettled(writer: ShardWriter, published: Iterable[Published]) -> list[int]:
    """Shards that do not lie here as those who published them said.

    One that is late on a network file system, or that a stray process of an earlier command has
    touched: it is asked for again before the level is committed.
    """

    def is_settled(one: Published) -> bool:
        path = receipt_path(writer.directory, one.shard)
        try:
            found = Published.by(unseal(path, writer.files, RECEIPT))
            size = writer.files.size(writer.path(one.shard))
        except (FileNotFoundError, LevelDamaged):
            return False
        return found == one and size == one.nbytes

    said = list(published)
    with refusals(writer.directory):
        # Not for the disk: opening a directory makes a network file system look at it anew.
        for place in (RECEIPTS, VALUES):
            writer.files.sync_directory(writer.directory / place)
        settled = map_in_threads(is_settled, said, writer.files.requests)
        return [one.shard for one, is_so in zip(said, settled, strict=True) if not is_so]
