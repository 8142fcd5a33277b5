"""An object store as the store sees it: what the protocol asks of files, asked of objects.

A PUT is whole and durable once it is answered, so a shard, a receipt or a commit is one request
where a file system takes five calls; there are no directories to make or to sync. A name that must
be taken once is put with a condition, which the server checks. Whoever meets another object under
its name has lost, or has won and lost the answer: the bytes tell.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

import numpy as np

from strata.store.errors import StoreRefused
from strata.store.files.files import Opened, WholeFiles
from strata.store.level.level import COMMIT
from strata.store.s3.lease import hold
from strata.store.s3.read_cache import ReadCache
from strata.store.s3.remote_shard import RemoteShard

REQUESTS = 16
"""Requests under way at a time: each waits for the network most of its time."""
OTHER_TAG = f'"{"0" * 32}"'
"""Which no object has."""


class ObjectPath(PurePosixPath):
    """``s3://bucket/prefix/x_1-…``: a path whose name people can paste. It has nothing of
    ``Path`` that looks at a disk, so whoever forgets where it lies meets an error."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def absolute(self) -> ObjectPath:
        return self

    @property
    def key(self) -> str:
        """Of the object, inside of its bucket."""
        return "/".join(self.parts[2:])


def object_path(text: str) -> Path:
    """The path of ``s3://bucket/prefix``; a ``Path`` as far as names go, and no further."""
    return cast(Path, ObjectPath(text))


def key_of(path: Path) -> str:
    return cast(ObjectPath, path).key


class Bucket(Protocol):
    """What is asked of an object store. Everything raises ``FileNotFoundError`` where there is no
    such object, and StoreRefused where the server refuses or is not to be had."""

    name: str
    """``s3://bucket``, for messages."""
    conditional: bool
    """Does the server check conditions? False: whoever writes must be alone."""

    def put(self, key: str, data: bytes) -> None:
        """Have ``data`` under a name, whatever was there."""
        ...

    def create(self, key: str, data: bytes) -> str:
        """Have ``data`` under a name that is free, or that has it already; returns its tag.
        ``FileExistsError`` if there is something else: exactly one of many racers wins."""
        ...

    def swap(self, key: str, data: bytes, tag: str) -> str:
        """Replace the object that has this tag; returns the new one. ``FileExistsError`` if there
        is another one, or none, by now."""
        ...

    def get(self, key: str) -> tuple[bytes, str]:
        """The bytes of an object, and its tag."""
        ...

    def stream(self, key: str) -> Iterator[bytes | memoryview]:
        """The bytes of an object in pieces, in their order."""
        ...

    def part(self, key: str, begin: int, nbytes: int) -> memoryview:
        """Some bytes of an object; fewer where it ends before."""
        ...

    def size(self, key: str) -> int: ...

    def below(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Key and bytes of every object whose key begins with ``prefix/``."""
        ...

    def names(self, prefix: str) -> list[str]:
        """What lies directly below ``prefix/``: objects, and prefixes of others."""
        ...

    def any_below(self, prefix: str) -> bool:
        """Is there any object whose key begins with ``prefix/``?"""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, those that are there."""
        ...

    def copy(self, key: str, target: str) -> None: ...


class Objects(WholeFiles):
    """Objects of one bucket, under the names that files would have."""

    mapped = False
    requests = REQUESTS
    maps_kept = 4

    def __init__(self, bucket: Bucket, cache: ReadCache | None = None) -> None:
        """
        Args:
            cache: where shards that are read are kept; None: nowhere.
        """
        self.bucket, self.cache = bucket, cache
        self._checked = False

    # ---- what changes something -------------------------------------------------------------

    def put_exclusive(self, path: Path, data: bytes) -> bool:
        """Publish an object. False if there is another one of that name, which is left alone; True
        if there is one with these bytes: the answer to our own request may have been lost."""
        try:
            self.bucket.create(key_of(path), data)
        except FileExistsError:
            return False
        return True

    def put(self, path: Path, data: bytes) -> None:
        """Publish an object in place of what was there."""
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

    def make_directory(self, path: Path) -> None:
        """A prefix is there as soon as something has it."""

    def remove_directory(self, path: Path) -> None:
        """And gone with the last."""

    def sync_directory(self, path: Path) -> None:
        """What was answered is durable."""

    # ---- what looks ---------------------------------------------------------------------------

    def read(self, path: Path) -> bytes:
        return self.bucket.get(key_of(path))[0]

    def open(self, path: Path, nbytes: int, sha256: str) -> Opened:
        return RemoteShard(self, path, nbytes, sha256)

    def map_shard(self, path: Path, nbytes: int, sha256: str) -> np.ndarray:
        """Mapped where the cache has room for it, else in memory."""
        descriptor = self.cached(path, nbytes, sha256)
        if descriptor is None or not nbytes:
            return np.frombuffer(self.read(path), np.uint8)
        try:  # the map keeps the descriptor, and with it the lock on the cached file
            return np.frombuffer(mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(descriptor)

    def part(self, path: Path, offset: int, nbytes: int) -> memoryview:
        """Some bytes of an object; fewer where it ends before."""
        return self.bucket.part(key_of(path), offset, nbytes)

    def cached(self, path: Path, nbytes: int, sha256: str) -> int | None:
        """A descriptor of the local copy of a shard; None: there is no room for one. Raises
        LevelDamaged if its bytes are not those that were committed."""
        if self.cache is None:
            return None
        return self.cache.open(
            sha256, nbytes, lambda: self.bucket.stream(key_of(path)), where=str(path)
        )

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

    def listed(self, directory: Path) -> Mapping[str, int]:
        prefix = key_of(directory)
        return {key[len(prefix) + 1 :]: nbytes for key, nbytes in self.bucket.below(prefix)}

    def sizes(self, directory: Path) -> dict[str, int]:
        return {name: nbytes for name, nbytes in self.listed(directory).items() if "/" not in name}

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that wait for the network."""
        return ThreadPoolExecutor(REQUESTS, "objects")

    # ---- one writer at a time -----------------------------------------------------------------

    def lock(
        self, path: Path, what: str, waiting: Callable[[str], None] | None
    ) -> AbstractContextManager[None]:
        """See :func:`strata.store.s3.lease.hold`. Whoever wants it is going to write, so the server
        is asked first whether it can tell one writer from another."""
        if self.bucket.conditional and not self._checked:
            check_conditions(self.bucket, key_of(path.parent))
            self._checked = True
        return hold(self.bucket, key_of(path), what, waiting)


def check_conditions(bucket: Bucket, prefix: str) -> None:
    """Put one name twice: does the server refuse the second?

    Raises:
        StoreRefused: it does not, so that of two writers one would overwrite what the other has
            vouched for.
    """
    key = f"{prefix}/probe-{uuid.uuid4().hex}"
    try:
        bucket.create(key, b"first")
        refused = [_refused(bucket.create, key, b"second")]
        refused.append(_refused(bucket.swap, key, b"third", OTHER_TAG))
    finally:
        bucket.delete([key])
    if not all(refused):
        raise StoreRefused(
            f"{bucket.name}: the server overwrites where it was told not to (it ignores "
            "If-None-Match or If-Match), so several writers are refused. If this is the only one, "
            "say so: --store 's3://…?writers=1'"
        )


def _refused(call: Callable[..., Any], *arguments: Any) -> bool:
    try:
        call(*arguments)
    except FileExistsError:
        return True
    return False
