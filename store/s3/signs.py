"""Signs of who works with a level in a bucket, where no lock ends with its process.

    locks/x_1-3c17fd871988/reads-…   also writes-… and removes-…: who it is, as JSON

Whoever begins puts a sign, and only then looks for those that exclude it. Of two that begin at once
at least one therefore sees the other and gives way. A sign that a killed process has left is not
believed on its own machine; elsewhere nobody can know, so it stays until it is removed by hand.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from strata.store.errors import LevelBusy, StoreError
from strata.store.files.lock import this_process

if TYPE_CHECKING:
    from strata.store.s3.s3 import S3Bucket

READS, WRITES, REMOVES = "reads", "writes", "removes"


class Sign:
    """A sign of this process, until :attr:`remove` is called, or nobody has the object."""

    def __init__(self, bucket: S3Bucket, place: Path, kind: str) -> None:
        """
        Args:
            place: where the signs at some levels are.
        """
        self._bucket, self._path = bucket, place / f"{kind}-{uuid.uuid4().hex}"
        bucket.put(self._path, json.dumps({"who": this_process(), **_me()}).encode())
        self.remove = weakref.finalize(self, _remove, bucket, self._path, os.getpid())

    def refuse_beside(self, *kinds: str) -> None:
        """Raises LevelBusy, and takes the sign away, if others have put signs of these kinds."""
        if found := self.others(*kinds):
            self.remove()
            raise LevelBusy(found[0])

    def others(self, *kinds: str) -> list[str]:
        """Who else has put signs of these kinds, each in a sentence. This thread may write what it
        removes."""
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


def _remove(bucket: S3Bucket, path: Path, process: int) -> None:
    if process == os.getpid():  # and no child of it
        with suppress(StoreError):
            bucket.unlink(path)
