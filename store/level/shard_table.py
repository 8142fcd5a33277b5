"""What a commit says of its shards, in columns: a level may have a million of them.

A dictionary for each would take a gigabyte and the best part of a minute to read. A column is one
string of JSON and one array in memory; the entry of a shard is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from strata.store.fingerprint import canonical, sha256
from strata.store.level.layout import Geometry

DIGEST = 32
"""Bytes of a sha256."""


class Entry(NamedTuple):
    """What a commit says of one shard; all else follows from its number."""

    nbytes: int
    sha256: str
    receipt: str
    """sha256 of its receipt."""


class ShardTable(Sequence[dict[str, Any]]):
    """Number, key, rows, bytes and sha256 of every shard, and the sha256 of its receipt."""

    def __init__(
        self, geometry: Geometry, nbytes: np.ndarray, digests: np.ndarray, receipts: np.ndarray
    ) -> None:
        """
        Args:
            nbytes: int64 (shards,).
            digests, receipts: uint8 (shards, 32).
        """
        self.geometry = geometry
        self.sizes = nbytes
        """Bytes of every shard, int64 (shards,)."""
        self._digests, self._receipts = digests, receipts

    @classmethod
    def of(cls, geometry: Geometry, entries: Iterable[Entry]) -> ShardTable:
        """From the entry of every shard, in their order."""
        nbytes: list[int] = []
        digests, receipts = bytearray(), bytearray()
        for entry in entries:
            nbytes.append(entry.nbytes)
            digests += bytes.fromhex(entry.sha256)
            receipts += bytes.fromhex(entry.receipt)
        return cls(geometry, np.array(nbytes, np.int64), _rows(digests), _rows(receipts))

    @classmethod
    def from_json(cls, geometry: Geometry, value: dict[str, Any]) -> ShardTable:
        """From what a commit has."""
        sizes, counts = np.array(value["nbytes"], np.int64).reshape(-1, 2).T
        digests, receipts = (_rows(bytes.fromhex(value[c])) for c in ("sha256", "receipts"))
        return cls(geometry, np.repeat(sizes, counts), digests, receipts)

    def as_json(self) -> dict[str, Any]:
        """Sizes in runs of [bytes, how many], digests in hexadecimal digits, one after another."""
        edges = np.flatnonzero(np.diff(self.sizes, prepend=-1))
        counts = np.diff(edges, append=len(self))
        runs = np.stack([self.sizes[edges], counts], axis=1)
        digests, receipts = self._digests.tobytes().hex(), self._receipts.tobytes().hex()
        return {"nbytes": runs.tolist(), "sha256": digests, "receipts": receipts}

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, shard: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, shard: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, shard: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(shard, slice):
            return [self[one] for one in range(*shard.indices(len(self)))]
        number = range(len(self))[shard]
        return {
            "shard": number,
            "key": self.geometry.shard_key(number),
            "rows": list(self.geometry.shard_range(number)),
            "nbytes": int(self.sizes[number]),
            "sha256": self._digests[number].tobytes().hex(),
            "receipt": self._receipts[number].tobytes().hex(),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return int(self.sizes.sum())

    @property
    def content_root(self) -> str:
        """sha256 over the shards' sha256s, in their order."""
        digits = self._digests.tobytes().hex()
        step = 2 * DIGEST
        return sha256(canonical([digits[at : at + step] for at in range(0, len(digits), step)]))


def _rows(digests: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST)
