"""A store directory: which levels are in it, how complete they are, and how they leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.store.errors import LevelAbsent, LevelConflict, LevelDamaged, refusals
from strata.store.files.files import DISK, Files, WholeFiles
from strata.store.files.lock import Waiting
from strata.store.files.publish import unseal
from strata.store.level.codec import geometry_of_zarr
from strata.store.level.layout import BEGUN, Geometry, LevelKey, depth_directory, lock_path
from strata.store.level.level import (
    COMMIT,
    RECEIPT,
    RECEIPTS,
    Level,
    commit_of,
    geometry_of,
    read_commit,
)
from strata.store.write.writer import LevelWriter


@dataclass(frozen=True)
class LevelState:
    """What is on disk of one level."""

    state: str
    """``absent``, ``partial`` (shards but no commit) or ``complete``."""
    rows: int = 0
    """Rows that readers can have (complete) or that are safe on disk (partial)."""
    nbytes: int = 0
    """Bytes of finished shards."""
    content_root: str | None = None
    parent: dict[str, Any] | None = None


Place = Path | str
"""Where a store lies: a directory, or the URL of an object store, ``s3://bucket/prefix``."""


def is_url(place: Place) -> bool:
    """Is it an object store, and no directory?"""
    return "://" in str(place)


class Store:
    """Levels under one root. Several runs may share it."""

    def __init__(self, root: Path, files: Files = DISK, *, hold: bool = True) -> None:
        """Touches nothing. ``hold`` as :meth:`Level.open` has it."""
        self.root, self.files, self._hold = root, files, hold

    def state(self, key: LevelKey) -> LevelState:
        """Look at receipts and commit only; no shard is opened."""
        directory = key.directory(self.root)
        try:
            return complete(read_commit(directory, key, self.files))
        except LevelAbsent:
            return partial(directory, self.files)

    def geometry(self, key: LevelKey) -> Geometry | None:
        """The geometry of a level that is there or was begun; None: there is nothing, or what there
        is cannot be read."""
        directory = key.directory(self.root)
        with suppress(LevelAbsent, LevelConflict, LevelDamaged):
            return geometry_of(read_commit(directory, key, self.files))
        with suppress(FileNotFoundError, LevelDamaged):
            return geometry_of_zarr(self.files.read(directory / BEGUN))
        return None

    def open(self, key: LevelKey) -> Level:
        return Level.open(self.root, key, self.files, hold=self._hold)

    def writer(
        self, key: LevelKey, geometry: Geometry, lineage: Sequence[Mapping[str, Any]]
    ) -> LevelWriter:
        return LevelWriter(self.root, key, geometry, lineage, self.files)

    def remove(self, depth: int, fingerprint: str) -> int:
        """Remove every level of one lineage at one depth; commits go first, so none is half valid.

        Returns:
            Bytes freed.

        Raises:
            LevelBusy: another process writes or reads it.
            StoreRefused: the store cannot be written.
        """
        directory = depth_directory(self.root, depth, fingerprint)
        if not self.files.exists(directory):
            return 0
        with self.files.lock(lock_path(self.root, depth, fingerprint), directory.name, None):
            freed = used_bytes(directory, self.files)
            places = [directory / name for name in self.files.names(directory)]
            levels = [place for place in places if self.files.is_directory(place)]
            commits = [level / COMMIT for level in levels]
            with self.files.alone(commits, directory.name, None):
                for level in levels:
                    self._revoke(level)
            self._remove_tree(directory)
        return freed

    def remove_level(self, key: LevelKey, waiting: Waiting = None) -> None:
        """Remove one level, commit first. The caller holds its lock, or nobody writes. Raises
        LevelBusy: another process reads it, and we do not wait."""
        directory = key.directory(self.root)
        with self.files.alone([directory / COMMIT], key.label, waiting):
            self._revoke(directory)
        self._remove_tree(directory)

    def _revoke(self, directory: Path) -> None:
        with refusals(directory):
            if self.files.exists(directory / COMMIT):
                self.files.unlink(directory / COMMIT)
            if self.files.is_directory(directory):  # a killed removal may not have synced it
                self.files.sync_directory(directory)

    def _remove_tree(self, directory: Path) -> None:
        with refusals(directory), suppress(FileNotFoundError):  # another was faster
            self.files.remove_tree(directory)

    def remove_file(self, path: Path) -> None:
        """Remove a file or a whole directory that is not a level."""
        if self.files.is_directory(path):
            self._remove_tree(path)
        else:
            with refusals(path), suppress(FileNotFoundError):
                self.files.unlink(path)

    def free_bytes(self) -> int | None:
        """Bytes free on the file system that holds (or will hold) the store; None: an object store
        has no bound."""
        return None if self.remote else self.files.free(self.root)

    @property
    def remote(self) -> bool:
        """Is it in an object store?"""
        return isinstance(self.files, WholeFiles)


def complete(commit: dict[str, Any]) -> LevelState:
    """The state of a level that has a commit."""
    rows, nbytes = commit["geometry"]["rows"], commit["shards"].nbytes
    return LevelState("complete", rows, nbytes, commit["content_root"], commit["parent"])


def partial(directory: Path, files: Files = DISK) -> LevelState:
    """The state of a level without a commit, by its receipts alone; the writer hashes again."""
    receipts = []
    for name in files.names(directory / RECEIPTS):
        with suppress(LevelDamaged, FileNotFoundError):
            receipts.append(unseal(directory / RECEIPTS / name, files, RECEIPT))
    if not receipts:
        return LevelState("absent")
    rows = sum(last - first for first, last in (r["rows"] for r in receipts))
    return LevelState("partial", rows, sum(r["nbytes"] for r in receipts))


def used_bytes(directory: Path, files: Files = DISK) -> int:
    """Bytes of the files below a directory; 0 if there is none. A writer may be at work there."""
    return sum(files.listed(directory).values())


def open_level(directory: Path | str, files: Files = DISK) -> Level:
    """A level by its directory alone: ``features/x_1-3c17fd871988/train.plain``.

    Raises:
        LevelAbsent: there is no commit.
        LevelConflict: it was moved to where another level belongs.
        LevelDamaged: a file is missing or is not what the commit says.
    """
    path = (Path(directory) if isinstance(directory, str) else directory).absolute()
    try:
        key = LevelKey(**commit_of(path, files)["level"])
    except FileNotFoundError:
        raise LevelAbsent(f"{directory} holds no level: it has no {COMMIT}") from None
    return Level.open(path.parent.parent, key, files)
