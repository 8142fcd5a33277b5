"""An object store as the store sees it: what the protocol asks of files, asked of objects.

A PUT is whole and durable once it is answered, so a shard, a receipt or a commit is one request
where a file system takes five calls; there are no directories to make or to sync. A name that must
be taken once is put with a condition, which the server checks. Whoever meets another object under
its name has lost, or has won and lost the answer: the bytes tell.
"""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from strata.store.errors import StoreRefused
from strata.store.files.files import Descriptor, Opened
from strata.store.files.lock import EVERY, Waiting
from strata.store.level.level import COMMIT
from strata.store.s3.read_cache import ReadCache
from strata.store.s3.s3 import S3Bucket
from strata.store.s3.signs import READS, REMOVES, WRITES, Sign

REQUESTS = 16
"""Requests under way at a time: each waits for the network most of its time."""


class Objects(S3Bucket):
    """A bucket as the store sees it: files, with local copies of shards."""

    mapped = False
    requests = REQUESTS
    maps_kept = 4

    def __init__(
        self, name: str, cache: ReadCache | None = None, *, conditional: bool = True
    ) -> None:
        """Errors and ``conditional`` as those of :class:`S3Bucket`.

        Args:
            cache: where shards that are read are kept; None: nowhere.
        """
        super().__init__(name, conditional=conditional)
        self.cache, self._checked = cache, False

    # ---- what changes something -------------------------------------------------------------

    def rename(self, source: Path, target: Path) -> None:
        """An object, or everything below a name. Not one step: of a level, the commit comes last
        and goes first, so that there is a whole level or none at each place."""
        with suppress(FileNotFoundError):
            self.copy(source, target)
            self.unlink(source)
            return
        found = [source / name for name in self.listed(source)]
        if not found:
            raise FileNotFoundError(str(source))
        found.sort(key=lambda path: path.name == COMMIT)
        for path in found:
            self.copy(path, target / path.relative_to(source))
        self.delete([path for path in found if path.name == COMMIT])
        self.delete(found)

    def remove_tree(self, directory: Path) -> None:
        """Everything below a name."""
        self.delete([directory / name for name in self.listed(directory)])

    def remove_directory(self, path: Path) -> None:
        """A prefix is there as soon as something has it, and gone with the last."""

    def sync_directory(self, path: Path) -> None:
        """What was answered is durable."""

    # ---- what looks ---------------------------------------------------------------------------

    def open(self, path: Path, nbytes: int, sha256: str) -> Opened:
        return RemoteShard(self, path, nbytes, sha256)

    def map(self, path: Path, nbytes: int, sha256: str) -> np.ndarray:
        """Mapped where the cache has room for it, else in memory."""
        copy = self.cached(path, nbytes, sha256)
        if copy is None or not nbytes:
            return np.frombuffer(self.read(path), np.uint8)
        # The map keeps a descriptor of its own, and with it the lock on the cached file.
        return np.frombuffer(mmap.mmap(copy.descriptor, nbytes, prot=mmap.PROT_READ), np.uint8)

    def cached(self, path: Path, nbytes: int, sha256: str) -> Descriptor | None:
        """The local copy of a shard; None: there is no room for one. Raises LevelDamaged if its
        bytes are not those that were committed."""
        if self.cache is None:
            return None
        stream = partial(self.stream, path)
        copy = self.cache.open(sha256, nbytes, stream, where=str(path))
        return None if copy is None else Descriptor(copy)

    def exists(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            self.size(path)
            return True
        return self.is_directory(path)

    def sizes(self, directory: Path) -> dict[str, int]:
        return {name: nbytes for name, nbytes in self.listed(directory).items() if "/" not in name}

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that wait for the network."""
        return ThreadPoolExecutor(REQUESTS, "objects")

    # ---- several writers ------------------------------------------------------------------------

    @contextmanager
    def lock(self, path: Path, what: str, waiting: Waiting) -> Iterator[None]:
        """Lock nothing: of several writers, who puts an object first has written it. Who removes
        is told, though. Whoever comes here is going to write, so the server is asked once whether
        it tells writers apart.

        Raises:
            LevelBusy: it is being removed.
            StoreRefused: the server does not, or the object store refuses, or is not to be had.
        """
        if self.conditional and not self._checked:
            self.check_conditions(path.parent)
            self._checked = True
        sign = Sign(self, path.with_suffix(""), WRITES)
        try:
            sign.refuse_beside(REMOVES)
            yield
        finally:
            sign.remove()

    def share(self, path: Path) -> object:
        """A sign that the level of a commit is read; who may not write reads without.

        Raises:
            LevelBusy: it is being removed.
        """
        try:
            sign = Sign(self, _signs(path), READS)
        except StoreRefused as error:
            if "access is denied" not in str(error):
                raise
            return self
        sign.refuse_beside(REMOVES)
        return sign

    @contextmanager
    def alone(self, paths: Sequence[Path], what: str, waiting: Waiting) -> Iterator[None]:
        """Be about to remove levels, by their commits.

        Raises:
            LevelBusy: others write or remove them, or read them and nobody wants to wait.
        """
        gc.collect()  # levels that nobody has any more are not read
        with ExitStack() as stack:
            for place in sorted(set(map(_signs, paths))):
                sign = Sign(self, place, REMOVES)
                stack.callback(sign.remove)
                sign.refuse_beside(WRITES, REMOVES)
                while waiting and (busy := sign.others(READS)):
                    waiting(busy[0])
                    time.sleep(EVERY)
                sign.refuse_beside(READS)
            yield


def _signs(path: Path) -> Path:
    """Where the signs are at the levels beside that of a commit."""
    return path.parents[2] / "locks" / path.parents[1].name


class RemoteShard:
    """One shard, read by position: from its local copy, or piece by piece. Threads share it.

    The copy is fetched whole in the background, as soon as somebody wants any of it. Where the
    cache has no room, what is asked for is read by itself, and what is said to be wanted soon is
    asked for ahead: an object store answers many questions at once, each of them late.
    """

    def __init__(self, objects: Objects, path: Path, nbytes: int, sha256: str) -> None:
        """Asks for nothing yet."""
        self._objects, self._facts = objects, (path, nbytes, sha256)
        self._part = partial(objects.part, path)
        self._copy: Future[Descriptor | None] | None = None
        self._coming: dict[tuple[int, int], Future[memoryview]] = {}
        self._lock = Lock()

    def read(self, parts: Sequence[Any], offset: int) -> int:
        """Fill buffers from a position on; returns the bytes that there were.

        Raises:
            FileNotFoundError: there is no such object.
            LevelDamaged: its bytes are not those that were committed.
            StoreRefused: the object store refuses, or is not to be had.
        """
        copy = self._begun().result()
        if copy is not None:
            return copy.read(parts, offset)
        wanted = sum(map(len, parts))
        with self._lock:
            coming = self._coming.pop((offset, wanted), None)
        data = coming.result() if coming else self._part(offset, wanted)
        found, at = np.frombuffer(data, np.uint8), 0
        for part in parts:
            piece = found[at : at + len(part)]
            part[: len(piece)] = piece
            at += len(piece)
        return at

    def fetch(self, offset: int, nbytes: int) -> None:
        """Some bytes are wanted soon: begin, and do not wait."""
        copy = self._begun()
        if copy.done() and not copy.exception() and copy.result() is None:
            with self._lock:
                if (offset, nbytes) not in self._coming:
                    future = self._objects.pool.submit(self._part, offset, nbytes)
                    self._coming[offset, nbytes] = future

    def _begun(self) -> Future[Descriptor | None]:
        with self._lock:
            if self._copy is None:
                self._copy = self._objects.pool.submit(self._objects.cached, *self._facts)
            return self._copy
