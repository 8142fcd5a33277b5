"""Which runs use which levels: what garbage collection must not touch.

A run notes its levels in the store before it writes or reads them. The note names a directory and a
host, since a store can be mounted where the run cannot be seen.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from strata.store.errors import readable, refusals
from strata.store.files.files import DISK, Files
from strata.store.files.publish import make_directory, replace, sealed, unseal
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import depth_directory

REFERENCES = "runs"
NOTE = {"host": str, "run": str, "levels": [str]}
"""The shape of a note, as ``publish.misfit`` has it."""


@dataclass(frozen=True)
class Reference:
    """One run's note in the store."""

    run: str
    """The run's directory, absolute, on ``host``."""
    host: str
    levels: tuple[str, ...]
    """Directories of the store that the run uses: ``x_3-9f3c1a72be04``."""

    @property
    def here(self) -> bool:
        """Was it made on this host, so that we can look whether the run still exists?"""
        return self.host == socket.gethostname()

    @property
    def name(self) -> str:
        """The name of the note's file."""
        return f"{fingerprint([self.host, self.run])[:12]}.json"


def reference(run: Path, levels: Iterable[tuple[int, str]]) -> Reference:
    """The note of a run on this host that uses (depth, fingerprint) …"""
    names = (depth_directory(Path(), depth, name).name for depth, name in levels)
    return Reference(str(run.resolve()), socket.gethostname(), tuple(names))


def refer(root: Path, note: Reference, files: Files = DISK) -> None:
    """Write a run's note, unless it is there already.

    Raises:
        DiskFull, StoreRefused: the store cannot be written.
    """
    directory, data = root / REFERENCES, sealed(asdict(note))
    with suppress(FileNotFoundError):  # or somebody collects garbage at this moment
        if files.read(directory / note.name) == data:
            return
    make_directory(directory, files)
    replace(directory, note.name, data, files)


def references(
    root: Path, files: Files = DISK, left_out: list[str] | None = None
) -> list[Reference]:
    """Every run's note.

    Args:
        left_out: as of :func:`readable`.

    Raises:
        LevelDamaged: a note cannot be read, so nobody knows what that run uses.
    """

    def read(path: Path) -> Reference | None:
        try:
            note = unseal(path, files, NOTE)
        except FileNotFoundError:
            if path.is_symlink():
                raise
            return None  # it was forgotten meanwhile
        return Reference(note["run"], note["host"], tuple(note["levels"]))

    directory = root / REFERENCES
    paths = (directory / name for name in files.names(directory) if name.endswith(".json"))
    return [note for note in readable(paths, read, left_out) if note]


def forget(root: Path, note: Reference, files: Files = DISK) -> None:
    """Remove a note."""
    path = root / REFERENCES / note.name
    with refusals(path), suppress(FileNotFoundError):
        files.unlink(path)
