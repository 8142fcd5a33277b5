"""Writing x_0 as a .beton, whole and durable or not at all.

ffcv's writer hangs when one of its processes fails, so it runs in a process of its own: this file
again, as ``python -m strata.pipeline.feed.ffcv.write ORDER``. That writes with ffcv, looks over
what came out, adds the checksums and the record, and says nothing but a dot for every 64 rows. It
ends with a code other than 0 as soon as one of ffcv's workers does.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from PIL import Image

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.beton import ffcv
from strata.store.errors import DiskFull, refusals
from strata.store.files.files import DISK
from strata.store.files.lock import hold
from strata.store.files.publish import TEMPORARY, make_directory, sealed
from strata.store.level.layout import LevelKey
from strata.store.level.level import Level

PATIENCE = 120.0
"""Seconds without a row after which the writing process is taken to hang."""
POLL = 0.1
"""Seconds between two looks at the writing process."""
GRACE = 3.0
"""Seconds between asking the writing processes to end and ending them."""
NEWS = 64
"""Rows after which a worker of the writing process says that it is alive."""
PAGE = 8 << 20
"""Bytes of ffcv's unit of writing, at least; an image must fit in one."""
SPOTS = 64
"""Rows compared with the level after writing."""
QUALITY = 90
"""What the record of a file without JPEG says of their quality."""


def write_images(
    path: Path,
    level: Level,
    jpeg: int | None = None,
    tick: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write x_0 as a .beton, whole and durable or not at all; an old one is replaced.

    Args:
        level: x_0: uint8 (channel, y, x) rows, with ``labels`` beside it.
        jpeg: quality, 1 … 100, of images of three channels; None: raw.
        tick: called with rows done since the last call; what it raises stops the writing.

    Raises:
        LoaderError: no ffcv; a JPEG of grey images; the writing process failed or hung.
        LevelBusy: another process writes the same file.
        DiskFull, StoreRefused: the file system does not let us.
    """
    ffcv()
    if jpeg and level.geometry.sample[0] != 3:
        raise LoaderError(
            f"a JPEG has 3 channels, not the {level.geometry.sample[0]} of {level.key.label}: "
            "write it raw"
        )
    make_directory(path.parent)
    prefix = f"{TEMPORARY}{path.name}-"
    temporary = path.with_name(f"{prefix}{uuid.uuid4().hex}")
    order = {"path": str(temporary), "jpeg": jpeg, "rows": len(level), "key": vars(level.key)}
    order |= {"root": str(level.directory.parent.parent), "content_root": level.content_root}
    with hold(path.with_name(f".{path.name}.lock"), path.name):
        with refusals(path):
            for name in DISK.names(path.parent):
                if name.startswith(prefix):  # what killed writers have left
                    DISK.unlink(path.parent / name)
        needed, free = len(level) * level.geometry.row_bytes, DISK.free(path)
        if not jpeg and needed > free:
            raise DiskFull(str(path), needed, free)
        try:
            _write_apart(order, tick)
            with refusals(path):
                with temporary.open("rb+") as file:
                    DISK.sync(file.fileno())
                DISK.rename(temporary, path)
                DISK.sync_directory(path.parent)
        finally:
            with suppress(OSError):
                DISK.unlink(temporary)


def _write_apart(order: dict[str, Any], tick: Callable[[int], None]) -> None:
    """Run ffcv's writer in a process group of its own, and end it when it fails or hangs."""
    command = [sys.executable, "-m", "strata.pipeline.feed.ffcv.write", json.dumps(order)]
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
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            until = time.monotonic() + GRACE
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)  # is there anybody?
                time.sleep(POLL)
    process.wait()
    if process.stdout:
        process.stdout.close()


# ---- the process that writes --------------------------------------------------------------------


class Images:
    """The rows of x_0 as ffcv's fields want them."""

    def __init__(self, level: Level) -> None:
        self.level, self.labels = level, level.array("label")
        self.rgb = level.geometry.sample[0] == 3

    def __len__(self) -> int:
        return len(self.level)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, int, int]:
        if row % NEWS == 0:
            os.write(1, b".")  # fails when nobody listens any more, which ends an orphan
        # Labels are read from the level: what is no class of a sample has no place here.
        label = int(self.labels[row]) if self.labels.dtype.kind == "i" else -1
        return self.image(int(row)), label, int(row), 0

    def image(self, row: int) -> np.ndarray:
        """uint8 (y, x, channel)."""
        (image,) = self.level.read(row, row + 1)
        return np.moveaxis(image, 0, -1)


def main(order: dict[str, Any]) -> None:
    """Write ``order["path"]``. Raises LoaderError: what ffcv wrote is not what it was given."""
    level = Level.open(Path(order["root"]), LevelKey(**order["key"]))
    _expect(level.content_root == order["content_root"], "x_0 has been written again meanwhile")
    images, fields, jpeg = Images(level), ffcv().fields, order["jpeg"]
    if images.rgb:
        kind = "jpg" if jpeg else "raw"
        image = fields.RGBImageField(write_mode=kind, jpeg_quality=jpeg or QUALITY)
    else:
        image = fields.NDArrayField(level.geometry.dtype, level.geometry.lying)
    others = {name: fields.IntField() for name in (beton.LABEL, beton.ROW, beton.CHECK)}
    page = max(PAGE, 1 << (level.geometry.row_bytes - 1).bit_length())
    workers = len(os.sched_getaffinity(0))
    writer = ffcv().DatasetWriter(order["path"], {beton.IMAGE: image, **others}, page, workers)
    signal.signal(signal.SIGCHLD, _stop_if_a_worker_failed)
    writer.from_indexed_dataset(images)
    _finish(Path(order["path"]), images, jpeg)


def _stop_if_a_worker_failed(*_: object) -> None:
    """ffcv waits for ever for the rows of a worker that has died."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[1]:
                os._exit(1)


def _finish(path: Path, images: Images, jpeg: int | None) -> None:
    """Look over what was written, and add to it what ffcv does not: checksums and the record."""
    reader = ffcv().Reader(str(path))
    _expect(reader.num_samples == len(images), f"{reader.num_samples} rows, not {len(images)}")
    begins, sizes = beton.places(reader)
    memory = np.memmap(path, np.uint8, "r")
    stored = [memory[a : a + n] for a, n in zip(begins.tolist(), sizes.tolist(), strict=True)]
    for row in np.unique(np.linspace(0, len(images) - 1, SPOTS).astype(int)).tolist():
        image = images.image(row)
        if jpeg:
            with Image.open(io.BytesIO(stored[row].tobytes())) as decoded:
                same = np.asarray(decoded).shape == image.shape
        else:
            same = np.array_equal(stored[row], image.ravel())
        _expect(same, f"row {row} is not the one that was to be written")
    fields_at = ffcv().types.HeaderType.itemsize
    rows_at = fields_at + reader.field_descriptors.nbytes
    rows: Any = np.memmap(path, reader.metadata_type, "r+", rows_at, len(images))
    rows["f3"] = [crc32c(row) for row in stored]
    rows.flush()
    body = {"format": beton.FORMAT, "content_root": images.level.content_root}
    body |= {"mode": "jpeg" if jpeg else "raw", "quality": jpeg or QUALITY}
    index = beton.index_digest(ffcv().Reader(str(path)))
    record = np.frombuffer(sealed({**body, "index": index}), np.uint8)
    names, kind = reader.field_names, ffcv().types.FieldDescType
    fields: Any = np.memmap(path, kind, "r+", fields_at, len(names))
    # ffcv has 1,024 bytes for the arguments of a field, and an integer has none.
    fields["arguments"][names.index(beton.ROW), : len(record)] = record
    fields.flush()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise LoaderError(otherwise)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
