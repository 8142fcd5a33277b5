"""Levels by their directory alone, for whoever has no recipe at hand."""

from __future__ import annotations

from pathlib import Path

from strata.store.errors import LevelAbsent
from strata.store.files.files import DISK, Files
from strata.store.files.publish import unseal
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import LevelKey
from strata.store.level.level import COMMIT, SHARDS, Level
from strata.store.write.writer import INTENT, LINEAGE


def open_level(directory: Path | str, files: Files = DISK) -> Level:
    """A level by its directory alone: ``features/x_1-3c17fd871988/train.plain``.

    Raises:
        LevelAbsent: there is no commit.
        LevelConflict: it was moved to where another level belongs.
        LevelDamaged: a file is missing or is not what the commit says.
    """
    path = (Path(directory) if isinstance(directory, str) else directory).absolute()
    try:
        key = LevelKey(**unseal(path / COMMIT, files, SHARDS)["level"])
    except FileNotFoundError:
        raise LevelAbsent(f"{directory} holds no level: it has no {COMMIT}") from None
    return Level.open(path.parent.parent, key, files)


def images_of(level: Level) -> Level:
    """The images x_0 that a level was made from, whose labels and sample ids are its own.

    Raises:
        LevelAbsent: they are not in the store any more.
        LevelDamaged: ``intent.json`` is not what was written.
    """
    if level.key.depth == 0:
        return level
    directory = level.directory.parent
    first = unseal(directory / INTENT, level.files, LINEAGE)[LINEAGE][0]
    key = LevelKey(0, fingerprint(first), level.key.split, "clean")
    return Level.open(directory.parent, key, level.files)
