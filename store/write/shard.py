"""Publishing the shards of a level, in one process or in many: all end with one result.

On a disk one process has locked the level: it begins it and commits it. In between others, on this
machine or on one that shares the file system or the bucket, may publish shards. The same shard may
be asked of two processes, when one is believed dead, and a process may go on for a moment after
whoever held the lock has died. In an object store nothing is locked: two commands that write one
level do its work twice, and end with one level.

The bytes of two may even differ, if they compute on different devices. So a shard that lies there
is never replaced, unless it cannot be read, and its receipt is made from the bytes that lie there.
Whoever comes second comes to the same receipt.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strata.store.errors import LevelConflict, LevelDamaged, StoreRefused, refusals
from strata.store.files.files import DISK, Files
from strata.store.files.publish import Buffers, joined, put_exclusive, replace, sealed, unseal
from strata.store.fingerprint import sha256
from strata.store.level.codec import CODEC_THREADS, channels_last, decode, encode, zarr_metadata
from strata.store.level.layout import BEGUN, Geometry, LevelKey
from strata.store.level.level import RECEIPT, receipt_of, receipt_path


@dataclass(frozen=True)
class Published:
    """A shard that is on disk, as its receipt says it, without the checksums of its rows."""

    shard: int
    nbytes: int
    sha256: str

    @classmethod
    def by(cls, receipt: dict[str, Any]) -> Published:
        """What a receipt speaks of."""
        return cls(receipt["shard"], receipt["nbytes"], receipt["sha256"])


class ShardWriter:
    """A writer of single shards of a level that was begun; there may be several at once."""

    def __init__(self, root: Path, key: LevelKey, geometry: Geometry, files: Files = DISK) -> None:
        """Touches nothing yet."""
        self.root, self.key, self.geometry, self.files = root, key, geometry, files
        self.directory = key.directory(root)
        self.metadata = zarr_metadata(geometry, key)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.directory / self.geometry.shard_key(shard)

    def expect_begun(self) -> None:
        """Is the level that was begun to be seen from here?

        Raises:
            StoreRefused: there is no such level here: the file system is not a shared one.
            LevelConflict: there is another one.
        """
        path = self.directory / BEGUN
        with refusals(path):
            try:
                found = self.files.read(path)
            except FileNotFoundError:
                raise StoreRefused(
                    f"there is no {path} here: the store must lie where all can see it"
                ) from None
        if found != self.metadata:
            raise LevelConflict(f"{path} is of another level, or by another version of zarr")

    def is_whole(self, shard: int) -> bool:
        """Does a shard lie on disk as its receipt says?"""
        return self._found(shard) is not None

    def done(self, shard: int) -> Published | None:
        """A shard that somebody has published; None if it lies there in part, or not as its receipt
        says."""
        with refusals(self.directory):
            return self._found(shard)

    def _found(self, shard: int) -> Published | None:
        path, data = receipt_path(self.directory, shard), self.path(shard)
        with contextlib.suppress(FileNotFoundError, LevelDamaged):
            found = Published.by(unseal(path, self.files, RECEIPT))
            if sha256(self.files.read(data)) == found.sha256:
                return found
        return None

    def put(self, shard: int, rows: np.ndarray, threads: int = CODEC_THREADS) -> Published:
        """Publish one shard and its receipt, or find that it was published.

        Args:
            rows: stored elements, for example (rows of the shard, channel, y, x), in the level's
                dtype; not copied if they lie in memory as on disk.
            threads: that compress.

        Raises:
            DiskFull, StoreRefused: nothing of this shard is left behind.
            ValueError: shape or dtype is not the level's.
        """
        expected = (self.geometry.rows_in(shard), *self.geometry.stored)
        if rows.shape != expected or rows.dtype != self.geometry.dtype:
            raise ValueError(
                f"shard {shard} wants {expected} {self.geometry.dtype}, "
                f"got {rows.shape} {rows.dtype}"
            )
        rows = channels_last(rows, self.geometry.axis)
        data, path = encode(self.geometry, rows, threads), receipt_path(self.directory, shard)
        place = self.path(shard)
        # Hashing takes about as long as writing and syncing does, on another core.
        with ThreadPoolExecutor(1) as pool:
            own = pool.submit(receipt_of, self.geometry, shard, data, rows)
            first = put_exclusive(place.parent, place.name, data, self.files)
        receipt = own.result()
        if first and put_exclusive(path.parent, path.name, sealed(receipt), self.files):
            return Published.by(receipt)
        # Somebody else was here, or is: what lies there now decides.
        if not self.adopt(shard):  # it cannot be read: it is none, and vouches for nothing
            replace(place.parent, place.name, data, self.files)
            self.vouch(shard, receipt)
        return Published.by(unseal(path, self.files, RECEIPT))

    def adopt(self, shard: int, digest: str | None = None) -> bool:
        """Vouch for a shard that lies there. False: it cannot be read, or has another sha256."""
        path = self.path(shard)
        count = self.geometry.rows_in(shard)
        with refusals(path):
            try:
                data = self.files.read(path)
                rows = decode(self.geometry, np.frombuffer(data, np.uint8), count)
            except (FileNotFoundError, ValueError):  # BadChunk, or bytes that are no such array
                return False
        if digest is not None and sha256(data) != digest:
            return False
        self.vouch(shard, receipt_of(self.geometry, shard, [data], rows))
        return True

    def vouch(self, shard: int, receipt: dict[str, Any]) -> None:
        """Publish the receipt of a shard that is on disk. One that is there and says something else
        speaks of another shard, which was there once."""
        self.have(receipt_path(self.directory, shard), sealed(receipt))

    def have(self, path: Path, data: Buffers) -> None:
        """Have exactly ``data`` in a file: what is recorded must be what is on disk."""
        if not put_exclusive(path.parent, path.name, data, self.files):
            with contextlib.suppress(FileNotFoundError):
                if self.files.read(path) == joined(data):
                    return
            replace(path.parent, path.name, data, self.files)


def forget_shard(place: Path, shard: int, files: Files = DISK) -> None:
    """Remove a shard, which lies at a place, and its receipt, the receipt first: it must never
    vouch for nothing."""
    for path in (receipt_path(place.parent.parent, shard), place):
        with contextlib.suppress(FileNotFoundError):
            files.unlink(path)
