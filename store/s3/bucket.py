"""What Strata asks of an object store's bucket, and whether its server keeps its word."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from strata.store.errors import StoreRefused

OTHER_TAG = f'"{"0" * 32}"'
"""Which no object has."""


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
