"""x_0 as a .beton, the file of the optional ffcv; and the only place that imports ffcv.

ffcv is fast and trusting. Its writer hangs when one of its processes fails and its format has no
checksum, so a .beton is written by a process of its own, looked over, and only then given its name.
A record in it says from which level it was written, and a field of it keeps every row's crc32c.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from strata.pipeline.errors import LoaderError
from strata.store.errors import DiskFull, refusals
from strata.store.files.files import DISK
from strata.store.files.lock import hold
from strata.store.files.publish import TEMPORARY, make_directory, opened
from strata.store.fingerprint import sha256
from strata.store.level.level import Level

IMAGE, LABEL, ROW, CHECK = "image", "label", "row", "crc32c"
"""Fields of a .beton, ffcv's columns f0 … f3. The last is of an image's bytes in the file."""
MODES = ("raw", "jpeg")
FORMAT = 1
"""Version of the record that binds a .beton to its level."""
PATIENCE = 120.0
"""Seconds without a row after which the writing process is taken to hang."""
POLL = 0.1
"""Seconds between two looks at the writing process."""
GRACE = 3.0
"""Seconds between asking the writing processes to end and ending them."""
NEWS = 64
"""Rows after which a worker of the writing process says that it is alive."""


def check() -> None:
    """Raises LoaderError, with what to do, unless ffcv can be used."""
    ffcv()


@cache
def ffcv() -> SimpleNamespace:
    """The parts of ffcv that we use, without what importing them does to torch.

    One function of ffcv sets the number of threads of numba and, for the whole process, of torch.
    It is called on import, by every loader and in every thread; from here on it leaves torch alone.

    Raises:
        LoaderError: ffcv cannot be imported.
    """
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ffcv imports distutils
            numba = import_module("numba")
            compiler = import_module("ffcv.pipeline.compiler").Compiler
            found = SimpleNamespace(
                numba=numba,
                Compiler=compiler,
                EpochIterator=import_module("ffcv.loader.epoch_iterator").EpochIterator,
                Graph=import_module("ffcv.pipeline.graph").Graph,
                PipelineSpec=import_module("ffcv.pipeline.pipeline_spec").PipelineSpec,
                OSCacheManager=import_module("ffcv.memory_managers").OSCacheManager,
                fields=import_module("ffcv.fields"),
                decoders=import_module("ffcv.fields.decoders"),
                types=import_module("ffcv.types"),
                Reader=import_module("ffcv.reader").Reader,
                DatasetWriter=import_module("ffcv.writer").DatasetWriter,
            )
    except Exception as error:  # what is built from source can fail in any way
        why = f"{type(error).__name__}: {error}"
        raise LoaderError(f"ffcv cannot be imported ({why}). `make ffcv` installs it") from error
    finally:
        torch.set_num_threads(threads)

    def set_num_threads(cls: Any, count: int) -> None:
        cls.num_threads = count
        numba.set_num_threads(count)

    compiler.set_num_threads = classmethod(set_num_threads)
    return found


# ---- reading ------------------------------------------------------------------------------------


def read_beton(path: Path, level: Level) -> Any:
    """ffcv's reader of a .beton that was written from this level, as it is now.

    Raises:
        LoaderError: there is none, it is damaged, or it was written from something else.
    """
    again = "Remove it, and write it again"
    if not path.exists():
        raise LoaderError(f"there is no {path}")
    try:
        reader = ffcv().Reader(str(path))
        descriptor = reader.field_descriptors[reader.field_names.index(ROW)]
        record = opened(descriptor["arguments"].tobytes().rstrip(b"\0"), path)
        whole = record["format"] == FORMAT and record["index"] == index_digest(reader)
    except Exception as error:  # ffcv believes every byte of a header
        raise LoaderError(f"{path} is no .beton of ours ({error!r}). {again}") from error
    if not whole:
        raise LoaderError(f"{path} is damaged: its index is not the one that was written. {again}")
    if record["content_root"] != level.content_root:
        raise LoaderError(
            f"{path} was written from other rows than {level.key.label} has now. {again}"
        )
    return reader


def places(reader: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offset of each row's image in a .beton, and its size in bytes: two of uint64 (rows,).

    Raises:
        LoaderError: the allocation table does not have every row once, or says otherwise.
    """
    table, column = reader.alloc_table, reader.metadata["f0"]
    table = table[np.argsort(table["sample_id"], kind="stable")]
    pointers = column["data_ptr"] if column.dtype.names else column
    rows = np.arange(reader.num_samples)
    if not (np.array_equal(table["sample_id"], rows) and np.array_equal(table["ptr"], pointers)):
        raise LoaderError(f"{reader.file_name}: ffcv's allocation table is not whole")
    return table["ptr"].astype(np.uint64), table["size"].astype(np.uint64)


def index_digest(reader: Any) -> str:
    """sha256 over everything in a .beton but the images and the record itself."""
    descriptors = reader.field_descriptors.copy()
    descriptors["arguments"][reader.field_names.index(ROW)] = 0
    parts = (reader.header, descriptors, reader.metadata, reader.alloc_table)
    return sha256(b"".join(part.tobytes() for part in parts))


# ---- writing ------------------------------------------------------------------------------------


def write_images(
    path: Path,
    level: Level,
    mode: str = "raw",
    quality: int = 90,
    tick: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write x_0 as a .beton, whole and durable or not at all; an old one is replaced.

    Args:
        level: x_0: uint8 (channel, y, x) rows, with ``labels`` beside it.
        mode: ``raw``, or ``jpeg`` for images of three channels.
        quality: of the JPEG, 1 … 100.
        tick: called with rows done since the last call; what it raises stops the writing.

    Raises:
        LoaderError: no ffcv; a JPEG of grey images; the writing process failed or hung.
        LevelBusy: another process writes the same file.
        DiskFull, StoreRefused: the file system does not let us.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    check()
    if mode == "jpeg" and level.geometry.sample[0] != 3:
        raise LoaderError(
            f"a JPEG has 3 channels, not the {level.geometry.sample[0]} of {level.key.label}: "
            "write it raw"
        )
    order = {"mode": mode, "quality": quality, "rows": len(level), "key": vars(level.key)}
    order |= {"root": str(level.directory.parent.parent), "content_root": level.content_root}
    make_directory(path.parent)
    with hold(path.with_name(f".{path.name}.lock"), path.name), _temporary(path) as temporary:
        needed, free = len(level) * level.geometry.row_bytes, DISK.free(path)
        if mode == "raw" and needed > free:
            raise DiskFull(str(path), needed, free)
        _write_apart({**order, "path": str(temporary)}, tick)
        with refusals(path):
            with temporary.open("rb+") as file:
                DISK.sync(file.fileno())
            DISK.rename(temporary, path)
            DISK.sync_directory(path.parent)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name for the half-written file; gone in the end, with what killed writers have left."""
    prefix = f"{TEMPORARY}{path.name}-"
    with refusals(path):
        for name in DISK.names(path.parent):
            if name.startswith(prefix):
                DISK.unlink(path.parent / name)
    temporary = path.with_name(f"{prefix}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            DISK.unlink(temporary)


def _write_apart(order: dict[str, Any], tick: Callable[[int], None]) -> None:
    """Run ffcv's writer in a process group of its own, and end it when it fails or hangs."""
    command = [sys.executable, "-m", "strata.pipeline.feed.ffcv.beton_worker", json.dumps(order)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, start_new_session=True, env=environment
        )
        try:
            _follow(process, order["rows"], tick)
        finally:
            _end(process)
        if process.returncode:
            said.seek(0)
            errors = re.findall(r"^[A-Za-z_][\w.]*: .*", said.read().decode(errors="replace"), re.M)
            why = errors[-1] if errors else f"exit code {process.returncode}"
            raise LoaderError(f"ffcv's writer failed: {why}")


def _follow(process: subprocess.Popen[bytes], rows: int, tick: Callable[[int], None]) -> None:
    """Wait for the end. Raises LoaderError if nothing is heard for too long.

    Silence is counted in looks: a machine that slept is not a writer that hangs.
    """
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    done, silent = 0, 0
    while process.poll() is None:
        time.sleep(POLL)
        news = len(process.stdout.read() or b"") * NEWS
        done, before = min(rows, done + news), done
        tick(done - before)
        silent = 0 if news else silent + 1
        if silent * POLL > PATIENCE:
            raise LoaderError(f"ffcv's writer has written nothing for {PATIENCE:.0f} s; stopped it")
    if process.returncode == 0:
        tick(rows - done)  # said between the last look and the end


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the group. Python's tracker of shared memory takes no notice of SIGTERM
    and frees the memory when the others are gone, so it is given the time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            until = time.monotonic() + GRACE
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)  # is there anybody?
                time.sleep(POLL)
    process.wait()
    if process.stdout:
        process.stdout.close()
