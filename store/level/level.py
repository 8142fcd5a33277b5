"""Reading a committed level. Rows of a raw shard lie at a constant stride, so a row is a pointer.

Opening trusts nothing but the commit: it must hash to itself, name the fingerprint asked for, match
``x/zarr.json``, and every shard must have the recorded size. A row is checked against its crc32c
the first time it is read, so a flipped bit, a hole or another level's shard is an error and never a
feature. Nothing here imports zarr.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Any

import numpy as np

from strata.store.errors import LevelAbsent, LevelConflict, LevelDamaged, LevelStale, refusals
from strata.store.files.files import DISK, Files
from strata.store.files.publish import fitting, opened, present, read_hashed, unseal
from strata.store.level.codec import CHECKSUM, crc32c, decode, row_checksums
from strata.store.level.group import SMALL, chunk_name
from strata.store.level.layout import BEGUN, VALUES, Geometry, LevelKey, shard_name
from strata.store.level.shard_table import ShardTable
from strata.store.memory import aligned

COMMIT = "COMMIT.json"
RECEIPTS = "receipts"
SHARDS, CHECKSUMS = "shards", "crc32c"
FORMAT = 4
"""Version of what a commit says."""
FILE = {"nbytes": int, "sha256": str}
KEY = {"depth": int, "fingerprint": str, "split": str, "view": str}
RECEIPT = {"shard": int, "key": str, "rows": [int], **FILE, CHECKSUMS: str}
"""The shape of a receipt, and of a commit: what every one says, as ``publish.misfit`` has it."""
FIELDS = {
    "level": KEY,
    "geometry": dict.fromkeys(("rows", "chunk_rows", "shard_rows"), int)
    | {"sample": [int], "precision": str, "profile": str, "features_last": (bool, EllipsisType)},
    "content_root": str,
    "parent": (KEY | {"content_root": str}, NoneType),
    "arrays": {str: FILE | {"dtype": str, "shape": [int]}},
    "metadata": {str: FILE},
    SHARDS: {"nbytes": [[int]], "sha256": str, "receipts": str},
    "tool": {str: object},
}
CHUNKS_KEPT = 8
"""Decoded inner chunks kept, for readers that want a part of one after another."""


@dataclass(frozen=True, eq=False)
class Level:
    """One committed array of rows, for example (rows, channel, y, x), readable at random rows."""

    directory: Path
    key: LevelKey
    geometry: Geometry
    content_root: str
    """sha256 over the shards' sha256s, in order."""
    parent: dict[str, Any] | None
    """Fingerprint, name and content root of the level this one was computed from; None for x_0."""
    arrays: dict[str, dict[str, Any]]
    """Small arrays beside the rows, of :data:`SMALL`: name → dtype, shape, bytes and sha256."""
    shards: ShardTable
    """Key, rows, bytes and sha256 of every shard, and the sha256 of its receipt."""
    files: Files = field(default=DISK, repr=False)
    held: object = field(default=None, repr=False)
    """Nobody removes the level while this lives: see :meth:`Files.share`."""

    @classmethod
    def open(cls, root: Path, key: LevelKey, files: Files = DISK, *, hold: bool = True) -> Level:
        """Open a level by its commit.

        Args:
            hold: while the level lives nobody removes it. False: somebody else sees to that.

        Raises:
            LevelAbsent: no commit.
            LevelConflict: the commit belongs to another level.
            LevelDamaged: a file is missing or is not what the commit says.
            LevelStale: the commit has another format.
        """
        directory = key.directory(root)
        held = files.share(directory / COMMIT) if hold else None
        body = read_commit(directory, key, files)
        facts = {name: body[name] for name in ("content_root", "parent", "arrays", "shards")}
        level = cls(directory, key, geometry_of(body), **facts, files=files, held=held)
        read_hashed(directory / BEGUN, body["metadata"][BEGUN]["sha256"], files)
        level.check_sizes()
        return level

    def let_go(self) -> Level:
        """Give a level with the same rows that others may remove."""
        return replace(self, held=None)

    def __len__(self) -> int:
        return self.geometry.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the shards on disk."""
        return self.shards.nbytes

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows into ``out``.

        Args:
            rows: int64 (n,), ascending.
            out: of the level's dtype, C-contiguous: for rows as they lie, (n, …, channel).

        Raises:
            IndexError: a row is not in the level.
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        if len(rows) and not (rows[0] >= 0 and rows[-1] < len(self)):
            raise IndexError(
                f"rows {rows[0]}…{rows[-1]} of {self.key.label}, which has {len(self)}"
            )
        for piece, part in runs(rows // self._step):
            # mode="clip" lets take write straight into out; the range was checked.
            local = rows[part] - piece * self._step
            np.take(self._piece(piece), local, axis=0, out=out[part], mode="clip")
        self._checks.check(np.zeros_like(rows), rows, out)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Copy of rows begin … end-1, stored elements (rows, channel, …) that lie as on disk."""
        memory = aligned((end - begin) * self.geometry.row_bytes).view(self.geometry.dtype)
        out = memory.reshape(end - begin, *self.geometry.lying)
        self.take(np.arange(begin, end), out)
        return np.moveaxis(out, -1, self.geometry.axis)

    def array(self, name: str) -> np.ndarray:
        """A copy of a small array of the level, e.g. ``label``; checked against its sha256. Raises
        KeyError: no level has an array of this name."""
        if name not in SMALL:
            raise KeyError(f"{name!r} is no array of a level; there may be {', '.join(SMALL)}")
        if name not in self.arrays:
            raise LevelDamaged(f"{self.directory / COMMIT} is damaged: it has no {name}")
        facts = self.arrays[name]
        path = self.directory / name / chunk_name(facts["shape"])
        data = read_hashed(path, facts["sha256"], self.files)
        return np.frombuffer(bytearray(data), facts["dtype"]).reshape(facts["shape"])

    # ---- one shard ------------------------------------------------------------------------------

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.directory / self.geometry.shard_key(shard)

    def checksums(self, shard: int) -> np.ndarray:
        """crc32c of every row of a shard, uint32 (rows,). Raises LevelDamaged if its receipt is not
        the one that was committed."""
        path = receipt_path(self.directory, shard)
        data = read_hashed(path, self.shards[shard]["receipt"], self.files)
        body = opened(data, path, RECEIPT)
        return np.frombuffer(base64.b64decode(body[CHECKSUMS]), CHECKSUM)

    @property
    def _step(self) -> int:
        """Rows that are looked up together: of a raw shard, or of a packed inner chunk."""
        raw = self.geometry.profile == "raw"
        return self.geometry.shard_rows if raw else self.geometry.chunk_rows

    @cached_property
    def _piece(self) -> Callable[[int], np.ndarray]:
        kept = self.files.maps_kept if self.geometry.profile == "raw" else CHUNKS_KEPT
        return lru_cache(kept)(self.let_go()._decoded)  # no ring, which would live on

    @cached_property
    def _checks(self) -> Checks:
        return Checks((self.let_go(),))

    def _decoded(self, piece: int) -> np.ndarray:
        """Rows of a raw shard, mapped, or of a packed inner chunk, by its number in the level."""
        shard, chunk = divmod(piece, self.geometry.shard_rows // self._step)
        data, rows = self.mapped(shard), self.geometry.rows_in(shard)
        try:
            return decode(self.geometry, data, rows, chunk)
        except ValueError as error:  # BadChunk, or a raw shard that was cut since it was opened
            raise LevelDamaged(f"{self.path(shard)}: {error}") from None

    def mapped(self, shard: int) -> np.ndarray:
        """The bytes of a shard, mapped: uint8, read-only. Raises LevelDamaged if it is missing."""
        path, facts = self.path(shard), self.shards[shard]
        with present(path, "its commit lists it"):
            return self.files.map(path, facts["nbytes"], facts["sha256"])

    def check_sizes(self) -> None:
        """Raises LevelDamaged if a shard is gone or has not the size that the commit says."""
        found, axes = self.files.sizes(self.directory / VALUES), len(self.geometry.sample)
        for shard, nbytes in enumerate(self.shards.sizes.tolist()):
            if (size := found.get(shard_name(shard, axes))) != nbytes:
                check_size(self.path(shard), nbytes, size)


class Checks:
    """The checksums of some levels of equal geometry: every row is held to the crc32c in its
    shard's receipt, once, when it is first read. Later reads cost a look at a bitmap.

    Threads may share it: all that can happen is that two of them check the same row.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels, self.geometry = tuple(levels), levels[0].geometry
        rows = len(levels), self.geometry.rows
        self._expected = np.empty(rows, CHECKSUM)
        self._have = np.zeros((len(levels), self.geometry.shards), bool)
        self._seen, self._looked_at = np.zeros(rows, bool), 0
        self._all_seen = False

    def check(self, view: np.ndarray, row: np.ndarray, stored: np.ndarray) -> None:
        """Look at the rows that were not looked at before.

        Args:
            view: int64 (n,), which of the levels each is in.
            row: int64 (n,), its number there; in any order.
            stored: the same rows as read, (n, …) of any dtype, each of them contiguous.

        Raises:
            LevelDamaged: a row is not the one that was written; names file and row.
        """
        if self._all_seen:
            return
        new = np.flatnonzero(~self._seen[view, row])
        if not len(new):
            return
        asked = view[new], row[new]
        self._have_receipts(*asked)
        found = np.fromiter((crc32c(stored[i]) for i in new), CHECKSUM, len(new))
        if len(wrong := np.flatnonzero(found != self._expected[asked])):
            first, number = min((int(asked[0][i]), int(asked[1][i])) for i in wrong)
            path = self.levels[first].path(number // self.geometry.shard_rows)
            raise LevelDamaged(f"{path}: row {number} is not the one that was written")
        self._seen[asked] = True
        self._looked_at += len(new)  # perhaps too many, if two threads looked at one row
        self._all_seen = self._looked_at >= self._seen.size and bool(self._seen.all())

    def _have_receipts(self, view: np.ndarray, row: np.ndarray) -> None:
        shard = row // self.geometry.shard_rows
        absent = np.flatnonzero(~self._have[view, shard])
        for of, number in sorted({(int(view[i]), int(shard[i])) for i in absent}):
            first, last = self.geometry.shard_range(number)
            self._expected[of, first:last] = self.levels[of].checksums(number)
            self._have[of, number] = True


def runs(groups: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Runs of equal values: value, and where it lies."""
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    for begin, end in pairwise(edges):
        if begin < end:
            yield int(groups[begin]), slice(begin, end)


def receipt_name(shard: int) -> str:
    return f"{shard:06d}.json"


def receipt_path(directory: Path, shard: int) -> Path:
    return directory / RECEIPTS / receipt_name(shard)


def receipt_of(
    geometry: Geometry, shard: int, data: Sequence[bytes | memoryview], rows: np.ndarray
) -> dict[str, Any]:
    """What the receipt of a shard says: a function of its bytes, ``data``, alone."""
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    checksums = row_checksums(np.ascontiguousarray(rows))
    return {
        "shard": shard,
        "key": geometry.shard_key(shard),
        "rows": list(geometry.shard_range(shard)),
        "nbytes": sum(len(piece) for piece in data),
        "sha256": digest.hexdigest(),
        CHECKSUMS: base64.b64encode(checksums.tobytes()).decode(),
    }


def read_commit(directory: Path, key: LevelKey, files: Files = DISK) -> dict[str, Any]:
    """The body of a commit, which must be about ``key``. Raises as :meth:`Level.open` does."""
    with refusals(directory / COMMIT):
        try:
            body = commit_of(directory, files)
        except FileNotFoundError:
            what, root = f"{key.label} ({key.fingerprint[:12]})", directory.parent.parent
            raise LevelAbsent(f"{what} is not in the store {root}") from None
    if body["level"] != asdict(key):
        raise LevelConflict(f"{directory} holds {body['level']}, not {asdict(key)}")
    return body


def commit_of(directory: Path, files: Files = DISK) -> dict[str, Any]:
    """The body of the commit in a directory, with its shards as :class:`ShardTable`.

    Raises:
        FileNotFoundError: there is none.
        LevelDamaged: it is not what was written.
        LevelStale: it has another format.
    """
    body = unseal(path := directory / COMMIT, files, {"format": int})
    if (found := body["format"]) != FORMAT:
        text = f"is stale: it has format {found}, and this version reads {FORMAT}"
        raise LevelStale(f"{path} {text}")
    fitting(body, FIELDS, path)
    try:
        LevelKey(**body["level"])
        return body | {SHARDS: ShardTable.from_json(geometry_of(body), body[SHARDS])}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise LevelDamaged(f"{path} is damaged: {error}") from None


def geometry_of(commit: dict[str, Any]) -> Geometry:
    """The geometry that a commit records."""
    fields = commit["geometry"]
    return Geometry(**(fields | {"sample": tuple(fields["sample"])}))


def check_size(path: Path, nbytes: int, size: int | None) -> None:
    """Raises LevelDamaged: a shard has another ``size`` than recorded, or is not there (None)."""
    if size is None:
        raise LevelDamaged(f"{path} is missing; its commit says {nbytes:,} bytes")
    if size != nbytes:
        raise LevelDamaged(f"{path} has {size:,} bytes; its commit says {nbytes:,}")
