"""One writer at a time on an object store: an object that says who writes, and until when.

The kernel drops a file lock when its process dies; nobody drops an object. So a lease ends by
itself unless its holder renews it, and one whose holder is a dead process of this very machine has
ended. It saves work and keeps nothing safe: a process that slept past the end of its lease, or two
machines whose clocks differ, write at the same time, and exclusive creates see to that
(:mod:`strata.store.write.shared_writer`).
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
from strata.store.s3.bucket import Bucket

SECONDS = 60.0
"""A lease lasts that long from its last renewal …"""
RENEWED = 3
"""… and is renewed that often meanwhile."""
EVERY = 0.5
"""Seconds between two looks at somebody else's."""


@dataclass(frozen=True)
class Lease:
    """Who writes."""

    id: str
    """Tells two leases of one process apart."""
    process: int
    host: str
    expires: float
    """Seconds since 1970, by the holder's clock. 0: given back."""

    @property
    def holds(self) -> bool:
        return time.time() < self.expires and not self._is_dead()

    def _is_dead(self) -> bool:
        """Is it of a process of this machine that is not there any more?"""
        if self.host != socket.gethostname():
            return False
        with contextlib.suppress(PermissionError):  # it is there, and somebody else's
            try:
                os.kill(self.process, 0)
            except ProcessLookupError:
                return True
        return False

    @property
    def who(self) -> str:
        until = time.strftime("%H:%M:%S", time.localtime(self.expires))
        return f"process {self.process} on {self.host}, which has it until {until} unless renewed"


@contextlib.contextmanager
def hold(
    bucket: Bucket,
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
    heartbeat = _Heartbeat(bucket, key, own, tag, seconds)
    try:
        yield
    finally:
        heartbeat.end()


def _taken(bucket: Bucket, key: str, own: Lease, seconds: float) -> str | None:
    """The tag of our lease; None if somebody has it."""
    there, tag = _read(bucket, key)
    if there is not None and there.holds:
        return None
    try:
        data = _until(own, time.time() + seconds)
        return bucket.create(key, data) if tag is None else bucket.swap(key, data, tag)
    except FileExistsError:
        return None


def _read(bucket: Bucket, key: str) -> tuple[Lease | None, str | None]:
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


class _Heartbeat:
    """Renews a lease until it is ended, or somebody else has it."""

    def __init__(self, bucket: Bucket, key: str, own: Lease, tag: str, seconds: float) -> None:
        self._bucket, self._key, self._own = bucket, key, own
        self._tag, self._seconds = tag, seconds
        self._ending, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Give the lease back."""
        self._ending.set()
        self._thread.join()
        with contextlib.suppress(StoreRefused):  # it ends by itself
            self._swap(0.0)

    def _renew(self) -> None:
        while not self._lost and not self._ending.wait(self._seconds / RENEWED):
            with contextlib.suppress(StoreRefused):  # once more, the next time
                self._swap(time.time() + self._seconds)

    def _swap(self, expires: float) -> None:
        if self._lost:
            return
        try:
            self._tag = self._bucket.swap(self._key, _until(self._own, expires), self._tag)
        except FileExistsError:  # we were away for too long: see the first lines of this file
            self._lost = True
