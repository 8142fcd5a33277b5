"""A disk in memory with a power switch: what POSIX promises after a crash, and nothing more.

A file's bytes are durable after its fsync. A name is durable after an fsync of its directory; until
then every single link, rename, unlink, mkdir and rmdir may or may not have happened, in any
combination, and a directory whose own name is lost takes everything in it along. Bytes that were
not synced come back whole, as they were, cut short, as zeros, or with a tail of garbage. One
promise more than POSIX's, which every journal keeps: a rename happens at both ends or at neither.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from strata.store.files.files import Files


class PowerCut(BaseException):
    """The process ends here. Not an ``Exception``: nothing that handles errors may survive it."""


@dataclass(eq=False)
class Inode:
    """A file: its bytes as processes see them, and those that would survive."""

    data: bytes = b""
    durable: bytes = b""


@dataclass(eq=False)
class Directory:
    """Names as processes see them, and those that would survive."""

    names: dict[str, Inode | Directory] = field(default_factory=dict)
    durable: dict[str, Inode | Directory] = field(default_factory=dict)


Name = tuple[Directory, str]


@dataclass(eq=False)
class Change:
    """One step that is not durable yet: what each name is to hold; None for no such name."""

    names: list[tuple[Name, Inode | Directory | None]]
    moves: bool = False
    """A rename: it cannot have happened unless what it moved had come to its first name."""

    def touches(self, directories: set[Directory]) -> bool:
        return any(directory in directories for (directory, _), _ in self.names)

    def settle(self) -> None:
        for (directory, name), node in self.names:
            if node is None:
                directory.durable.pop(name, None)
            else:
                directory.durable[name] = node


def mutating(call: Callable[..., Any]) -> Callable[..., Any]:
    """Count a call; at ``cut_at`` the power fails before it, in it or after it."""

    @functools.wraps(call)
    def counted(disk: SimulatedDisk, *arguments: Any) -> Any:
        disk.alive()
        disk.calls += 1
        if disk.calls == disk.cut_at:
            disk.off = True
            if disk.random.random() < 0.4:
                raise PowerCut
        result = call(disk, *arguments)
        disk.alive()
        return result

    return counted


class SimulatedDisk(Files):
    """The store's file system, in memory. Everything random comes from one generator.

    Attributes:
        calls: mutating calls so far.
        cut_at: the call at which the process ends; None: it does not.
        capacity: bytes of all files together, beyond which writing fails with ENOSPC.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.root = Directory()
        self.unsynced: list[Change] = []
        self.open: dict[int, Inode] = {}
        self.calls, self.off = 0, False
        self.cut_at: int | None = None
        self.capacity: int | None = None

    # ---- the switch -----------------------------------------------------------------------------

    def alive(self) -> None:
        """A process that has ended calls nothing any more, not even from a ``finally``."""
        if self.off:
            raise PowerCut

    def kill(self) -> None:
        """kill -9 and start again: what processes saw is still there, synced or not."""
        self.off, self.cut_at = False, None
        self.open.clear()

    def power_cut(self) -> None:
        """Lose what was not synced, as unkindly as allowed, and start again."""
        likely = self.random.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        survivors: list[Change] = []
        needed: set[Name] = set()
        for change in reversed(self.unsynced):
            names = {name for name, _ in change.names}
            if names & needed or self.random.random() < likely:
                survivors.append(change)
                needed |= names if change.moves else set()
        for change in reversed(survivors):
            change.settle()
        self.unsynced.clear()
        self._come_back(self.root)
        self.kill()

    def settle(self) -> None:
        """Make everything durable, as a minute without a crash does."""
        for change in self.unsynced:
            change.settle()
        self.unsynced.clear()
        for node in self._nodes(self.root):
            if isinstance(node, Inode):
                node.durable = node.data

    def _come_back(self, directory: Directory) -> None:
        directory.names = dict(directory.durable)
        for node in directory.names.values():
            if isinstance(node, Directory):
                self._come_back(node)
            elif node.data != node.durable:
                node.data = node.durable = self._remains(node)

    def _remains(self, file: Inode) -> bytes:
        """What a power cut leaves of bytes that were not synced."""
        part = file.data[: self.random.randint(0, len(file.data))]
        rest = len(file.data) - len(part)
        garbage = part + self.random.randbytes(rest)
        return self.random.choice((file.durable, file.data, b"", part, part + bytes(rest), garbage))

    # ---- calls that change something ------------------------------------------------------------

    @mutating
    def create(self, path: Path) -> int:
        directory, name = self._place(path, free=True)
        descriptor = max(self.open, default=2) + 1
        self.open[descriptor] = file = Inode()
        self._change([((directory, name), file)])
        return descriptor

    @mutating
    def write(self, descriptor: int, data: memoryview) -> int:
        taken = bytes(data)
        if self.off:  # torn
            taken = taken[: self.random.randint(0, len(taken))]
        if self.capacity is not None:
            taken = taken[: max(0, self.capacity - self.used())]
            if not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.open[descriptor].data += taken
        return len(taken)

    def start_writing(self, descriptor: int, begin: int, nbytes: int) -> None:
        """What was not synced may have been written in any case."""

    @mutating
    def sync(self, descriptor: int) -> None:
        file = self.open[descriptor]
        if not (self.off and self.random.random() < 0.5):  # the power failed while it was at it
            file.durable = file.data

    def close(self, descriptor: int) -> None:
        self.alive()
        del self.open[descriptor]

    @mutating
    def link(self, source: Path, target: Path) -> None:
        self._change([(self._place(target, free=True), self._node(source))])

    @mutating
    def rename(self, source: Path, target: Path) -> None:
        node, there = self._node(source), self._place(target)
        taken = there[0].names.get(there[1])
        if isinstance(taken, Directory) and taken.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
        self._change([(self._place(source), None), (there, node)], moves=True)

    @mutating
    def unlink(self, path: Path) -> None:
        if isinstance(self._node(path), Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        self._change([(self._place(path), None)])

    @mutating
    def make_directory(self, path: Path) -> None:
        self._change([(self._place(path, free=True), Directory())])

    @mutating
    def remove_directory(self, path: Path) -> None:
        if self._directory(path).names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        self._change([(self._place(path), None)])

    @mutating
    def sync_directory(self, path: Path) -> None:
        """Also what the same journal must have settled before: the other end of a rename."""
        directories = {self._directory(path)}
        if self.off and self.random.random() < 0.5:
            return
        settled = []
        for change in reversed(self.unsynced):
            if change.touches(directories):
                settled.append(change)
                directories |= {directory for (directory, _), _ in change.names}
        for change in reversed(settled):
            change.settle()
            self.unsynced.remove(change)

    # ---- calls that look ------------------------------------------------------------------------

    def read(self, path: Path) -> bytes:
        node = self._node(path)
        if isinstance(node, Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        return node.data

    def map(self, path: Path, nbytes: int, sha256: str) -> np.ndarray:
        return np.frombuffer(self.read(path), np.uint8)

    def sizes(self, directory: Path) -> dict[str, int]:
        found = [directory / name for name in self.names(directory)]
        return {path.name: self.size(path) for path in found if not self.is_directory(path)}

    def size(self, path: Path) -> int:
        return len(self.read(path))

    def exists(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return self._node(path) is not None
        return False

    def is_directory(self, path: Path) -> bool:
        return self.exists(path) and isinstance(self._node(path), Directory)

    def names(self, directory: Path) -> list[str]:
        try:
            return sorted(self._directory(directory).names)
        except OSError:
            return []

    def free(self, path: Path) -> int:
        self.alive()
        return 1 << 40 if self.capacity is None else max(0, self.capacity - self.used())

    @contextlib.contextmanager
    def lock(self, path: Path, what: str, waiting: Callable[[str], None] | None) -> Iterator[None]:
        """One process at a time is all there is."""
        self.alive()
        yield

    # ---- for tests ------------------------------------------------------------------------------

    def used(self) -> int:
        """Bytes of all files."""
        return sum(len(node.data) for node in self._nodes(self.root) if isinstance(node, Inode))

    def contents(self, path: Path) -> dict[str, bytes]:
        """Every file below a directory, by its path from there."""
        found: dict[str, bytes] = {}
        for name in self.names(path):
            if self.is_directory(path / name):
                below = self.contents(path / name)
                found |= {f"{name}/{inner}": data for inner, data in below.items()}
            else:
                found[name] = self.read(path / name)
        return found

    def overwrite(self, path: Path, data: bytes) -> None:
        """Damage a file: other bytes, at once and for good."""
        node = self._node(path)
        assert isinstance(node, Inode)
        node.data = node.durable = data

    # ---- names ----------------------------------------------------------------------------------

    def _change(self, names: list[tuple[Name, Any]], moves: bool = False) -> None:
        for (directory, name), node in names:
            if node is None:
                directory.names.pop(name, None)
            else:
                directory.names[name] = node
        self.unsynced.append(Change(names, moves))

    def _node(self, path: Path) -> Any:
        self.alive()
        node: Any = self.root
        for name in path.parts[1:]:
            if not isinstance(node, Directory) or name not in node.names:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            node = node.names[name]
        return node

    def _directory(self, path: Path) -> Directory:
        node = self._node(path)
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return node

    def _place(self, path: Path, free: bool = False) -> Name:
        """Directory and name of a path."""
        directory = self._directory(path.parent)
        if free and (path.name in directory.names or path == path.parent):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        return directory, path.name

    def _nodes(self, directory: Directory) -> Iterator[Inode | Directory]:
        for node in directory.names.values():
            yield node
            if isinstance(node, Directory):
                yield from self._nodes(node)
