"""A level as a Zarr group: what lies beside its shards, so that other programs open it as one.

LEVEL/zarr.json            the group, with the metadata of all its arrays
      x/zarr.json          the values: shards are beside it
      label/  sample_id/   zarr.json, and all values in the file ``c.0``; a label of every token of
                           a sample in ``c.0.0``
      scale/  zero/        the same; of codes of 8 and 4 bits

The metadata is zarr's own. Nothing that reads a level looks at it: the commit says the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from strata.store.level.codec import zarr_metadata
from strata.store.level.layout import BEGUN, Geometry, LevelKey

CHANNEL = "channel"
"""Stands for the axis that has the features: what it is called depends on the level."""
SMALL = {
    "label": ("sample", "class of the sample, counted from 0; as float32, numbers to be met"),
    "sample_id": ("sample", "number of the sample in its split of the data set"),
    "scale": (CHANNEL, "step between the codes of the channel"),
    "zero": (CHANNEL, "code of the value 0 in the channel"),
}
"""Every small array that a level can have: its first dimension, and what it is, for people. A
second one is ``token``, or of labels that are numbers ``number``."""


def chunk_name(shape: Sequence[int]) -> str:
    """Zarr's key of the one chunk of a small array, which is its elements, little-endian."""
    return f"c{'.0' * len(shape)}"


def small_files(
    geometry: Geometry, key: LevelKey, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """The small files of a level.

    Args:
        arrays: (n,), or of labels (n, token) or (n, number), by a name of ``SMALL``.

    Returns:
        Bytes of every ``zarr.json``, by its path in the level; and the arrays, little-endian, whose
        elements are the files ``NAME/c.0``, as :func:`chunk_name` has them.
    """
    little = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    forms = tuple((name, array.dtype.str, array.shape) for name, array in little.items())
    return dict(_metadata(geometry, key, forms)), little


@cache
def _metadata(
    geometry: Geometry, key: LevelKey, forms: tuple[tuple[str, str, tuple[int, ...]], ...]
) -> tuple[tuple[str, bytes], ...]:
    """Path and bytes of every ``zarr.json``. A hole in a small array is as loud as one in x: -1,
    NaN or 255."""
    import zarr
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {BEGUN: cpu.Buffer.from_bytes(zarr_metadata(geometry, key))}
    memory = MemoryStore(files)
    attributes = {"level": key.label, **vars(key), "precision": geometry.precision}
    untyped: Any = zarr
    group = untyped.create_group(memory, attributes=attributes)
    for name, dtype, shape in forms:
        dimension, what = (said.replace(CHANNEL, geometry.feature) for said in SMALL[name])
        group.create_array(
            name,
            shape=shape,
            chunks=shape,
            dtype=dtype,
            compressors=None,
            fill_value=np.nan if dtype[1] == "f" else np.array(-1).astype(dtype),
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=(dimension, "number" if dtype[1] == "f" else "token")[: len(shape)],
            attributes={"long_name": what},
        )
    with warnings.catch_warnings():  # every reader of Zarr v3 that we know has them
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        untyped.consolidate_metadata(memory)
    return tuple((path, data.to_bytes()) for path, data in sorted(files.items()))


def is_array(metadata: bytes) -> bool:
    """Is a ``zarr.json`` that of an array? Up to format 3 that of a level was."""
    try:
        return json.loads(metadata)["node_type"] == "array"
    except (ValueError, KeyError, TypeError):
        return False
