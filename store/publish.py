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
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from store.errors import DiskFull, LevelDamaged
from store.fingerprint import canonical, sha256

TEMPORARY = ".tmp-"


def put_exclusive(directory: Path, name: str, data: bytes | memoryview) -> bool:
    """Publish ``data`` as ``directory/name`` unless the name is taken.

    Returns:
        True if this call published it, False if the name already existed (it is left alone).

    Raises:
        DiskFull: no space; nothing is left behind.
        OSError: any other refusal of the file system. No part of the file is left behind; if only
            the directory's sync failed, the whole file is there, but may not outlive a power cut.
    """
    with _disk_full_named(directory, name, data):
        with _temporary(directory, data) as temporary:
            try:
                os.link(temporary, directory / name)
            except FileExistsError:
                return False
        sync_directory(directory)
        return True


def replace(directory: Path, name: str, data: bytes | memoryview) -> None:
    """Publish ``data`` as ``directory/name``, replacing what was there in one step."""
    with _disk_full_named(directory, name, data):
        with _temporary(directory, data) as temporary:
            temporary.replace(directory / name)
        sync_directory(directory)


@contextlib.contextmanager
def _temporary(directory: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A synced temporary file holding ``data``; gone when the block ends, whatever happened."""
    path = directory / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        _write_synced(path, data)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        view = memoryview(data)
        while len(view):
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_full_named(directory: Path, name: str, data: bytes | memoryview) -> Iterator[None]:
    """Say what was to be written and what is free, once our own temporary file is gone."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(directory).free
            raise DiskFull(str(directory / name), len(data), free) from error
        raise


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> Path:
    """``mkdir -p`` whose new names are durable up to the first parent that existed."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_directory(made.parent)
    return path


def npy(array: np.ndarray) -> bytes:
    """The bytes of an ``.npy`` file; an array of Python objects is refused (``ValueError``)."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def sealed(body: Any) -> bytes:
    """JSON text ``{"body": …, "sha256": …}`` that proves itself."""
    record = {"sha256": sha256(canonical(body)), "body": body}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def unseal(path: Path) -> Any:
    """Read a sealed file back.

    Raises:
        FileNotFoundError: there is none.
        LevelDamaged: it does not hash to what it says.
    """
    try:
        record = json.loads(path.read_bytes())
        if record["sha256"] == sha256(canonical(record["body"])):
            return record["body"]
    except (ValueError, KeyError, TypeError):
        pass
    raise LevelDamaged(f"{path} is damaged: its content does not match its own sha256")
