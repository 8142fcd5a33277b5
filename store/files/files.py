"""The file system as the store sees it: one small class, and every call of the protocol in it.

Tests put another one in its place: a disk that loses what was not synced, or a call that fails.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from strata.store.files.lock import Waiting, alone, hold, let_group, shared

SYNC_FILE_RANGE_WRITE = 2
"""sync_file_range(2): begin to write dirty pages, and do not wait."""
START_WRITING: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
"""sync_file_range of the C library, which only Linux has; None elsewhere."""
if START_WRITING is not None:
    START_WRITING.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class Opened(Protocol):
    """A file that is read by position. Threads may share it."""

    def read(self, parts: Sequence[Any], offset: int) -> int:
        """Fill some buffers, one after another; returns the bytes that there were, or fewer."""
        ...

    def fetch(self, offset: int, nbytes: int) -> None:
        """Some bytes are wanted soon: begin to read, and do not wait."""
        ...


class Descriptor:
    """An open file. It closes when nobody holds it: not while another thread reads."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self, parts: Sequence[Any], offset: int) -> int:
        return os.preadv(self.descriptor, parts, offset)

    def fetch(self, offset: int, nbytes: int) -> None:
        os.posix_fadvise(self.descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def __del__(self, close: Any = os.close) -> None:  # `os` may have gone when Python ends
        close(self.descriptor)


class Files:
    """The real file system. Every call may fail with ``OSError``."""

    mapped = True
    """Is a map of a file its pages, at no cost but address space?"""
    maps_kept = 16_384
    """Shards mapped at a time; a process may have about 65,000 maps."""
    requests = 1
    """Small files looked at together: more than one where each is waited for."""

    # ---- calls that change something --------------------------------------------------------

    def create(self, path: Path) -> int:
        """A new file, open for writing. ``FileExistsError`` if the name is taken."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        let_group(path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of ``data`` (bytes, contiguous); returns how many bytes were taken."""
        return os.write(descriptor, data)

    def start_writing(self, descriptor: int, begin: int, nbytes: int) -> None:
        """Let the disk begin with some bytes that were just written. A wish: what becomes of them
        is for :meth:`sync` to say."""
        if START_WRITING is not None:
            START_WRITING(descriptor, begin, nbytes, SYNC_FILE_RANGE_WRITE)

    def sync(self, descriptor: int) -> None:
        """Make the bytes of an open file durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """A second name. ``FileExistsError`` if it is taken: exactly one of many racers wins."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Another name, in one step; what had that name (a file, or an empty directory) is gone."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def make_directory(self, path: Path) -> None:
        """One directory whose parent exists. ``FileExistsError`` if it is there."""
        path.mkdir()
        let_group(path)

    def remove_directory(self, path: Path) -> None:
        """One empty directory."""
        path.rmdir()

    def remove_tree(self, directory: Path) -> None:
        """Everything below a directory, one after another, and the directory itself."""
        for name in self.names(directory):
            path = directory / name
            (self.remove_tree if self.is_directory(path) else self.unlink)(path)
        self.remove_directory(directory)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # ---- calls that look ----------------------------------------------------------------------

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def map(self, path: Path, nbytes: int, sha256: str) -> np.ndarray:
        """The bytes of a shard, which are known, as a read-only uint8 array, read when touched."""
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")

    def open(self, path: Path, nbytes: int, sha256: str) -> Opened:
        """A shard, whose bytes are known, to be read by position."""
        return Descriptor(os.open(path, os.O_RDONLY))

    def listed(self, directory: Path) -> dict[str, int]:
        """Bytes of every file below a directory, by its path from there; empty if there is none.
        What goes meanwhile, as temporary files do, is left out."""
        found: dict[str, int] = {}
        for name in self.names(directory):
            path = directory / name
            if self.is_directory(path):
                found |= {f"{name}/{below}": size for below, size in self.listed(path).items()}
            else:
                with suppress(FileNotFoundError):
                    found[name] = self.size(path)
        return found

    def sizes(self, directory: Path) -> dict[str, int]:
        """Bytes of every file in a directory, by its name; empty if there is none. What goes
        meanwhile, as temporary files do, is left out."""
        found: dict[str, int] = {}
        with suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def size(self, path: Path) -> int:
        """Bytes of a file."""
        return path.stat().st_size

    def exists(self, path: Path) -> bool:
        return path.exists()

    def is_directory(self, path: Path) -> bool:
        return path.is_dir()

    def names(self, directory: Path) -> list[str]:
        """Names in a directory, sorted; none if there is no such directory."""
        try:
            return sorted(path.name for path in directory.iterdir())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return []

    def free(self, path: Path) -> int:
        """Bytes free on the file system that holds, or will hold, a path."""
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free

    # ---- who works where ----------------------------------------------------------------------

    def lock(self, path: Path, what: str, waiting: Waiting) -> AbstractContextManager[None]:
        """Be the only writer: see :func:`strata.store.files.lock.hold`."""
        return hold(path, what, waiting)

    def share(self, path: Path) -> object:
        """Something to hold while what a file vouches for is read: nobody removes the file then.
        None: there is no such file."""
        descriptor = shared(path)
        return None if descriptor is None else Descriptor(descriptor)

    def alone(
        self, paths: Sequence[Path], what: str, waiting: Waiting
    ) -> AbstractContextManager[None]:
        """Be about to remove files: see :func:`strata.store.files.lock.alone`."""
        return alone(paths, what, waiting)


class WholeFiles(Files, ABC):
    """Where one call publishes a file, whole and durable, as object stores do."""

    @abstractmethod
    def put_exclusive(self, path: Path, data: bytes) -> bool:
        """Publish a file. False if there is another one of that name, which is left alone; True
        if there is one with these bytes: the answer to our own request may have been lost."""

    @abstractmethod
    def put(self, path: Path, data: bytes) -> None:
        """Publish a file in place of what was there."""


DISK = Files()
