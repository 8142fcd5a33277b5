"""How one file reaches the disk: whole, durable and exclusive, or not at all.

A file is written under a temporary name, synced, and linked to its name; the directory is synced
last. A reader can therefore meet a file or its absence, never a part of it, even after power loss.
A failed fsync is not retried (the kernel may have dropped the dirty pages): the temporary file is
removed and the error raised.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from strata.store.errors import LevelDamaged, refusals
from strata.store.files.files import DISK, Files, WholeFiles
from strata.store.fingerprint import canonical, sha256

TEMPORARY = ".tmp-"
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""How file systems without hard links (FAT, some network mounts) refuse one."""
START_BYTES = 4 << 20
"""Written before the disk is told to begin with them: without that it would begin at the sync."""

WRITE_BYTES = 512 << 10
"""Written by one call. The kernel takes pages as large as a call's data for the page cache, and
large ones are often memory that a virtual machine has never touched, which costs several times as
much as the copy."""

Buffers = bytes | Sequence[bytes | memoryview]
"""What a file is to hold: bytes, or pieces of it in their order, each a contiguous buffer."""


def put_exclusive(directory: Path, name: str, data: Buffers, files: Files = DISK) -> bool:
    """Publish ``data`` as ``directory/name`` unless the name is taken.

    Returns:
        True if this call published it, False if the name already existed (it is left alone).

    Raises:
        DiskFull: no space; nothing is left behind.
        StoreRefused: any other refusal of the file system. No part of the file is left behind; if
            only the directory's sync failed, the whole file is there, but may not outlive a power
            cut.
    """
    if isinstance(files, WholeFiles):
        return files.put_exclusive(directory / name, joined(data))
    with refusals(directory / name, _length(data)):
        with _temporary(directory, data, files) as temporary:
            try:
                _link(temporary, directory / name, files)
            except FileExistsError:
                return False
        files.sync_directory(directory)
        return True


def replace(directory: Path, name: str, data: Buffers, files: Files = DISK) -> None:
    """Publish ``data`` as ``directory/name``, replacing what was there in one step.

    Raises:
        DiskFull, StoreRefused: as :func:`put_exclusive`; the file that was there is still there.
    """
    if isinstance(files, WholeFiles):
        return files.put(directory / name, joined(data))
    with refusals(directory / name, _length(data)):
        with _temporary(directory, data, files) as temporary:
            files.rename(temporary, directory / name)
        files.sync_directory(directory)


def _pieces(data: Buffers) -> list[memoryview]:
    parts = [data] if isinstance(data, bytes) else data
    return [memoryview(part).cast("B") for part in parts if len(part)]


def joined(data: Buffers) -> bytes:
    """What a file is to hold, in one piece."""
    return data if isinstance(data, bytes) else b"".join(data)


def _length(data: Buffers) -> int:
    return sum(len(piece) for piece in _pieces(data))


@contextlib.contextmanager
def _temporary(directory: Path, data: Buffers, files: Files) -> Iterator[Path]:
    """A synced temporary file holding ``data``; gone when the block ends, whatever happened."""
    path, written, started = directory / f"{TEMPORARY}{uuid.uuid4().hex}", 0, 0
    try:
        descriptor = files.create(path)
        try:
            for piece in _pieces(data):
                while len(piece):
                    taken = files.write(descriptor, piece[:WRITE_BYTES])
                    piece, written = piece[taken:], written + taken
                    if written - started >= START_BYTES:
                        files.start_writing(descriptor, started, written - started)
                        started = written
            files.sync(descriptor)
        finally:
            files.close(descriptor)
        yield path
    finally:
        # A second error here (the disk is failing) must not hide the first; the name says what it
        # is, and the next writer removes it.
        with contextlib.suppress(OSError):
            files.unlink(path)


def _link(temporary: Path, target: Path, files: Files) -> None:
    """Exclusive where the file system can; else by looking first, which the level's lock covers."""
    try:
        files.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if files.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists", str(target)) from error
        files.rename(temporary, target)


def make_directory(path: Path, files: Files = DISK) -> Path:
    """``mkdir -p`` whose names are durable, the last one that existed with them: a killed process
    may have made that and not synced it.

    Raises:
        DiskFull, StoreRefused: the file system does not let us.
    """
    if isinstance(files, WholeFiles):  # which have no directories
        return path
    with refusals(path):
        missing = [p for p in (path, *path.parents) if not files.exists(p)]
        existing = missing[-1].parent if missing else path
        with contextlib.suppress(
            PermissionError
        ):  # /home may be closed to us; we made nothing there
            files.sync_directory(existing.parent)
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):
                files.make_directory(directory)
            files.sync_directory(directory.parent)
    return path


def npy(array: np.ndarray) -> bytes:
    """The bytes of an ``.npy`` file; an array of Python objects is refused (``ValueError``)."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file. Raises LevelDamaged: it is not there, or none."""
    with present(path, "what it belongs to is there"):
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise LevelDamaged(f"{path} is damaged: {error}") from None


def sealed(body: Any) -> bytes:
    """JSON text ``{"sha256": …, "body": …}`` that proves itself."""
    record = {"sha256": sha256(canonical(body)), "body": body}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # as canonical() does


def unseal(path: Path, files: Files = DISK, shape: Any = object) -> Any:
    """Read a sealed file back.

    Args:
        shape: that of records of this kind, as :func:`misfit` has it.

    Raises:
        FileNotFoundError: there is none.
        LevelDamaged: it is not, byte for byte, what was sealed, or a record of another kind.
    """
    try:
        return opened(files.read(path), path, shape)
    except IsADirectoryError:
        raise LevelDamaged(f"{path} is damaged: it is a directory") from None


def opened(data: bytes, path: Path, shape: Any = object) -> Any:
    """The body of a sealed file's bytes. Raises LevelDamaged as :func:`unseal` does."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        body = json.loads(data)["body"]
        if sealed(body) == data:
            return fitting(body, shape, path)
    raise LevelDamaged(f"{path} is damaged: its content does not match its own sha256")


def fitting(body: Any, shape: Any, path: Path) -> Any:
    """The body of a record that has its shape. Raises LevelDamaged: it has not; names the field."""
    if (at := misfit(body, shape)) is not None:
        what = f"{at[1:]!r} is missing or of another type" if at else "it has no fields"
        raise LevelDamaged(f"{path} is damaged: it is a record of another kind: {what}")
    return body


def misfit(value: Any, shape: Any, at: str = "") -> str | None:
    """The field in which a JSON value has not a shape: ``.levels.test.rows``; None: it has it.

    A shape is a type (``float``: any number; ``object``: anything; ``EllipsisType``: it need not be
    there), a tuple of shapes of which it has one, a list with the shape of every entry, or a
    dictionary with those of some fields, or, as ``{str: shape}``, with that of every field.
    """
    match shape, value:
        case tuple(), _:
            tried = [misfit(value, one, at) for one in shape]
            return None if None in tried else max(map(str, tried), key=len)
        case list(), list():
            parts = [(one, shape[0], f"{at}[{i}]") for i, one in enumerate(value)]
        case dict(), dict():
            shapes = dict.fromkeys(value, shape[str]) if str in shape else shape
            parts = [(value.get(key, ...), one, f"{at}.{key}") for key, one in shapes.items()]
        case _:
            fits = shape is object or type(value) is shape or (shape, type(value)) == (float, int)
            return None if fits else at
    return next((found for part in parts if (found := misfit(*part)) is not None), None)


@contextlib.contextmanager
def present(path: Path, why: str) -> Iterator[None]:
    """Look at a committed file: that it is not there is damage, any other refusal the disk's."""
    with refusals(path):
        try:
            yield
        except FileNotFoundError:
            raise LevelDamaged(f"{path} is missing; {why}") from None


def read_hashed(path: Path, expected: str, files: Files = DISK) -> bytes:
    """Bytes of a small committed file. Raises LevelDamaged if it is gone or another one."""
    with present(path, "the level was committed with it"):
        data = files.read(path)
    if sha256(data) != expected:
        raise LevelDamaged(f"{path} is not the one that was committed")
    return data
