"""Leave to publish shards of a level that somebody else has locked.

The process that holds the level's lock begins the level and commits it. In between it may hand out
mandates: small, picklable, with all that another process, on this machine or on one that shares the
file system or the bucket, needs to publish a shard. Nobody else writes the level, but the same
shard may be asked of two processes, when one is believed dead, and a process may go on for a moment
after whoever held the lock has died. Their bytes may even differ, if they compute on different
devices. So the rule is another than for one writer: a shard that lies there is never replaced, and
its receipt is made from the bytes that lie there. Whoever comes second comes to the same receipt.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strata.store.ahead import several
from strata.store.errors import LevelConflict, LevelDamaged, StoreRefused, refusals
from strata.store.files.files import DISK, Files
from strata.store.files.publish import put_exclusive, replace, sealed, unseal
from strata.store.level.codec import CODEC_THREADS, encode
from strata.store.level.layout import Geometry, LevelKey
from strata.store.level.level import CHECKSUMS, RECEIPTS, receipt_path, shard_name
from strata.store.write.shared_writer import SharedWriter
from strata.store.write.writer import ZARR, LevelWriter


@dataclass(frozen=True)
class Published:
    """A shard that is on disk, as its receipt says it, without the checksums of its rows."""

    shard: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Mandate:
    """What a process needs to publish shards of one level."""

    root: Path
    key: LevelKey
    geometry: Geometry

    @classmethod
    def of(cls, writer: LevelWriter) -> Mandate:
        """For others to help with a level that is locked and begun."""
        return cls(writer.root.absolute(), writer.key, writer.geometry)

    @property
    def directory(self) -> Path:
        return self.key.directory(self.root)

    def check(self, files: Files = DISK) -> None:
        """Is the level that was begun to be seen from here?

        Raises:
            StoreRefused: there is no such level here: the file system is not a shared one.
            LevelConflict: there is another one.
        """
        path, writer = self.directory / ZARR, self._writer(files)
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
        if (found := self.done(shard, files)) is not None:
            return found
        data = encode(self.geometry, rows, threads)
        # Hashing takes about as long as writing and syncing does, on another core.
        with ThreadPoolExecutor(1) as pool:
            own = pool.submit(writer.receipt, shard, data, rows)
            first = put_exclusive(writer.directory, shard_name(shard), data, files)
        receipt = own.result()
        path = receipt_path(writer.directory, shard)
        if first and put_exclusive(path.parent, path.name, sealed(receipt), files):
            return _published(receipt)
        # Somebody else was here, or is: what lies there now decides.
        if writer.adopt(shard) is None:  # it cannot be read: it is none, and vouches for nothing
            replace(writer.directory, shard_name(shard), data, files)
            writer.vouch(shard, receipt)
        return _published(unseal(path, files))

    def _writer(self, files: Files) -> SharedWriter:
        return SharedWriter(self.root, self.key, self.geometry, (), files)


def _published(receipt: dict[str, Any]) -> Published:
    return Published(receipt["shard"], receipt["nbytes"], receipt["sha256"])


def unsettled(writer: LevelWriter, published: Iterable[Published]) -> list[int]:
    """Shards that do not lie here as those who published them said.

    One that is late on a network file system, or that a stray process of an earlier command has
    touched: it is asked for again before the level is committed.
    """
    requests = writer.files.requests
    with refusals(writer.directory):
        # Not for the disk: opening a directory makes a network file system look at it anew.
        for directory in (writer.directory / RECEIPTS, writer.directory):
            writer.files.sync_directory(directory)
        settled = several(lambda one: (one.shard, _settled(writer, one)), published, requests)
        return [shard for shard, is_settled in settled if not is_settled]


def _settled(writer: LevelWriter, one: Published) -> bool:
    path = receipt_path(writer.directory, one.shard)
    try:
        found = _published(unseal(path, writer.files, CHECKSUMS))
        size = writer.files.size(writer.directory / shard_name(one.shard))
    except (FileNotFoundError, LevelDamaged):
        return False
    return found == one and size == one.nbytes
