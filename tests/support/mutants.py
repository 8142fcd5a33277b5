"""The protocol with one step wrong, to see that the crash trials notice.

Each is a mistake that a person could make, and that no test without crashes would find.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from simulated_disk import Inode, SimulatedDisk, mutating

from strata.store.files.publish import sealed
from strata.store.fingerprint import sha256
from strata.store.level.codec import channels_last, encode
from strata.store.level.level import Level, receipt_of, receipt_path
from strata.store.level.shard_table import Entry
from strata.store.write.shard import Published
from strata.store.write.writer import LevelWriter


@dataclass(frozen=True)
class Mutant:
    """One mistake, and what to put in place of what."""

    what: str
    disk: type[SimulatedDisk] = SimulatedDisk
    writer: type[LevelWriter] = LevelWriter
    patches: Mapping[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, stand_in in self.patches.items():
                stack.enter_context(patch(name, stand_in))
            yield


class NoFileSync(SimulatedDisk):
    @mutating
    def sync(self, descriptor: int) -> None:
        pass


class NoDirectorySync(SimulatedDisk):
    @mutating
    def sync_directory(self, path: Path) -> None:
        pass


class LateFileSync(SimulatedDisk):
    """The file is linked to its name first and synced then."""

    late: Inode | None = None

    @mutating
    def sync(self, descriptor: int) -> None:
        self.late = self.open[descriptor]

    @mutating
    def unlink(self, path: Path) -> None:
        if self.late is not None:
            self.late.durable, self.late = self.late.data, None
        SimulatedDisk.unlink.__wrapped__(self, path)  # type: ignore[attr-defined]


class ReceiptFirst(LevelWriter):
    def put(self, shard: int, rows: np.ndarray, threads: int = 1) -> Published:
        rows = channels_last(rows, self.geometry.axis)
        data = b"".join(encode(self.geometry, rows))
        receipt = receipt_of(self.geometry, shard, [data], rows)
        self.vouch(shard, receipt)
        self.have(self.path(shard), data)
        return Published.by(receipt)


class CommitWithoutSync(LevelWriter):
    """What a killed writer named is not synced before the commit."""

    def commit(self, *arguments: Any, **named: Any) -> Level:
        real: Any = self.files
        self.files = _Publishing(real)
        try:
            return super().commit(*arguments, **named)
        finally:
            self.files = real


class _Publishing(SimulatedDisk):
    """A disk that syncs a directory only after a name in it has changed just now."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self.__dict__ = disk.__dict__
        self.changed = False

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self.changed = True

    def sync_directory(self, path: Path) -> None:
        if self.changed:
            super().sync_directory(path)
        self.changed = False


class CommitBeforeReceipts(LevelWriter):
    """The receipts are kept in memory until the commit is there."""

    def put(self, shard: int, rows: np.ndarray, threads: int = 1) -> Published:
        rows = channels_last(rows, self.geometry.axis)
        data = b"".join(encode(self.geometry, rows))
        self.have(self.path(shard), data)
        receipt = receipt_of(self.geometry, shard, [data], rows)
        self.__dict__.setdefault("kept", {})[shard] = receipt
        return Published.by(receipt)

    def _entry(self, shard: int) -> Entry:
        body = self.__dict__.get("kept", {}).get(shard)
        if body is None:
            return super()._entry(shard)
        return Entry(body["nbytes"], body["sha256"], sha256(sealed(body)))

    def commit(self, *arguments: Any, **named: Any) -> Level:
        level = super().commit(*arguments, **named)
        for shard, receipt in self.__dict__.get("kept", {}).items():
            self.vouch(shard, receipt)
        return level


class DatedCommit(LevelWriter):
    def commit(self, *arguments: Any, **named: Any) -> Level:
        *others, tool = arguments
        tool = {**tool, "written": uuid.uuid4().hex}
        return super().commit(*others, tool, **named)  # pyright: ignore[reportCallIssue]


def is_named(writer: LevelWriter, shard: int) -> bool:
    return writer.files.exists(receipt_path(writer.directory, shard))


def only_new_directories(path: Path, files: SimulatedDisk) -> Path:
    """What exists is taken for durable."""
    for directory in reversed([p for p in (path, *path.parents) if not files.exists(p)]):
        files.make_directory(directory)
        files.sync_directory(directory.parent)
    return path


REAL = Mutant("the store as it is")

MUTANTS = {
    "no fsync of files": Mutant("a file is named before its bytes are durable", NoFileSync),
    "no fsync of directories": Mutant("a name is relied on before it is durable", NoDirectorySync),
    "fsync after link": Mutant("a file is synced once it has its name", LateFileSync),
    "receipt before shard": Mutant("what is vouched for is written next", writer=ReceiptFirst),
    "commit before receipts": Mutant("the receipts come last", writer=CommitBeforeReceipts),
    "commit without directory syncs": Mutant(
        "what a killed writer named is taken for durable", writer=CommitWithoutSync
    ),
    "existing directories not synced": Mutant(
        "a directory that a killed writer made is taken for durable",
        patches={"strata.store.write.writer.make_directory": only_new_directories},
    ),
    "one temporary name": Mutant(
        "a temporary file of a killed writer is in the way",
        patches={"strata.store.files.publish.uuid.uuid4": lambda: uuid.UUID(int=0)},
    ),
    "rows not checked": Mutant(
        "rows are taken as they lie",
        patches={"strata.store.level.level.Checks.check": lambda checks, view, row, stored: None},
    ),
    "receipts trusted": Mutant(
        "a shard is taken for whole because it has a receipt",
        patches={"strata.store.write.writer.LevelWriter.is_whole": is_named},
    ),
    "temporary files kept": Mutant(
        "nobody tidies up after a killed writer",
        patches={"strata.store.write.writer.TEMPORARY": ".other-"},
    ),
    "a date in the commit": Mutant("the same level differs each time", writer=DatedCommit),
    "removal without revoking": Mutant(
        "the commit is removed with the rest",
        patches={"strata.store.feature_store.Store._revoke": lambda store, directory: None},
    ),
}
