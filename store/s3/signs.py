"""Signs of who works with a level in a bucket, where no lock ends with its process.

    locks/x_1-3c17fd871988/reads-…   also writes-… and removes-…: who it is, as JSON

Whoever begins puts a sign, and only then looks for those that exclude it. Of two that begin at once
at least one therefore sees the other and gives way. A sign that a killed process has left is not
believed on its own machine; elsewhere nobody can know, so it stays until it is removed by hand.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import uuid
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from strata.store.errors import LevelBusy, StoreError
from strata.store.files.lock import this_process

if TYPE_CHECKING:
    from strata.store.s3.s3 import S3Bucket

READS, WRITES, REMOVES = "reads", "writes", "removes"


PUT: dict[Path, S3Bucket] = {}
"""Signs of this process."""
LEFT: deque[Path] = deque()
"""Those that nobody has any more. They go with the next request for signs, or with the process: a
request from within the garbage collector could wait for the one that it interrupts."""


class Sign:
    """A sign of this process, until :meth:`remove` is called, or nobody has the object."""

    def __init__(self, bucket: S3Bucket, place: Path, kind: str) -> None:
        """
        Args:
            place: where the signs at some levels are.
        """
        self._bucket, self._path = bucket, place / f"{kind}-{uuid.uuid4().hex}"
        bucket.put(self._path, json.dumps({"who": this_process(), **_me()}).encode())
        PUT[self._path] = bucket

    def remove(self) -> None:
        LEFT.append(self._path)
        take_away(LEFT)

    def __del__(self) -> None:
        LEFT.append(self._path)

    def refuse_beside(self, *kinds: str) -> None:
        """Raises LevelBusy, and takes the sign away, if others have put signs of these kinds."""
        if found := self.others(*kinds):
            self.remove()
            raise LevelBusy(found[0])

    def others(self, *kinds: str) -> list[str]:
        """Who else has put signs of these kinds, each in a sentence. This thread may write what it
        removes."""
        take_away(LEFT)
        found, me, place = [], _me(), self._path.parent
        for name in self._bucket.names(place):
            kind, path = name.partition("-")[0], place / name
            with suppress(FileNotFoundError):
                if kind in kinds and path != self._path:
                    sign = json.loads(self._bucket.read(path))
                    here = sign["machine"] == me["machine"] != ""
                    if here and not Path(f"/proc/{sign['process']}").exists():
                        self._bucket.unlink(path)
                    elif kind != WRITES or not me.items() <= sign.items():
                        who = f"{sign['who']} {kind} {place.name}"
                        found.append(f"{who}; if it is gone for good, remove {path}")
        return found


def _me() -> dict[str, object]:
    """This thread; a machine is one since it was started, and has one numbering of processes."""
    machine = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return {"machine": machine, "process": os.getpid(), "thread": threading.get_native_id()}


def take_away(paths: deque[Path]) -> None:
    """Remove signs of this process."""
    with suppress(IndexError):  # there is none any more: threads share the work
        while True:
            path = paths.popleft()
            if bucket := PUT.pop(path, None):
                with suppress(StoreError):
                    bucket.unlink(path)


atexit.register(lambda: take_away(deque(PUT)))
os.register_at_fork(after_in_child=PUT.clear)
