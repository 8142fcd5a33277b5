"""Writing a level of an object store, where two may do so at once: both end with one result.

A lease saves the second the work; it does not keep anything safe, so nothing here rests on it.
Whose shard is there first is there to stay: the other takes it as it is, and its receipt, which is
a function of the bytes of the shard. So shards may come from two writers whose values differ in
their low bits, and receipts and the commit still speak of what is there. What is not vouched for is
therefore not removed, as on a disk, but looked at: an object is whole or not there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from strata.store.ahead import several
from strata.store.errors import LevelDamaged
from strata.store.files.publish import joined, put_exclusive, replace, sealed, unseal
from strata.store.level.codec import decode
from strata.store.level.layout import shard_name
from strata.store.level.level import CHECKSUMS, RECEIPTS, receipt_name, receipt_path
from strata.store.write.writer import LevelWriter


class SharedWriter(LevelWriter):
    """As :class:`strata.store.write.writer.LevelWriter`, for one of several."""

    def missing(self) -> list[int]:
        """Shards that are not there. One whose receipt is missing or speaks of other bytes (its
        writer was killed between the two) is vouched for; one that cannot be read is removed."""
        listed = self.files.listed(self.directory) or {}
        shards = range(self.geometry.shards)
        whole = several(lambda shard: self._there(shard, listed), shards, self.files.requests)
        missing = [shard for shard, is_whole in enumerate(whole) if not is_whole]
        for shard in missing:
            if shard_name(shard) in listed or self._receipt_name(shard) in listed:
                self.forget(shard)
        return missing

    def _there(self, shard: int, listed: Any) -> bool:
        """Is a shard there and vouched for, if need be now?"""
        name = shard_name(shard)
        if name not in listed:
            return False
        if self._receipt_name(shard) in listed:
            with suppress(LevelDamaged, FileNotFoundError):
                receipt = unseal(receipt_path(self.directory, shard), self.files, CHECKSUMS)
                if receipt["nbytes"] == listed[name]:
                    return True
        return self.adopt(shard) is not None

    def _put(self, shard: int, data: list[bytes | memoryview], rows: np.ndarray) -> int:
        """Have a shard and its receipt, ours or another's."""
        whole = joined(data)
        with ThreadPoolExecutor(1) as pool:
            receipt = pool.submit(self.receipt, shard, [whole], rows)
            if put_exclusive(self.directory, shard_name(shard), whole, self.files):
                self.vouch(shard, receipt.result())
                return len(whole)
        adopted = self.adopt(shard)
        if adopted is None:  # what is there cannot be read
            replace(self.directory, shard_name(shard), whole, self.files)
            self.vouch(shard, receipt.result())
        return len(whole) if adopted is None else adopted

    def adopt(self, shard: int) -> int | None:
        """Vouch for the shard that is there; returns its bytes. None: it cannot be read."""
        first, last = self.geometry.shard_range(shard)
        try:
            data = self.files.read(self.directory / shard_name(shard))
            rows = decode(self.geometry, np.frombuffer(data, np.uint8), last - first)
        except (FileNotFoundError, ValueError):  # BadChunk, or bytes that are no such array
            return None
        self.vouch(shard, self.receipt(shard, [data], rows))
        return len(data)

    def vouch(self, shard: int, receipt: Any) -> None:
        """Publish the receipt of a shard that is there. Another one speaks of another shard, which
        was there once."""
        path = receipt_path(self.directory, shard)
        if not put_exclusive(path.parent, path.name, sealed(receipt), self.files):
            replace(path.parent, path.name, sealed(receipt), self.files)

    def _receipt_name(self, shard: int) -> str:
        return f"{RECEIPTS}/{receipt_name(shard)}"
