"""One writer at a time on an object store: an object that says who writes, and until when.

The kernel drops a file lock when its process dies; nobody drops an object. So a lease ends by
itself unless its holder renews it, and one whose holder is a dead process of this very machine has
ended. It saves work and keeps nothing safe: a process that slept past the end of its lease, or two
machines whose clocks differ, write at the same time, and exclusive creates see to that
(:mod:`strata.store.write.mandate`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from strata.store.errors import LevelBusy, StoreRefused
from strata.store.s3.s3 import S3Bucket

SECONDS = 60.0
"""A lease lasts that long from its last renewal."""
RENEWED = 3
"""How often a lease is renewed while it lasts."""
EVERY = 0.5
"""Seconds between two looks at somebody else's lease."""


@dataclass(frozen=True)
class Lease:
    """One writer's claim to be the only one, until it expires."""

    id: str
    """Tells two leases of one process apart."""
    process: int
    host: str
    expires: float
    """Seconds since 1970, by the holder's clock. 0: given back."""

    @property
    def holds(self) -> bool:
        """Has it not ended, by its time or by the death of a process of this machine?"""
        if self.host == socket.gethostname():
            with contextlib.suppress(PermissionError):  # it is there, and somebody else's
                try:
                    os.kill(self.process, 0)
                except ProcessLookupError:
                    return False
        return time.time() < self.expires

    @property
    def who(self) -> str:
        """The holder, for messages."""
        until = time.strftime("%H:%M:%S", time.localtime(self.expires))
        return f"process {self.process} on {self.host}, which has it until {until} unless renewed"


@contextlib.contextmanager
def hold(
    bucket: S3Bucket,
    key: str,
    what: str,
    waiting: Callable[[str], None] | None = None,
    seconds: float = SECONDS,
) -> Iterator[None]:
    """Hold a lease for the block, renewing it meanwhile.

    Args:
        key: of the object.
        what: is leased, for messages: ``x_3 train.v0``.
        waiting: called with who holds it, again and again until it is free; it may raise to give
            up. None: do not wait.
        seconds: it lasts without being renewed.

    Raises:
        LevelBusy: somebody else holds it and nobody wants to wait; says who, and until when.
        StoreRefused: the object store refuses, or is not to be had.
    """
    own = Lease(uuid.uuid4().hex, os.getpid(), socket.gethostname(), 0.0)
    while (tag := _taken(bucket, key, own, seconds)) is None:
        holder = _read(bucket, key)[0]
        if holder is not None and holder.holds:
            who = f"{what} is being written by {holder.who}"
            if waiting is None:
                raise LevelBusy(who)
            waiting(who)
            time.sleep(EVERY)
    ending = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(bucket, key, own, tag, seconds, ending), name="lease", daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        ending.set()
        renewing.join()


def _renew(
    bucket: S3Bucket, key: str, own: Lease, tag: str, seconds: float, ending: threading.Event
) -> None:
    """Renew a lease until the end, and then give it back; or until somebody else has it, because
    we were away for too long."""
    ended = False
    while not ended:
        ended = ending.wait(seconds / RENEWED)
        expires = 0.0 if ended else time.time() + seconds
        try:
            with contextlib.suppress(StoreRefused):  # again the next time; or it ends by itself
                tag = bucket.swap(key, _until(own, expires), tag)
        except FileExistsError:
            return


def _taken(bucket: S3Bucket, key: str, own: Lease, seconds: float) -> str | None:
    """The tag of our lease; None if somebody has it."""
    there, tag = _read(bucket, key)
    if there is not None and there.holds:
        return None
    try:
        data = _until(own, time.time() + seconds)
        return bucket.create(key, data) if tag is None else bucket.swap(key, data, tag)
    except FileExistsError:
        return None


def _read(bucket: S3Bucket, key: str) -> tuple[Lease | None, str | None]:
    """Whose lease is there, and its tag. What cannot be read is nobody's."""
    try:
        data, tag = bucket.get(key)
    except FileNotFoundError:
        return None, None
    with contextlib.suppress(ValueError, TypeError):
        return Lease(**json.loads(data)), tag
    return None, tag


def _until(own: Lease, expires: float) -> bytes:
    return json.dumps({**asdict(own), "expires": expires}).encode()
