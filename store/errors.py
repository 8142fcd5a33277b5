"""What the store refuses, grouped by what the reader would do.

StoreError
├── LevelAbsent      write the level first
├── LevelDamaged     a file is not what its commit says: verify and repair
│   └── LevelStale   an older version wrote it: repairing writes it anew
├── LevelConflict    another level lives under this name
├── LevelBusy        wait for the process that writes it
└── StoreRefused     the file system does not let us: another place, other rights, a sound disk
    └── DiskFull     make space; every finished shard is kept
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StoreError(Exception):
    """Base of everything the store raises on purpose."""


class LevelAbsent(StoreError):
    """The level has no valid commit, so for readers it does not exist."""


class LevelDamaged(StoreError):
    """A committed file is missing, or is not what was recorded."""


class LevelStale(LevelDamaged):
    """A level has a format that this version does not read."""


class LevelConflict(StoreError):
    """The directory holds a level made from something else than what is asked for."""


class LevelBusy(StoreError):
    """Another process is writing the level."""


class StoreRefused(StoreError):
    """The file system, or object store, refused a call: read-only, no rights, or failing."""


class DiskFull(StoreRefused):
    """The file system refused bytes for lack of space.

    Attributes:
        needed: bytes that were to be written.
        free: bytes the file system reports as free.
    """

    def __init__(self, where: str, needed: int, free: int) -> None:
        super().__init__(where, needed, free)  # as they are, so that it survives pickling
        self.where, self.needed, self.free = where, needed, free

    def __str__(self) -> str:
        return f"no space left: {self.where} needs {self.needed:,} bytes, {self.free:,} are free"


FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def refusals(path: Path, needed: int = 0) -> Iterator[None]:
    """Name what the file system refused, and how much was to be written.

    Raises:
        DiskFull: for ENOSPC and EDQUOT.
        StoreRefused: for any other ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            existing = next(p for p in path.absolute().parents if p.exists())
            free = shutil.disk_usage(existing).free
            raise DiskFull(str(path), needed, free) from error
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        refused = StoreRefused(f"the file system refuses {path}: {reason}")
        if isinstance(error, PermissionError):
            refused.add_note(_rights(path))
        raise refused from error


def _rights(path: Path) -> str:
    """Whose a path is that we may not change, and how a group shares it."""
    place = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    facts = place.lstat()
    return (
        f"{place} is of user {facts.st_uid}, group {facts.st_gid}, {stat.filemode(facts.st_mode)}. "
        "Choose another --store or --run; or a group shares it, once its owner has said: "
        "chgrp -R GROUP DIR; find DIR -type d -exec chmod g+rwxs {} +"
    )
