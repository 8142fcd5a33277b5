"""A store directory: which levels are in it, how complete they are, and how they leave it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import LevelDamaged
from store.layout import Geometry, LevelKey, depth_directory
from store.level import COMMIT, Level, read_commit
from store.publish import sync_directory, unseal
from store.writer import RECEIPTS, LevelWriter


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


class Store:
    """Levels under one root. Several runs may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def state(self, key: LevelKey) -> LevelState:
        """Look at receipts and commit only; no shard is opened."""
        directory = key.directory(self.root)
        if (directory / COMMIT).exists():
            body = read_commit(directory, key)
            nbytes = sum(shard["nbytes"] for shard in body["shards"])
            return LevelState(
                "complete", body["geometry"]["rows"], nbytes, body["content_root"], body["parent"]
            )
        return _partial(directory)

    def open(self, key: LevelKey) -> Level:
        return Level.open(self.root, key)

    def writer(self, key: LevelKey, geometry: Geometry, intent: Mapping[str, Any]) -> LevelWriter:
        return LevelWriter(self.root, key, geometry, intent)

    def remove(self, depth: int, fingerprint: str) -> int:
        """Remove every level of one lineage at one depth; commits go first, so none is half valid.

        Returns:
            Bytes freed.
        """
        directory = depth_directory(self.root, depth, fingerprint)
        freed = used_bytes(directory)
        for commit in sorted(directory.glob(f"*/{COMMIT}")):
            commit.unlink()
            sync_directory(commit.parent)
        shutil.rmtree(directory, ignore_errors=True)
        return freed

    def remove_level(self, key: LevelKey) -> None:
        """Remove one level, commit first."""
        directory = key.directory(self.root)
        if directory.exists():
            (directory / COMMIT).unlink(missing_ok=True)
            sync_directory(directory)
            shutil.rmtree(directory)

    def free_bytes(self) -> int:
        """Bytes free on the file system that holds (or will hold) the store."""
        existing = next(p for p in (self.root, *self.root.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free


def _partial(directory: Path) -> LevelState:
    """By receipts, without hashing: this is what people look at; the writer re-hashes."""
    receipts = []
    for path in (directory / RECEIPTS).glob("*.json"):
        with suppress(LevelDamaged):
            receipts.append(unseal(path))
    if not receipts:
        return LevelState("absent")
    rows = sum(last - first for first, last in (r["rows"] for r in receipts))
    return LevelState("partial", rows, sum(r["nbytes"] for r in receipts))


def used_bytes(directory: Path) -> int:
    """Bytes of the files below a directory; 0 if there is none."""
    files = (Path(base) / name for base, _, names in os.walk(directory) for name in names)
    return sum(path.lstat().st_size for path in files)
