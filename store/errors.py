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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


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
        if not self.needed:  # nobody said how much
            return f"no space left for {self.where}: {self.free:,} bytes are free"
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
        raise refusal(error, path, needed) from error


def refusal(error: OSError, path: Path | None = None, needed: int = 0) -> StoreRefused:
    """What an error of the file system is called: as :func:`refusals` raises it.

    Args:
        path: None: that of which the error itself says that it is about.
    """
    if path is None:
        name = error.filename
        path = Path(os.fsdecode(name) if isinstance(name, str | bytes) else "a call without a name")
    if error.errno in FULL:
        existing = next(p for p in path.absolute().parents if p.exists())
        return DiskFull(str(path), needed, shutil.disk_usage(existing).free)
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    refused = StoreRefused(f"the file system refuses {path}: {reason}")
    if isinstance(error, PermissionError):
        refused.add_note(_rights(path))
    return refused


def _rights(path: Path) -> str:
    """Whose a path is that we may not change, and how a group shares it."""
    place = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    facts = place.lstat()
    return (
        f"{place} is of user {facts.st_uid}, group {facts.st_gid}, {stat.filemode(facts.st_mode)}. "
        "Choose another --store or --run; or a group shares it, once its owner has said: "
        "chgrp -R GROUP DIR; find DIR -type d -exec chmod g+rwxs {} +"
    )


def readable(
    paths: Iterable[Path], read: Callable[[Path], T], left_out: list[str] | None
) -> Iterator[T]:
    """What ``read`` makes of every path of a listing.

    Args:
        left_out: a neighbour that cannot be read, whatever is wrong with it, is named here with the
            reason, and the others go on. None: it raises what ``read`` does.
    """
    for path in paths:
        try:
            found = read(path)
        except Exception as error:
            if left_out is None:
                raise
            known = refusal(error) if isinstance(error, OSError) else error
            builtin = type(known).__module__ == "builtins"
            why = f"{type(known).__name__}: {known}" if builtin else str(known)
            left_out.append(f"{path}: {why.removeprefix(f'{path} ')}")
        else:
            yield found
