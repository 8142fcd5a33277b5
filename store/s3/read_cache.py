"""Local copies of an object store's shards, on a disk of which they may have so many bytes.

A copy is named by the sha256 of its bytes, whatever store it is from, and held to it when it
arrives and when a process first opens it. Whoever reads a copy holds a lock on it that dies with
its process, so what is in use is never removed; what was not opened for longest goes first. Where
even that gives no room there is no copy, and the reader asks the object store for the parts it
wants. So the bytes here are never more than the budget, whoever shares it, and all of it may be
removed whenever nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from strata.store.errors import FULL, LevelDamaged, refusals

COMING = ".tmp-"
"""Begins the name of a copy that is not there as a whole."""
PIECE = 8 << 20
TRIES = 3
"""How often a copy may be removed between its arrival and its being opened."""

Fetch = Callable[[], Iterable[bytes | memoryview]]


class ReadCache:
    """A directory of copies. Threads and processes share it."""

    def __init__(self, directory: Path, budget: int) -> None:
        """Touches nothing yet.

        Args:
            budget: most bytes of copies, those on their way included.
        """
        self.directory, self.budget = directory, budget
        self._trusted: set[tuple[str, int]] = set()
        """Name and inode of copies that this process has hashed."""

    def open(self, sha256: str, nbytes: int, fetch: Fetch, where: str) -> int | None:
        """A descriptor of a copy, which stays until that is closed; fetched if it is not there.

        Args:
            fetch: the bytes, in pieces.
            where: they come from, for messages.

        Returns:
            None: there is no room for it.

        Raises:
            LevelDamaged: the bytes that came are not those of ``sha256``.
            StoreRefused: the disk of the cache refuses.
        """
        if nbytes > self.budget:
            return None
        with refusals(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        for _ in range(TRIES):
            with refusals(self.directory / sha256):
                descriptor = self._there(sha256, nbytes)
                if descriptor is not None:
                    return descriptor
            if not self._arrived(sha256, nbytes, fetch, where):
                return None
        return None

    # ---- a copy that is there -------------------------------------------------------------------

    def _there(self, sha256: str, nbytes: int) -> int | None:
        """A descriptor with a lock on a sound copy. One that is not sound is removed."""
        path = self.directory / sha256
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:  # else it was removed before we had the lock
            if self._sound(descriptor, sha256, nbytes):
                with contextlib.suppress(OSError):  # somebody else's copy, which we may only read
                    os.utime(path)
                return descriptor
            path.unlink(missing_ok=True)
        os.close(descriptor)
        return None

    def _sound(self, descriptor: int, sha256: str, nbytes: int) -> bool:
        facts = os.fstat(descriptor)
        if facts.st_size != nbytes:
            return False
        if (sha256, facts.st_ino) in self._trusted:
            return True
        digest, at = hashlib.sha256(), 0
        while piece := os.pread(descriptor, PIECE, at):
            digest.update(piece)
            at += len(piece)
        if digest.hexdigest() != sha256:
            return False
        self._trusted.add((sha256, facts.st_ino))
        return True

    # ---- a copy that comes ----------------------------------------------------------------------

    def _arrived(self, sha256: str, nbytes: int, fetch: Fetch, where: str) -> bool:
        """Fetch a copy, unless somebody else does: then wait for it. False: there is no room."""
        coming = self.directory / f"{COMING}{sha256}"
        with refusals(coming):
            descriptor = os.open(coming, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is(descriptor, coming):  # it has arrived, or failed, while we waited
                return True
            try:
                if (self.directory / sha256).exists():  # it arrived before we asked for a lock
                    return True
                if not self._admitted(descriptor, nbytes, coming):
                    return False
                if not _filled(descriptor, fetch(), sha256, nbytes):
                    raise LevelDamaged(f"{where} is not what was written: its sha256 differs")
                with refusals(coming):
                    coming.rename(self.directory / sha256)
                return True
            except OSError as error:
                if error.errno in FULL:  # the disk has less than the budget: as if it were smaller
                    return False
                raise
            finally:
                if _is(descriptor, coming):
                    coming.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def _admitted(self, descriptor: int, nbytes: int, coming: Path) -> bool:
        """Take so many bytes of the budget, removing what was not opened for longest."""
        with (self.directory / "LOCK").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies: list[tuple[int, int, Path]] = []
            for path in self.directory.iterdir():
                if path.name != "LOCK" and path != coming:
                    with contextlib.suppress(FileNotFoundError):
                        facts = path.stat()
                        copies.append((facts.st_mtime_ns, facts.st_size, path))
            used = nbytes + sum(size for _, size, _ in copies)
            for _, size, path in sorted(copies):
                if used > self.budget and _removed(path):
                    used -= size
            if used > self.budget:
                return False
            os.ftruncate(descriptor, nbytes)
            return True


def _is(descriptor: int, path: Path) -> bool:
    """Is a file still what has that name?"""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _removed(path: Path) -> bool:
    """Remove a copy that nobody reads, or that a killed process was fetching."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    finally:
        os.close(descriptor)


def _filled(
    descriptor: int, pieces: Iterable[bytes | memoryview], sha256: str, nbytes: int
) -> bool:
    """Write what comes; does it have that sha256 and so many bytes?"""
    digest, at = hashlib.sha256(), 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        digest.update(view)
        while len(view):
            taken = os.pwrite(descriptor, view, at)
            view, at = view[taken:], at + taken
        if at > nbytes:
            return False
    return at == nbytes and digest.hexdigest() == sha256
