"""Writing a level shard by shard: the shard, then its receipt, and the commit last of all.

A raw shard is put together in memory, byte for byte what zarr would have written; the metadata is
zarr's own.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from store.errors import LevelBusy, LevelConflict, LevelDamaged
from store.fingerprint import canonical, sha256
from store.layout import Geometry, LevelKey
from store.level import COMMIT, FORMAT, INDEX_ENTRY, Level, shard_name
from store.precision import precision
from store.publish import (
    TEMPORARY,
    make_directory,
    npy,
    put_exclusive,
    replace,
    sealed,
    unseal,
)

RECEIPTS = "receipts"
NO_CHUNK = 2**64 - 1
"""Offset and length, in a shard's index, of a chunk that is not there (Zarr v3 sharding)."""
LOCK = "LOCK"
"""Held, by the kernel, while a process writes the level; a killed process holds nothing."""


class LevelWriter:
    """The half-written level: knows which shards are still missing, and how to add one."""

    def __init__(
        self, root: Path, key: LevelKey, geometry: Geometry, intent: Mapping[str, Any]
    ) -> None:
        """Create or take up the level's directory.

        Args:
            intent: every input of ``key.fingerprint``; kept readable as ``intent.json``.

        Raises:
            LevelConflict: the directory was begun with another geometry or lineage.
        """
        self.root, self.key, self.geometry = root, key, geometry
        self.directory = make_directory(key.directory(root))
        make_directory(self.directory / RECEIPTS)
        self._begin(self.directory.parent, "intent.json", sealed(dict(intent)))
        self.metadata = zarr_metadata(geometry, key)
        self._begin(self.directory, "zarr.json", self.metadata)

    def _begin(self, directory: Path, name: str, data: bytes) -> None:
        if not put_exclusive(directory, name, data) and (directory / name).read_bytes() != data:
            raise LevelConflict(
                f"{directory / name} was written for another level; remove {directory}"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer of the level for the block. Raises LevelBusy if another process is."""
        with (self.directory / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LevelBusy(f"another process is writing {self.key.label} now") from None
            yield

    def missing(self) -> list[int]:
        """Shards without a valid receipt. What a killed writer left half done is removed.

        Call it with the level :meth:`locked`, or another writer's unfinished files go too.
        """
        for leftover in self.directory.rglob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
        return [shard for shard in range(self.geometry.shards) if self._receipt(shard) is None]

    def _receipt(self, shard: int) -> dict[str, Any] | None:
        """The receipt of a shard whose bytes are on disk as it says; otherwise both are removed."""
        path, data = self._receipt_path(shard), self.directory / shard_name(shard)
        with contextlib.suppress(FileNotFoundError, LevelDamaged):
            receipt = unseal(path)
            if sha256(data.read_bytes()) == receipt["sha256"]:
                return receipt
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        return None

    def _receipt_path(self, shard: int) -> Path:
        return self.directory / RECEIPTS / f"{shard:06d}.json"

    def put(self, shard: int, rows: np.ndarray) -> int:
        """Publish one shard and its receipt.

        Args:
            rows: (rows of the shard, channel, y, x) in the level's dtype.

        Returns:
            Bytes of the shard.

        Raises:
            DiskFull: nothing of this shard is left behind.
            ValueError: shape or dtype is not the level's.
        """
        first, last = self.geometry.shard_range(shard)
        expected = (last - first, *self.geometry.stored)
        if rows.shape != expected or rows.dtype != self.geometry.dtype:
            raise ValueError(
                f"shard {shard} wants {expected} {self.geometry.dtype}, "
                f"got {rows.shape} {rows.dtype}"
            )
        path, name = self._receipt_path(shard), shard_name(shard)
        if path.exists():  # somebody finished it since we asked what is missing
            return unseal(path)["nbytes"]
        data = encode(self.geometry, rows)
        self._publish(name, data)
        receipt = {"shard": shard, "key": name, "rows": [first, last], "nbytes": len(data)}
        receipt["sha256"] = sha256(data)
        put_exclusive(path.parent, path.name, sealed(receipt))
        return len(data)

    def _publish(self, name: str, data: bytes) -> None:
        """Have exactly ``data`` under ``name``: what is recorded must be what is on disk."""
        if not put_exclusive(self.directory, name, data):
            if (self.directory / name).read_bytes() == data:
                return
            replace(self.directory, name, data)

    def commit(
        self,
        parent: Mapping[str, Any] | None,
        arrays: Mapping[str, np.ndarray] | None = None,
        tool: Mapping[str, str] | None = None,
    ) -> Level:
        """Write the commit, after which the level exists for readers.

        Args:
            parent: fingerprint, name and content root of the level it was computed from.
            arrays: small arrays to keep beside the level (labels, sample ids).
            tool: versions of what wrote it.

        Raises:
            LevelDamaged: a shard has no receipt.
        """
        receipts = [self._read_receipt(shard) for shard in range(self.geometry.shards)]
        auxiliary = {f"{n}.npy": self._put_array(f"{n}.npy", a) for n, a in (arrays or {}).items()}
        body = {
            "format": FORMAT,
            "level": asdict(self.key),
            "parent": dict(parent) if parent else None,
            "geometry": asdict(self.geometry),
            "zarr_json": {"nbytes": len(self.metadata), "sha256": sha256(self.metadata)},
            "auxiliary": auxiliary,
            "shards": receipts,
            "content_root": sha256(canonical([r["sha256"] for r in receipts])),
            "tool": dict(tool or {}),
        }
        put_exclusive(self.directory, COMMIT, sealed(body))
        return Level.open(self.root, self.key)

    def _read_receipt(self, shard: int) -> dict[str, Any]:
        try:
            return unseal(self._receipt_path(shard))
        except FileNotFoundError:
            raise LevelDamaged(f"{self.key.label} has no receipt for shard {shard}") from None

    def _put_array(self, name: str, array: np.ndarray) -> dict[str, Any]:
        data = npy(array)
        self._publish(name, data)
        return {"nbytes": len(data), "sha256": sha256(data)}


def zarr_metadata(geometry: Geometry, key: LevelKey) -> bytes:
    """The level's ``zarr.json``: Zarr v3, sharded, raw, flat chunk keys, poison as fill."""
    import zarr
    import zarr.storage

    files: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(files),
        shape=(geometry.rows, *geometry.stored),
        shards=(geometry.shard_rows, *geometry.stored),
        chunks=(geometry.chunk_rows, *geometry.stored),
        dtype=geometry.dtype,
        compressors=None,
        fill_value=precision(geometry.precision).poison,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("sample", "channel", "y", "x"),
        attributes=_attributes(geometry, key),
    )
    return files["zarr.json"].to_bytes()


def _attributes(geometry: Geometry, key: LevelKey) -> dict[str, Any]:
    """What a level says of itself to readers who know nothing of us."""
    found: dict[str, Any] = {
        "level": key.label,
        "fingerprint": key.fingerprint,
        "precision": geometry.precision,
    }
    if geometry.precision == "bfloat16":
        found["logical_dtype"] = "bfloat16"
    elif geometry.precision in ("uint8", "uint4") and key.depth > 0:
        found["values"] = "(code - zero[channel]) * scale[channel]; see scale.npy and zero.npy"
    if precision(geometry.precision).packed > 1:
        found["packing"] = "two codes per byte along x, the first in the low bits"
        found["width"] = geometry.sample[2]
    return found


def encode(geometry: Geometry, rows: np.ndarray) -> bytes:
    """The bytes of one raw shard: rows, poison up to a whole chunk, index, checksum of the index.

    They are what zarr writes for the same rows (a test compares them), without its cost per chunk,
    and with chunks that hold nothing but poison in their place, as the stride of rows needs.
    """
    from numcodecs.checksum32 import CRC32C  # here, because all of numcodecs comes with it

    chunks = -(-len(rows) // geometry.chunk_rows)
    filling = (chunks * geometry.chunk_rows - len(rows), *geometry.stored)
    poison = np.full(filling, precision(geometry.precision).poison, geometry.dtype)
    nbytes = geometry.chunk_rows * geometry.row_bytes
    index = np.full((geometry.shard_rows // geometry.chunk_rows, 2), NO_CHUNK, INDEX_ENTRY)
    index[:chunks, 0] = np.arange(chunks, dtype=INDEX_ENTRY) * nbytes
    index[:chunks, 1] = nbytes
    tail = np.asarray(CRC32C(location="end").encode(index.tobytes())).tobytes()
    return b"".join((np.ascontiguousarray(rows).data, poison.data, tail))
