"""Local copies of an object store's shards, on a disk of which they may have so many bytes.

A copy is a file named by the sha256 of its bytes, whatever store it is from. Whoever fetches it has
it locked, and makes it read-only when it is whole and has that sha256; every process hashes it
again when it first opens it. Whoever reads a copy holds a lock on it that dies with its process, so
what is in use is never removed; what was not opened for longest goes first. Where even that gives
no room there is no copy, and the reader asks the object store for the parts it wants. So the bytes
here are never more than the budget, whoever shares it, and all of it may be removed whenever nobody
reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from strata.store.errors import FULL, LevelDamaged, refusals
from strata.store.files.lock import opened

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
        path = self.directory / sha256
        while nbytes <= self.budget:
            with refusals(path):
                descriptor = opened(path, os.O_CREAT | os.O_RDONLY)
                assert descriptor is not None
            try:
                room = self._arrived(descriptor, path, nbytes, fetch, where)
                with refusals(path):
                    if room and self._is_sound(descriptor, path, nbytes):
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if not room:
                break
        return None

    def _arrived(self, descriptor: int, path: Path, nbytes: int, fetch: Fetch, where: str) -> bool:
        """Lock a copy against removal; fetch it if nobody has. False: there is no room."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for whoever fetches it
        if _is_whole(descriptor):
            return True
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if _is_whole(descriptor) or not os.fstat(descriptor).st_nlink:
                return True
            if not self._admitted(path, nbytes):
                return False
            if not _filled(path, fetch(), nbytes):
                raise LevelDamaged(f"{where} is not what was written: its sha256 differs")
            self._trusted.add((path.name, os.fstat(descriptor).st_ino))
            return True
        except OSError as error:
            if error.errno in FULL:  # the disk has less than the budget: as if it were smaller
                return False
            raise
        finally:
            if os.fstat(descriptor).st_nlink and not _is_whole(descriptor):
                path.unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _is_sound(self, descriptor: int, path: Path, nbytes: int) -> bool:
        """Does a copy have the bytes it is named by? One that has not is removed."""
        facts = os.fstat(descriptor)
        if not facts.st_nlink:  # it was removed before we had a lock
            return False
        known = (path.name, facts.st_ino)
        with open(descriptor, "rb", closefd=False) as file:
            if facts.st_size != nbytes or (
                known not in self._trusted
                and hashlib.file_digest(file, "sha256").hexdigest() != path.name
            ):
                path.unlink(missing_ok=True)
                return False
            file.seek(0)
        self._trusted.add(known)
        with suppress(OSError):  # somebody else's copy, which we may only read
            os.utime(path)
        return True

    def _admitted(self, path: Path, nbytes: int) -> bool:
        """Take so many bytes of the budget, removing what was not opened for longest."""
        descriptor = opened(self.directory / "LOCK", os.O_CREAT | os.O_RDONLY)
        assert descriptor is not None
        with os.fdopen(descriptor, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.truncate(path, 0)  # what a killed process left
            copies: list[tuple[int, int, Path]] = []
            for other in self.directory.iterdir():
                with suppress(FileNotFoundError):
                    facts = other.stat()
                    copies.append((facts.st_mtime_ns, facts.st_size, other))
            used = nbytes + sum(size for _, size, _ in copies)
            for _, size, other in sorted(copies):
                if used > self.budget and size and _removed(other):
                    used -= size
            if used <= self.budget:
                os.truncate(path, nbytes)
            return used <= self.budget


def _is_whole(descriptor: int) -> bool:
    """Was a file made read-only, as a copy is that has arrived?"""
    return not os.fstat(descriptor).st_mode & stat.S_IWUSR


def _removed(path: Path) -> bool:
    """Remove a copy that nobody reads, or that a killed process was fetching."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True


def _filled(path: Path, pieces: Iterable[bytes | memoryview], nbytes: int) -> bool:
    """Write what comes; make it a copy if it has the sha256 it is named by and so many bytes."""
    digest, at = hashlib.sha256(), 0
    with path.open("r+b") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
            at += len(piece)
            if at > nbytes:
                return False
    if at == nbytes and digest.hexdigest() == path.name:
        path.chmod(path.stat().st_mode & ~0o222)
        return True
    return False
