"""Writing a level that others write, too: all end with one result.

On a disk one process has locked the level: it begins it and commits it. In between it may hand out
mandates: small, picklable, with all that another process, on this machine or on one that shares the
file system or the bucket, needs to publish a shard. The same shard may be asked of two processes,
when one is believed dead, and a process may go on for a moment after whoever held the lock has
died. In an object store nothing is locked: two commands that write one level do its work twice, and
end with one level.

The bytes of two may even differ, if they compute on different devices. So the rule is another than
for one writer: a shard that lies there is never replaced, unless it cannot be read, and its receipt
is made from the bytes that lie there. Whoever comes second comes to the same receipt.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strata.store.errors import LevelConflict, LevelDamaged, StoreRefused, refusals
from strata.store.files.files import DISK, Files
from strata.store.files.publish import put_exclusive, replace, sealed, unseal
from strata.store.level.codec import CODEC_THREADS, encode
from strata.store.level.layout import Geometry, LevelKey, shard_name
from strata.store.level.level import CHECKSUMS, RECEIPTS, receipt_name, receipt_of, receipt_path
from strata.store.parallel import map_in_threads
from strata.store.write.writer import ZARR, LevelWriter


class SharedWriter(LevelWriter):
    """A writer that is one of several."""

    def missing(self) -> list[int]:
        """Shards that are not there. One whose receipt is missing or speaks of other bytes (its
        writer was killed between the two) is vouched for: an object is whole or not there. One that
        cannot be read is removed."""
        listed = self.files.listed(self.directory)

        def is_there(shard: int) -> bool:
            """Is a shard there and vouched for, if need be now?"""
            name = shard_name(shard)
            if name in listed and f"{RECEIPTS}/{receipt_name(shard)}" in listed:
                with suppress(LevelDamaged, FileNotFoundError):
                    receipt = unseal(receipt_path(self.directory, shard), self.files, CHECKSUMS)
                    if receipt["nbytes"] == listed[name]:
                        return True
            return name in listed and self.adopt(shard)

        whole = map_in_threads(is_there, range(self.geometry.shards), self.files.requests)
        missing = [shard for shard, is_whole in enumerate(whole) if not is_whole]
        for shard in missing:
            if shard_name(shard) in listed or f"{RECEIPTS}/{receipt_name(shard)}" in listed:
                self.forget(shard)
        return missing

    def publish(self, shard: int, rows: np.ndarray, threads: int = CODEC_THREADS) -> Any:
        """Have a shard and its receipt, ours or another's; returns the receipt's content."""
        data, path = encode(self.geometry, rows, threads), receipt_path(self.directory, shard)
        # Hashing takes about as long as writing and syncing does, on another core.
        with ThreadPoolExecutor(1) as pool:
            own = pool.submit(receipt_of, self.geometry, shard, data, rows)
            first = put_exclusive(self.directory, shard_name(shard), data, self.files)
        receipt = own.result()
        if first and put_exclusive(path.parent, path.name, sealed(receipt), self.files):
            return receipt
        # Somebody else was here, or is: what lies there now decides.
        if not self.adopt(shard):  # it cannot be read: it is none, and vouches for nothing
            replace(self.directory, shard_name(shard), data, self.files)
            self.vouch(shard, receipt)
        return unseal(path, self.files)


@dataclass(frozen=True)
class Published:
    """A shard that is on disk, as its receipt says it, without the checksums of its rows."""

    shard: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Mandate:
    """What a process needs to publish shards of one level that somebody else has locked."""

    root: Path
    key: LevelKey
    geometry: Geometry

    @classmethod
    def of(cls, writer: LevelWriter) -> Mandate:
        """A mandate for others to help with a level that is locked and begun."""
        return cls(writer.root.absolute(), writer.key, writer.geometry)

    def check(self, files: Files = DISK) -> None:
        """Is the level that was begun to be seen from here?

        Raises:
            StoreRefused: there is no such level here: the file system is not a shared one.
            LevelConflict: there is another one.
        """
        writer = self._writer(files)
        path = writer.directory / ZARR
        with refusals(path):
            try:
                found = files.read(path)
            except FileNotFoundError:
                raise StoreRefused(
                    f"there is no {path} here: the store must lie where all can see it"
                ) from None
        if found != writer.metadata:
            raise LevelConflict(f"{path} is of another level, or by another version of zarr")

    def done(self, shard: int, files: Files = DISK) -> Published | None:
        """A shard that somebody has published; None if it lies there in part, or not as its receipt
        says."""
        writer = self._writer(files)
        with refusals(writer.directory):
            if not writer.is_whole(shard):
                return None
        return _published(unseal(receipt_path(writer.directory, shard), files))

    def publish(
        self, shard: int, rows: np.ndarray, files: Files = DISK, threads: int = CODEC_THREADS
    ) -> Published:
        """Publish one shard and its receipt, or find that it was published.

        Args:
            rows: (rows of the shard, channel, y, x) of stored elements, in the level's dtype.
            threads: that compress.

        Raises:
            DiskFull, StoreRefused: nothing of this shard is left behind.
            ValueError: shape or dtype is not the level's.
        """
        writer = self._writer(files)
        writer.check_rows(shard, rows)
        found = self.done(shard, files)
        return found or _published(writer.publish(shard, rows, threads))

    def _writer(self, files: Files) -> SharedWriter:
        return SharedWriter(self.root, self.key, self.geometry, (), files)


def _published(receipt: dict[str, Any]) -> Published:
    return Published(receipt["shard"], receipt["nbytes"], receipt["sha256"])


def unsettled(writer: LevelWriter, published: Iterable[Published]) -> list[int]:
    """Shards that do not lie here as those who published them said.

    One that is late on a network file system, or that a stray process of an earlier command has
    touched: it is asked for again before the level is committed.
    """

    def is_settled(one: Published) -> bool:
        path = receipt_path(writer.directory, one.shard)
        try:
            found = _published(unseal(path, writer.files, CHECKSUMS))
            size = writer.files.size(writer.directory / shard_name(one.shard))
        except (FileNotFoundError, LevelDamaged):
            return False
        return found == one and size == one.nbytes

    said = list(published)
    with refusals(writer.directory):
        # Not for the disk: opening a directory makes a network file system look at it anew.
        for directory in (writer.directory / RECEIPTS, writer.directory):
            writer.files.sync_directory(directory)
        settled = map_in_threads(is_settled, said, writer.files.requests)
        return [one.shard for one, is_so in zip(said, settled, strict=True) if not is_so]
