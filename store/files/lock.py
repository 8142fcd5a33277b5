"""Who works with a file: one alone, or readers together, by locks that the kernel drops when their
process dies, however it dies.

A writer has a lock file, and says in it who it is, for people only. A reader shares the file that
vouches for what it reads (a commit, a record), for which it needs no right to write; who is about
to remove that asks for it alone. A lock is on a file, not on its name: whoever gets one looks
whether the file still has the name.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from strata.store.errors import LevelBusy, StoreRefused, refusals

EVERY = 0.1
"""Seconds between two tries."""
TRIES = 10
"""How often a directory is made that others may remove; some file systems let nobody make one."""
SHOWN = 80
"""Letters of a command that are shown."""
SHARED = stat.S_ISGID | stat.S_IWGRP
"""Rights of a directory (chmod g+ws) that a group works in."""
Waiting = Callable[[str], None] | None
"""Called with who works there, again and again until nobody does; it may raise to give up. None: do
not wait."""


@contextmanager
def hold(path: Path, what: str, waiting: Waiting = None) -> Iterator[None]:
    """Hold the lock file ``path``, which is made if need be, for the block.

    Args:
        what: is locked, for messages: ``x_3 train.v0``.

    Raises:
        LevelBusy: another process holds it and nobody wants to wait; says who.
        StoreRefused: no lock can be had here, for example because the disk is read-only.
    """
    said, flags = f"{what} is being written by", os.O_RDWR | os.O_CREAT
    while True:
        descriptor = _acquired(path, flags, fcntl.LOCK_EX, said, waiting)
        assert descriptor is not None
        try:
            with refusals(path):
                if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
                    path.unlink()  # of a user who did not share it; the next one is ours
                    continue
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, this_process().encode(), 0)
            yield
            return
        finally:
            os.close(descriptor)


def shared(path: Path) -> int | None:
    """A descriptor of a file that nobody removes before it is closed; None: there is no such file.
    Where the file system has no locks, the file is only open."""
    with suppress(OSError):
        try:
            return _acquired(path, os.O_RDONLY, fcntl.LOCK_SH, "", lambda who: None)
        except StoreRefused:
            return os.open(path, os.O_RDONLY)
    return None


@contextmanager
def alone(paths: Sequence[Path], what: str, waiting: Waiting = None) -> Iterator[None]:
    """Have files that readers share, those that are there, to oneself for the block.

    Raises:
        LevelBusy: others read one of them and nobody wants to wait; says who.
    """
    said = f"{what} is being read by"
    with ExitStack() as stack:
        for path in paths:
            descriptor = _acquired(path, os.O_RDWR, fcntl.LOCK_EX, said, waiting)
            if descriptor is not None:
                stack.callback(os.close, descriptor)
        yield


def _acquired(path: Path, flags: int, kind: int, said: str, waiting: Waiting) -> int | None:
    """A descriptor that has a lock on the file that has the name; None: there is none, and it is
    not to be made."""
    while (descriptor := opened(path, flags)) is not None:
        try:
            with refusals(path):
                if not _taken(descriptor, kind):
                    gc.collect()  # what nobody in this process has any more does not count
                while not _taken(descriptor, kind):
                    who = f"{said} {_holders(descriptor)}"
                    if waiting is None:
                        raise LevelBusy(who)
                    waiting(who)
                    time.sleep(EVERY)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def opened(path: Path, flags: int) -> int | None:
    """A descriptor of a file, if need be only for reading, which suffices for a lock. None: there
    is no file, and ``flags`` do not say to make one, and its directory."""
    make, directory = flags & os.O_CREAT, path.parent
    with refusals(path):
        for again in reversed(range(TRIES)):
            try:
                if make and not directory.exists():
                    missing = [p for p in (directory, *directory.parents) if not p.exists()]
                    for one in reversed(missing):
                        one.mkdir(exist_ok=True)
                        let_group(one)
                descriptor = os.open(path, flags, 0o666)
                if make:
                    let_group(path)
                return descriptor
            except FileNotFoundError:  # its directory may have gone at this moment
                if not make:
                    return None
                if not again:
                    raise
            except PermissionError:
                if not path.exists():
                    raise
                return os.open(path, os.O_RDONLY)
    return None


def let_group(path: Path) -> None:
    """Let the group of a directory that is ``SHARED`` work with what we made in it, whatever the
    umask."""
    if path.parent.stat().st_mode & SHARED == SHARED:
        facts = path.stat()
        if facts.st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(facts.st_mode) | (0o070 if path.is_dir() else 0o060))


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError, InterruptedError):
        return False
    return True


# ---- who it is ----------------------------------------------------------------------------------


def this_process() -> str:
    """This process, for others: ``process 7 on HOST since 2026-11-27 21:50:01 (COMMAND)``."""
    return _process(os.getpid(), time.time(), sys.argv)


def _process(pid: int, since: float, command: Sequence[str]) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    words = [*(Path(word).name for word in command[:1]), *command[1:]]
    shown = " ".join(shlex.join(words).split()).encode(errors="replace").decode()[:SHOWN]
    return f"process {pid} on {socket.gethostname()} since {began} ({shown})"


def _holders(descriptor: int) -> str:
    """Who has a lock on a file: as the kernel of this machine knows, or as the file says."""
    facts, pids = os.fstat(descriptor), set[int]()
    own = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    with suppress(OSError):  # Linux alone has it
        for line in Path("/proc/locks").read_text("utf-8").splitlines():
            _, kind, _, _, pid, place, *_ = line.split()
            if kind == "FLOCK" and place == own and int(pid) > 0:
                pids.add(int(pid))
    text = os.pread(descriptor, 4096, 0).decode(errors="replace")
    if not pids or any(text.startswith(f"process {pid} ") for pid in pids):
        return text if text.startswith("process ") else "another process"
    return " and ".join(map(_running, sorted(pids)))


def _running(pid: int) -> str:
    """A process of this machine, since when it runs, and its command."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        ticks = int(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19])
    except OSError:  # it has just gone
        return f"process {pid}"
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    python = len(words) > 1 and Path(words[0]).name.startswith("python")
    return _process(pid, boot + ticks / os.sysconf("SC_CLK_TCK"), words[python:])
