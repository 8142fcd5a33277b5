"""Reading a committed level. Rows of a raw shard lie at a constant stride, so a row is a pointer.

Opening trusts nothing but the commit: it must hash to itself, name the fingerprint asked for, match
``zarr.json``, and every shard must have the recorded size. Nothing here imports zarr.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from store.errors import LevelAbsent, LevelConflict, LevelDamaged
from store.fingerprint import sha256
from store.layout import Geometry, LevelKey
from store.publish import unseal

COMMIT = "COMMIT.json"
FORMAT = 1
"""Version of what a commit says; a reader of another version refuses."""
INDEX_ENTRY = np.dtype("<u8")
INDEX_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Level:
    """One committed array of (rows, channel, y, x), readable at random rows."""

    directory: Path
    key: LevelKey
    geometry: Geometry
    content_root: str
    """sha256 over the shards' sha256s, in order."""
    parent: dict[str, Any] | None
    """Fingerprint, name and content root of the level this one was computed from; None for x_0."""
    auxiliary: dict[str, dict[str, Any]]
    """Small arrays beside the level (labels, sample ids): name → bytes and sha256."""

    @classmethod
    def open(cls, root: Path, key: LevelKey) -> Level:
        """Open a level by its commit.

        Raises:
            LevelAbsent: no commit.
            LevelConflict: the commit belongs to another level.
            LevelDamaged: a file is missing or is not what the commit says.
        """
        directory = key.directory(root)
        body = read_commit(directory, key)
        if body["format"] != FORMAT:
            raise LevelConflict(
                f"{directory} has format {body['format']}; this version reads {FORMAT}"
            )
        level = cls(
            directory, key, _geometry(body), body["content_root"], body["parent"], body["auxiliary"]
        )
        _read_hashed(directory / "zarr.json", body["zarr_json"]["sha256"])
        for shard in body["shards"]:
            _check_size(directory / shard["key"], shard["nbytes"])
        return level

    def __len__(self) -> int:
        return self.geometry.rows

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return [self._map(shard) for shard in range(self.geometry.shards)]

    def _map(self, shard: int) -> np.ndarray:
        """Memory map of one shard as (rows, channel, y, x), its stride checked in its index."""
        path = self.directory / shard_name(shard)
        first, last = self.geometry.shard_range(shard)
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        chunks = -(-(last - first) // self.geometry.chunk_rows)
        chunk_bytes = self.geometry.chunk_rows * self.geometry.row_bytes
        if not _is_flat(
            raw, self.geometry.shard_rows // self.geometry.chunk_rows, chunks, chunk_bytes
        ):
            raise LevelDamaged(f"{path}: rows do not lie at a constant stride")
        body = raw[: (last - first) * self.geometry.row_bytes]
        return body.view(self.geometry.dtype).reshape(last - first, *self.geometry.stored)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows (ascending, int64) into ``out``, (len(rows), channel, y, x) of our dtype.

        Raises:
            IndexError: a row is not in the level.
        """
        if len(rows) and not (rows[0] >= 0 and rows[-1] < len(self)):
            raise IndexError(
                f"rows {rows[0]}…{rows[-1]} of {self.key.label}, which has {len(self)}"
            )
        shards = rows // self.geometry.shard_rows
        edges = np.flatnonzero(np.diff(shards)) + 1
        for begin, end in zip([0, *edges], [*edges, len(rows)], strict=True):
            if begin < end:
                shard = int(shards[begin])
                local = rows[begin:end] - shard * self.geometry.shard_rows
                # mode="clip" lets take write straight into out; the range was checked above.
                np.take(self._shards[shard], local, axis=0, out=out[begin:end], mode="clip")

    def read(self, begin: int, end: int) -> np.ndarray:
        """Copy of rows begin … end-1, shape (end - begin, channel, y, x)."""
        out = np.empty((end - begin, *self.geometry.stored), self.geometry.dtype)
        self.take(np.arange(begin, end), out)
        return out

    def array(self, name: str) -> np.ndarray:
        """A small array committed beside the level, e.g. ``labels``; checked against its sha256."""
        path = self.directory / f"{name}.npy"
        data = _read_hashed(path, self.auxiliary[path.name]["sha256"])
        return np.load(io.BytesIO(data), allow_pickle=False)


def shard_name(shard: int) -> str:
    """Zarr's key of a shard, with flat keys: one directory to sync instead of four."""
    return f"c.{shard}.0.0.0"


def read_commit(directory: Path, key: LevelKey) -> dict[str, Any]:
    """The body of a commit, which must be about ``key``. Raises as :meth:`Level.open` does."""
    try:
        body = unseal(directory / COMMIT)
    except FileNotFoundError:
        raise LevelAbsent(f"{key.label} ({key.fingerprint[:12]}) is not in the store") from None
    if body["level"] != asdict(key):
        raise LevelConflict(f"{directory} holds {body['level']}, not {asdict(key)}")
    return body


def _geometry(body: dict[str, Any]) -> Geometry:
    fields = body["geometry"]
    return Geometry(**{**fields, "sample": tuple(fields["sample"])})


def _read_hashed(path: Path, expected: str) -> bytes:
    """Bytes of a small committed file. Raises LevelDamaged if it is gone or another one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LevelDamaged(f"{path} is missing; the level was committed with it") from None
    if sha256(data) != expected:
        raise LevelDamaged(f"{path} is not the one that was committed")
    return data


def _check_size(path: Path, nbytes: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise LevelDamaged(f"{path} is missing; its commit says {nbytes:,} bytes") from None
    if size != nbytes:
        raise LevelDamaged(f"{path} has {size:,} bytes; its commit says {nbytes:,}")


def _is_flat(raw: np.ndarray, slots: int, chunks: int, chunk_bytes: int) -> bool:
    """Does the index say that the first ``chunks`` inner chunks lie back to back?"""
    tail = raw[len(raw) - INDEX_CHECKSUM_BYTES - slots * 16 : len(raw) - INDEX_CHECKSUM_BYTES]
    index = np.frombuffer(tail.tobytes(), INDEX_ENTRY).reshape(slots, 2)[:chunks]
    offsets = np.arange(chunks, dtype=INDEX_ENTRY) * chunk_bytes
    return bool((index[:, 0] == offsets).all() and (index[:, 1] == chunk_bytes).all())
