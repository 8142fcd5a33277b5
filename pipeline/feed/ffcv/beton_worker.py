"""The process that writes a .beton: ``python -m strata.pipeline.feed.ffcv.beton_worker ORDER``, by
``write_images``.

It writes with ffcv, looks over what came out, adds the checksums and the record, and says nothing
but a dot for every 64 rows. It ends with a code other than 0 as soon as one of ffcv's workers does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from PIL import Image

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.beton import ffcv
from strata.store.files.publish import sealed
from strata.store.level.layout import LevelKey
from strata.store.level.level import Level

PAGE = 8 << 20
"""Bytes of ffcv's unit of writing, at least; an image must fit in one."""
SPOTS = 64
"""Rows compared with the level after writing."""


class Images:
    """The rows of x_0 as ffcv's fields want them."""

    def __init__(self, level: Level) -> None:
        self.level, self.labels = level, level.array("labels")
        self.rgb = level.geometry.sample[0] == 3

    def __len__(self) -> int:
        return len(self.level)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, int, int]:
        if row % beton.NEWS == 0:
            os.write(1, b".")  # fails when nobody listens any more, which ends an orphan
        return self.image(int(row)), int(self.labels[row]), int(row), 0

    def image(self, row: int) -> np.ndarray:
        """uint8 (y, x, channel) for colours, which is how ffcv has them; else as stored."""
        (image,) = self.level.read(row, row + 1)
        return np.ascontiguousarray(image.transpose(1, 2, 0)) if self.rgb else image


def main(order: dict[str, Any]) -> None:
    """Write ``order["path"]``.

    Raises:
        LoaderError: what ffcv wrote is not what it was given.
    """
    level = Level.open(Path(order["root"]), LevelKey(**order["key"]))
    _expect(level.content_root == order["content_root"], "x_0 has been written again meanwhile")
    images = Images(level)
    _write(images, order)
    _finish(Path(order["path"]), images, order)


def _write(images: Images, order: dict[str, Any]) -> None:
    fields, geometry = ffcv().fields, images.level.geometry
    if images.rgb:
        kind = {"raw": "raw", "jpeg": "jpg"}[order["mode"]]
        image = fields.RGBImageField(write_mode=kind, jpeg_quality=order["quality"])
    else:
        image = fields.NDArrayField(geometry.dtype, geometry.stored)
    others = {name: fields.IntField() for name in (beton.LABEL, beton.ROW, beton.CHECK)}
    page = max(PAGE, 1 << (geometry.row_bytes - 1).bit_length())
    workers = len(os.sched_getaffinity(0))
    writer = ffcv().DatasetWriter(order["path"], {beton.IMAGE: image, **others}, page, workers)
    signal.signal(signal.SIGCHLD, _stop_if_a_worker_failed)
    writer.from_indexed_dataset(images)


def _stop_if_a_worker_failed(*_: object) -> None:
    """ffcv waits for ever for the rows of a worker that has died."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[1]:
                os._exit(1)


def _finish(path: Path, images: Images, order: dict[str, Any]) -> None:
    """Look over what was written, and add to it what ffcv does not: checksums and the record."""
    reader = ffcv().Reader(str(path))
    _expect(reader.num_samples == len(images), f"{reader.num_samples} rows, not {len(images)}")
    begins, sizes = beton.places(reader)
    memory = np.memmap(path, np.uint8, "r")
    stored = [memory[a : a + n] for a, n in zip(begins.tolist(), sizes.tolist(), strict=True)]
    for row in np.unique(np.linspace(0, len(images) - 1, SPOTS).astype(int)).tolist():
        image = images.image(row)
        if order["mode"] == "raw":
            same = np.array_equal(stored[row], image.ravel())
        else:
            with Image.open(io.BytesIO(stored[row].tobytes())) as decoded:
                same = np.asarray(decoded).shape == image.shape
        _expect(same, f"row {row} is not the one that was to be written")
    fields_at = ffcv().types.HeaderType.itemsize
    rows_at = fields_at + reader.field_descriptors.nbytes
    rows: Any = np.memmap(path, reader.metadata_type, "r+", rows_at, len(images))
    rows["f3"] = [crc32c(row) for row in stored]
    rows.flush()
    body = {name: order[name] for name in ("content_root", "mode", "quality")}
    index = beton.index_digest(ffcv().Reader(str(path)))
    record = np.frombuffer(sealed({"format": beton.FORMAT, **body, "index": index}), np.uint8)
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
