"""One shard of an object store, read by position: from its local copy, or piece by piece.

The copy is fetched whole in the background, as soon as somebody wants any of it. Where the cache
has no room, what is asked for is read by itself, and what is said to be wanted soon is asked for
ahead: an object store answers many questions at once, each of them late.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from strata.store.files.files import Descriptor

if TYPE_CHECKING:
    from strata.store.s3.objects import Objects


class RemoteShard:
    """The same as :class:`store.files.Opened`. Threads share it."""

    def __init__(self, objects: Objects, path: Path, nbytes: int, sha256: str) -> None:
        """Asks for nothing yet."""
        self._objects, self._path = objects, path
        self._facts = (path, nbytes, sha256)
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
                self._copy = self._objects.pool.submit(self._local)
            return self._copy

    def _local(self) -> Descriptor | None:
        descriptor = self._objects.cached(*self._facts)
        return None if descriptor is None else Descriptor(descriptor)

    def _part(self, offset: int, nbytes: int) -> memoryview:
        return self._objects.part(self._path, offset, nbytes)
