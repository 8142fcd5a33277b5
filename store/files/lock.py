"""One writer at a time, by a lock that the kernel drops when its process dies, however it dies.

A lock file is never removed: the next process locks the same inode, and a removed one would let two
processes hold "the" lock. What is written in it is for people only.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from strata.store.errors import LevelBusy, refusals

EVERY = 0.1
"""Seconds between two tries."""


@contextmanager
def hold(path: Path, what: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock ``path`` for the block.

    Args:
        what: is locked, for messages: ``x_3 train.v0``.
        waiting: called with who holds it, again and again until it is free; it may raise to give
            up. None: do not wait.

    Raises:
        LevelBusy: another process holds it and nobody wants to wait; says who.
        StoreRefused: no lock can be had here, for example because the disk is read-only.
    """
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        with refusals(path):
            while not _taken(file):
                holder = path.read_text("utf-8") or "another process"
                who = f"{what} is being written by {holder}"
                if waiting is None:
                    raise LevelBusy(who)
                waiting(who)
                time.sleep(EVERY)
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
            file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError, InterruptedError):
        return False
    return True
