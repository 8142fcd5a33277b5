"""A level as a Zarr group: what lies beside its shards, so that other programs open it as one.

LEVEL/zarr.json            the group, with the metadata of all its arrays
      x/zarr.json          the values: shards are beside it
      label/  sample_id/   zarr.json, and all values in the file ``c.0``
      scale/  zero/        the same; of codes of 8 and 4 bits

The metadata is zarr's own. Nothing that reads a level looks at it: the commit says the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from strata.store.level.codec import zarr_metadata
from strata.store.level.layout import BEGUN, Geometry, LevelKey

CHUNK = "c.0"
"""Zarr's key of the one chunk of a small array: its elements, little-endian, and nothing else."""
SMALL = {
    "label": ("sample", "class of the sample, counted from 0"),
    "sample_id": ("sample", "number of the sample in its split of the data set"),
    "scale": ("channel", "step between the codes of the channel"),
    "zero": ("channel", "code of the value 0 in the channel"),
}
"""Every small array that a level can have: its dimension, and what it is, for people."""


def small_files(
    geometry: Geometry, key: LevelKey, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """The small files of a level.

    Args:
        arrays: (n,) by a name of ``SMALL``.

    Returns:
        Bytes of every ``zarr.json``, by its path in the level; and the arrays, little-endian, whose
        elements are the files ``NAME/c.0``.
    """
    little = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    forms = tuple((name, array.dtype.str, len(array)) for name, array in little.items())
    return dict(_metadata(geometry, key, forms)), little


@cache
def _metadata(
    geometry: Geometry, key: LevelKey, forms: tuple[tuple[str, str, int], ...]
) -> tuple[tuple[str, bytes], ...]:
    """Path and bytes of every ``zarr.json``. A hole in a small array is as loud as one in x: -1,
    NaN or 255."""
    import zarr
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {BEGUN: cpu.Buffer.from_bytes(zarr_metadata(geometry, key))}
    memory = MemoryStore(files)
    said = {"level": key.label, **vars(key), "precision": geometry.precision}
    untyped: Any = zarr
    group = untyped.create_group(memory, attributes=said)
    for name, dtype, length in forms:
        dimension, what = SMALL[name]
        group.create_array(
            name,
            shape=(length,),
            chunks=(length,),
            dtype=dtype,
            compressors=None,
            fill_value=np.nan if dtype[1] == "f" else np.array(-1).astype(dtype),
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=(dimension,),
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
