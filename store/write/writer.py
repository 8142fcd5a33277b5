"""Writing a level shard by shard: the shard, then its receipt, and the commit last of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from strata.store.errors import LevelConflict, LevelDamaged, refusals
from strata.store.files.files import DISK, Files, WholeFiles
from strata.store.files.lock import Waiting
from strata.store.files.publish import (
    TEMPORARY,
    make_directory,
    opened,
    put_exclusive,
    replace,
    sealed,
    unseal,
)
from strata.store.fingerprint import sha256
from strata.store.level.group import SMALL, chunk_name, is_array, small_files
from strata.store.level.layout import BEGUN, VALUES, ZARR, Geometry, LevelKey, lock_path
from strata.store.level.level import (
    COMMIT,
    FORMAT,
    RECEIPT,
    RECEIPTS,
    SHARDS,
    Level,
    check_size,
    receipt_path,
)
from strata.store.level.shard_table import Entry, ShardTable
from strata.store.parallel import lower_priority, map_in_threads
from strata.store.write.shard import ShardWriter, forget_shard
from strata.store.write.unfinished import unfinished, unvouched

INTENT = "intent.json"
LINEAGE = "lineage"
PUBLISHERS = 2
"""Shards on their way to the disk at a time: hashing one takes as long as writing it to a fast
disk, so one alone would leave the disk waiting. Each holds its rows in memory."""


class LevelWriter(ShardWriter):
    """The half-written level: knows which shards are still missing, and how to add one.

    Everything that looks, removes or commits wants the level :meth:`locked`.
    """

    def __init__(
        self,
        root: Path,
        key: LevelKey,
        geometry: Geometry,
        lineage: Sequence[Mapping[str, Any]],
        files: Files = DISK,
    ) -> None:
        """Touches nothing yet.

        Args:
            lineage: what made x_0 … x_depth, readable, kept as ``intent.json``; the last of them
                hashes to ``key.fingerprint``.
        """
        super().__init__(root, key, geometry, files)
        self.intent = sealed({LINEAGE: list(lineage)})

    @contextlib.contextmanager
    def lock(self, waiting: Waiting = None) -> Iterator[None]:
        """Be the only writer of this x_depth for the block.

        Args:
            waiting: called with who holds the lock until it is free; None: do not wait.

        Raises:
            LevelBusy: another process writes it, and we do not wait.
            StoreRefused: the store cannot be written.
        """
        make_directory(self.root, self.files)
        path = lock_path(self.root, self.key.depth, self.key.fingerprint)
        with self.files.lock(path, self.key.label, waiting):
            yield

    @contextlib.contextmanager
    def locked(self, waiting: Waiting = None) -> Iterator[None]:
        """:meth:`lock` and :meth:`begin`."""
        with self.lock(waiting):
            self.begin()
            yield

    def begin(self) -> None:
        """Make the level's directory, or take up the one that is there. What an older version began
        in another layout is removed.

        Raises:
            LevelConflict: it was begun with another geometry or lineage.
        """
        with refusals(self.directory), contextlib.suppress(FileNotFoundError):
            if is_array(self.files.read(self.directory / ZARR)) and not self.committed():
                self.files.remove_tree(self.directory)
        for directory in (self.directory / VALUES, self.directory / RECEIPTS):
            make_directory(directory, self.files)
        self._begin_with(self.directory.parent, INTENT, self.intent)
        self._begin_with(self.directory / VALUES, ZARR, self.metadata)

    def _begin_with(self, directory: Path, name: str, data: bytes) -> None:
        if put_exclusive(directory, name, data, self.files):
            return
        path = directory / name
        found = self.files.read(path)
        if found == data:
            return
        if name == INTENT:
            try:
                opened(found, path)
            except LevelDamaged:  # the directory's name still says whose it is
                return replace(directory, name, data, self.files)
        raise LevelConflict(f"{path} was begun for another level or geometry; remove {directory}")

    # ---- what is there --------------------------------------------------------------------------

    def committed(self) -> bool:
        """Is there a commit? Another process may have finished the level while we waited."""
        return self.files.exists(self.directory / COMMIT)

    def missing(self) -> list[int]:
        """Shards that are to be written: see :mod:`strata.store.write.unfinished`. What a killed
        writer left half done is removed."""
        with refusals(self.directory):
            if isinstance(self.files, WholeFiles):
                missing, begun = unvouched(self)
            else:
                self.sweep()
                missing, begun = unfinished(
                    self.directory, self.geometry, self.files, self.is_whole
                )
            for shard in begun:
                forget_shard(self.path(shard), shard, self.files)
        return missing

    def sweep(self) -> None:
        """Remove what killed writers were at. Nobody else may be writing."""
        with refusals(self.directory):
            inside = (self.directory / name for name in (*SMALL, VALUES, RECEIPTS))
            for directory in (self.directory.parent, self.directory, *inside):
                for name in self.files.names(directory):
                    if name.startswith(TEMPORARY):
                        self.files.unlink(directory / name)

    def fill(self, produced: Iterable[tuple[int, np.ndarray]]) -> int:
        """Publish shards while the next ones are made, a few at a time.

        Args:
            produced: (shard, rows as for :meth:`put`); an error of its own ends the filling once
                the shards at work are published.

        Returns:
            Bytes of the shards.

        Raises:
            DiskFull, StoreRefused: of the first shard that was refused; the others are kept.
        """
        published = map_in_threads(  # one more shard is made while all publishers work
            lambda one: self.put(*one),
            produced,
            PUBLISHERS,
            waiting=PUBLISHERS,
            initializer=lower_priority,
        )
        return sum(one.nbytes for one in published)

    # ---- the whole level ------------------------------------------------------------------------

    def commit(
        self,
        parent: Mapping[str, Any] | None,
        arrays: Mapping[str, np.ndarray] | None = None,
        tool: Mapping[str, str] | None = None,
    ) -> Level:
        """Write the commit, after which the level exists for readers.

        Args:
            parent: fingerprint, name and content root of the level it was computed from.
            arrays: small arrays to keep beside the rows, by a name that ``group.SMALL`` has.
            tool: versions of what wrote it.

        Raises:
            LevelDamaged: a shard has no receipt.
        """
        shards = ShardTable.of(self.geometry, self._entries())
        metadata, small = small_files(self.geometry, self.key, arrays or {})
        chunks = {f"{name}/{chunk_name(a.shape)}": a.tobytes() for name, a in small.items()}
        inside = [self.directory / name for name in (*small, VALUES, RECEIPTS)]
        for directory in inside:
            make_directory(directory, self.files)
        for name, data in (chunks | metadata).items():
            if name != BEGUN:
                self.have(self.directory / name, data)
        body = {
            "format": FORMAT,
            "level": asdict(self.key),
            "parent": dict(parent) if parent else None,
            "geometry": self.geometry.as_json(),
            "metadata": {name: _facts(data) for name, data in metadata.items()},
            "arrays": {
                name: {"dtype": array.dtype.str, "shape": array.shape, **_facts(data)}
                for (name, array), data in zip(small.items(), chunks.values(), strict=True)
            },
            SHARDS: shards.as_json(),
            "content_root": shards.content_root,
            "tool": dict(tool or {}),
        }
        # A writer that was killed may have linked any of these names and synced none of them.
        with refusals(self.directory):
            for directory in (*inside, self.directory, self.directory.parent):
                self.files.sync_directory(directory)
        put_exclusive(self.directory, COMMIT, sealed(body), self.files)
        return Level.open(self.root, self.key, self.files)

    def _entries(self) -> Iterator[Entry]:
        """What the commit says of every shard, in their order.

        Raises:
            LevelDamaged: a shard has no sound receipt, or is not as large as that says. What there
                is of it is removed, so that the next writer makes it again.
        """
        sizes = self.files.sizes(self.directory / VALUES)

        def entry(shard: int) -> Entry:
            try:
                found, path = self._entry(shard), self.path(shard)
                check_size(path, found.nbytes, sizes.get(path.name))
            except LevelDamaged as error:
                forget_shard(self.path(shard), shard, self.files)
                error.add_note("It was removed: repeat the command, which makes it again")
                raise
            return found

        return map_in_threads(entry, range(self.geometry.shards), self.files.requests)

    def _entry(self, shard: int) -> Entry:
        path = receipt_path(self.directory, shard)
        try:
            data = self.files.read(path)
        except FileNotFoundError:
            raise LevelDamaged(f"{self.key.label} has no receipt for shard {shard}") from None
        body = opened(data, path, RECEIPT)
        return Entry(body["nbytes"], body["sha256"], sha256(data))


def _facts(data: bytes) -> dict[str, Any]:
    """What a commit says of a small file."""
    return {"nbytes": len(data), "sha256": sha256(data)}


def read_lineage(directory: Path, files: Files) -> list[dict[str, Any]]:
    """What made x_0 … x_depth, as ``intent.json`` of a depth's directory says it. Raises
    LevelDamaged: it is not what was written; FileNotFoundError: it is not there."""
    return unseal(directory / INTENT, files, {LINEAGE: [{str: object}]})[LINEAGE]
