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
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, cast

import numpy as np

from strata.store.errors import StoreRefused
from strata.store.files.files import Descriptor, Opened, WholeFiles
from strata.store.files.lock import EVERY, Waiting
from strata.store.level.level import COMMIT
from strata.store.s3.read_cache import ReadCache
from strata.store.s3.s3 import S3Bucket
from strata.store.s3.signs import READS, REMOVES, WRITES, Sign

REQUESTS = 16
"""Requests under way at a time: each waits for the network most of its time."""


class ObjectPath(PurePosixPath):
    """``s3://bucket/prefix/x_1-…``: a path whose name people can paste. It has nothing of
    ``Path`` that looks at a disk, so whoever forgets where it lies meets an error."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def absolute(self) -> ObjectPath:
        return self


def object_path(text: str) -> Path:
    """The path of ``s3://bucket/prefix``; a ``Path`` as far as names go, and no further."""
    return cast(Path, ObjectPath(text))


def key_of(path: Path) -> str:
    """The key of an object inside of its bucket."""
    return "/".join(path.parts[2:])


class Objects(WholeFiles):
    """Objects of one bucket, under the names that files would have."""

    mapped = False
    requests = REQUESTS
    maps_kept = 4

    def __init__(self, bucket: S3Bucket, cache: ReadCache | None = None) -> None:
        """
        Args:
            cache: where shards that are read are kept; None: nowhere.
        """
        self.bucket, self.cache = bucket, cache
        self._checked = False

    # ---- what changes something -------------------------------------------------------------

    def put_exclusive(self, path: Path, data: bytes) -> bool:
        return self.bucket.create(key_of(path), data)

    def put(self, path: Path, data: bytes) -> None:
        self.bucket.put(key_of(path), data)

    def rename(self, source: Path, target: Path) -> None:
        """An object, or everything below a name. Not one step: of a level, the commit comes last
        and goes first, so that there is a whole level or none at each place."""
        begin, end = key_of(source), key_of(target)
        with suppress(FileNotFoundError):
            self.bucket.copy(begin, end)
            self.bucket.delete([begin])
            return
        found = [key for key, _ in self.bucket.below(begin)]
        if not found:
            raise FileNotFoundError(str(source))
        found.sort(key=lambda key: key.endswith(f"/{COMMIT}"))
        for key in found:
            self.bucket.copy(key, end + key.removeprefix(begin))
        self.bucket.delete([key for key in found if key.endswith(f"/{COMMIT}")])
        self.bucket.delete(found)

    def unlink(self, path: Path) -> None:
        self.bucket.delete([key_of(path)])

    def remove_tree(self, directory: Path) -> None:
        """Everything below a name."""
        self.bucket.delete([key for key, _ in self.bucket.below(key_of(directory))])

    def remove_directory(self, path: Path) -> None:
        """A prefix is there as soon as something has it, and gone with the last."""

    def sync_directory(self, path: Path) -> None:
        """What was answered is durable."""

    # ---- what looks ---------------------------------------------------------------------------

    def read(self, path: Path) -> bytes:
        return self.bucket.get(key_of(path))

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
        stream = partial(self.bucket.stream, key_of(path))
        copy = self.cache.open(sha256, nbytes, stream, where=str(path))
        return None if copy is None else Descriptor(copy)

    def size(self, path: Path) -> int:
        return self.bucket.size(key_of(path))

    def exists(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            self.size(path)
            return True
        return self.is_directory(path)

    def is_directory(self, path: Path) -> bool:
        return self.bucket.any_below(key_of(path))

    def names(self, directory: Path) -> list[str]:
        return sorted(self.bucket.names(key_of(directory)))

    def listed(self, directory: Path) -> dict[str, int]:
        prefix = key_of(directory)
        return {key[len(prefix) + 1 :]: nbytes for key, nbytes in self.bucket.below(prefix)}

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
        if self.bucket.conditional and not self._checked:
            self.bucket.check_conditions(key_of(path.parent))
            self._checked = True
        sign = Sign(self.bucket, key_of(path.with_suffix("")), WRITES)
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
            sign = Sign(self.bucket, _signs(path), READS)
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
                sign = Sign(self.bucket, place, REMOVES)
                stack.callback(sign.remove)
                sign.refuse_beside(WRITES, REMOVES)
                while waiting and (busy := sign.others(READS)):
                    waiting(busy[0])
                    time.sleep(EVERY)
                sign.refuse_beside(READS)
            yield


def _signs(path: Path) -> str:
    """The prefix of the signs at the levels beside that of a commit."""
    return key_of(path.parents[2] / "locks" / path.parents[1].name)


class RemoteShard:
    """One shard, read by position: from its local copy, or piece by piece. Threads share it.

    The copy is fetched whole in the background, as soon as somebody wants any of it. Where the
    cache has no room, what is asked for is read by itself, and what is said to be wanted soon is
    asked for ahead: an object store answers many questions at once, each of them late.
    """

    def __init__(self, objects: Objects, path: Path, nbytes: int, sha256: str) -> None:
        """Asks for nothing yet."""
        self._objects, self._facts = objects, (path, nbytes, sha256)
        self._part = partial(objects.bucket.part, key_of(path))
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
