"""x_0 as a .beton, the file of the optional ffcv; and the only place that imports ffcv.

ffcv is fast and trusting, and its format has no checksum. So a record in a .beton says from which
level it was written, and a field of it keeps every row's crc32c.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from strata.pipeline.errors import LoaderError
from strata.store.files.publish import opened
from strata.store.fingerprint import sha256
from strata.store.level.level import Level

IMAGE, LABEL, ROW, CHECK = "image", "label", "row", "crc32c"
"""Fields of a .beton, ffcv's columns f0 … f3. The last is of an image's bytes in the file."""
FORMAT = 1
"""Version of the record that binds a .beton to its level."""


@cache
def ffcv() -> SimpleNamespace:
    """The parts of ffcv that we use, without what importing them does to torch.

    That sets torch's number of threads, for the whole process.

    Raises:
        LoaderError: ffcv cannot be imported.
    """
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ffcv imports distutils
            return SimpleNamespace(
                Compiler=import_module("ffcv.pipeline.compiler").Compiler,
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
