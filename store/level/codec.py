"""Shards as bytes: what zarr would have written for the same rows, put together in memory.

    raw      row row row …   poison up to a whole chunk            index  crc32c of the index
    packed   chunk crc32c  chunk crc32c …  (zstd or lz4, no shuffle)  index  crc32c of the index

The features of a place, for example the channels of a pixel, lie side by side (Zarr's transpose
codec, where they are not the last axis anyway): so the feed hands a convolution what lies on disk,
and chunks decode about twice as fast. Features after a ReLU are runs of zero
bytes; shuffling would spread them, so nothing is shuffled. The metadata is zarr's own, and a test
compares the bytes with zarr's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, cast

import numpy as np
from google_crc32c import value  # pyright: ignore[reportUnknownVariableType]  # untyped

from strata.store.errors import LevelDamaged
from strata.store.level.layout import AXES, Geometry, LevelKey, precision

INDEX_ENTRY = np.dtype("<u8")
CHECKSUM = np.dtype("<u4")
crc32c = cast(Callable[[Any], int], value)
"""crc32c of a contiguous buffer."""
NO_CHUNK = 2**64 - 1
"""Offset and length, in a shard's index, of a chunk that is not there (Zarr v3 sharding)."""
PAIR = "_pair"
"""Ends the name of an axis on which two values share an element."""
ZSTD_LEVEL, LZ4_LEVEL = 1, 5
CODEC_THREADS = os.cpu_count() or 1


@cache
def zarr_metadata(geometry: Geometry, key: LevelKey) -> bytes:
    """``x/zarr.json`` of a level: Zarr v3, sharded, flat chunk keys, poison as fill value."""
    import zarr
    import zarr.storage
    from zarr.codecs import TransposeCodec

    files: dict[str, Any] = {}
    order = list(range(1 + len(geometry.axes)))
    order.append(order.pop(geometry.axis))
    zarr.create_array(  # pyright: ignore[reportUnknownMemberType]  # zarr types it in part
        zarr.storage.MemoryStore(files),
        shape=(geometry.rows, *geometry.stored),
        shards=(geometry.shard_rows, *geometry.stored),
        chunks=(geometry.chunk_rows, *geometry.stored),
        dtype=geometry.dtype,
        filters=[TransposeCodec(order=order)] if order != sorted(order) else None,
        compressors=_zarr_codecs(geometry),
        fill_value=precision(geometry.precision).poison,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("sample", *_dimensions(geometry)),
        attributes=_attributes(geometry, key),
    )
    return files["zarr.json"].to_bytes()


def _dimensions(geometry: Geometry) -> list[str]:
    """Names of the axes of a row. One on which several values share an element has another length,
    and name."""
    axes = zip(geometry.axes, geometry.stored, geometry.sample, strict=True)
    return [name if stored == values else f"{name}{PAIR}" for name, stored, values in axes]


def _attributes(geometry: Geometry, key: LevelKey) -> dict[str, Any]:
    """What a level says of itself to readers who know nothing of us."""
    feature = geometry.feature
    found: dict[str, Any] = {
        "level": key.label,
        "fingerprint": key.fingerprint,
        "precision": geometry.precision,
    }
    if geometry.precision == "bfloat16":
        found["logical_dtype"] = "bfloat16"
    elif geometry.precision in ("uint8", "uint4") and key.depth > 0:
        values = f"(code - zero[{feature}]) * scale[{feature}]"
        found["values"] = f"{values}; see the arrays scale and zero"
    if precision(geometry.precision).packed > 1:
        found["packing"] = f"two {feature}s per byte, the first in the low bits"
        found[f"{feature}s"] = geometry.features
    return found


def _zarr_codecs(geometry: Geometry) -> Any:
    """Compression of an inner chunk, as zarr names it."""
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    if geometry.profile == "raw":
        return None
    if geometry.profile == "zstd":
        return [ZstdCodec(level=ZSTD_LEVEL, checksum=False), Crc32cCodec()]
    blosc = BloscCodec(
        cname="lz4", clevel=LZ4_LEVEL, shuffle="noshuffle", typesize=geometry.dtype.itemsize
    )
    return [blosc, Crc32cCodec()]


def geometry_of_zarr(metadata: bytes) -> Geometry:
    """The geometry of a level by its ``x/zarr.json``. Raises LevelDamaged if it is not ours."""
    try:
        found = json.loads(metadata)
        (sharding,) = (codec["configuration"] for codec in found["codecs"])
        names = {codec["name"] for codec in sharding["codecs"]}
        attributes = found["attributes"]
        rows, *stored = found["shape"]
        axes = [name.removesuffix(PAIR) for name in found["dimension_names"][1:]]
        return Geometry(
            rows,
            # One on which values share an element has its own length beside.
            tuple(map(lambda name, length: attributes.get(f"{name}s", length), axes, stored)),
            attributes["precision"],
            chunk_rows=sharding["chunk_shape"][0],
            shard_rows=found["chunk_grid"]["configuration"]["chunk_shape"][0],
            profile="zstd" if "zstd" in names else "lz4" if "blosc" in names else "raw",
            features_last=len(axes) > 1 and axes[0] != AXES[len(axes) - 1][0],
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise LevelDamaged(f"zarr.json is none of a level: {error!r}") from None


@cache
def _compressor(profile: str, itemsize: int) -> Any:
    """Compression of an inner chunk, as numcodecs does it."""
    import numcodecs  # pyright: ignore[reportMissingTypeStubs]  # it has no types

    codecs: Any = numcodecs
    if profile == "zstd":
        return codecs.Zstd(level=ZSTD_LEVEL, checksum=False)
    noshuffle = codecs.Blosc.NOSHUFFLE
    return codecs.Blosc(cname="lz4", clevel=LZ4_LEVEL, shuffle=noshuffle, typesize=itemsize)


def channels_last(rows: np.ndarray, axis: int = 1) -> np.ndarray:
    """C-contiguous rows whose channels, which are this axis, are last: no copy if they lie so."""
    return np.ascontiguousarray(np.moveaxis(rows, axis, -1))


def encode(
    geometry: Geometry, rows: np.ndarray, threads: int = CODEC_THREADS
) -> list[bytes | memoryview]:
    """One shard in pieces that need no copy.

    Args:
        rows: stored elements as they lie, (n, …, feature), C-contiguous.
        threads: that compress, which changes nothing of the bytes.
    """
    if geometry.profile == "raw":
        filled = -(-len(rows) // geometry.chunk_rows) * geometry.chunk_rows
        lengths = np.full(filled // geometry.chunk_rows, geometry.chunk_rows * geometry.row_bytes)
        poison = _poison(geometry, filled - len(rows))
        return [rows.data.cast("B"), poison.tobytes(), _index(geometry, lengths)]
    step = geometry.chunk_rows
    parts = (rows[at : at + step] for at in range(0, len(rows), step))
    with ThreadPoolExecutor(threads) as pool:
        chunks = list(pool.map(partial(_pack, geometry), parts))
    return [*chunks, _index(geometry, np.array([len(chunk) for chunk in chunks]))]


def _poison(geometry: Geometry, rows: int) -> np.ndarray:
    return np.full((rows, *geometry.lying), precision(geometry.precision).poison, geometry.dtype)


def _pack(geometry: Geometry, rows: np.ndarray) -> bytes:
    """One inner chunk, poison up to its full length, compressed, its crc32c last."""
    if len(rows) < geometry.chunk_rows:
        rows = np.concatenate([rows, _poison(geometry, geometry.chunk_rows - len(rows))])
    packed = bytes(_compressor(geometry.profile, geometry.dtype.itemsize).encode(rows))
    return packed + _checksum(packed)


def _checksum(data: bytes | np.ndarray) -> bytes:
    return np.array(crc32c(data), CHECKSUM).tobytes()


def _index(geometry: Geometry, lengths: np.ndarray) -> bytes:
    """Offset and length of every inner chunk, and the checksum of that."""
    index = np.full((geometry.shard_rows // geometry.chunk_rows, 2), NO_CHUNK, INDEX_ENTRY)
    index[: len(lengths), 0] = np.cumsum(lengths) - lengths
    index[: len(lengths), 1] = lengths
    data = index.tobytes()
    return data + _checksum(data)


def row_checksums(rows: np.ndarray) -> np.ndarray:
    """crc32c of every row: uint32 (n,) from a C-contiguous (n, …)."""
    flat = rows.reshape(len(rows), -1).view(np.uint8)
    return np.fromiter((crc32c(row) for row in flat), CHECKSUM, len(rows))


class BadChunk(ValueError):
    """A part of a shard is not what its own checksum or the index says."""


def index_bytes(geometry: Geometry) -> int:
    """Bytes of a shard's index and its checksum, with which it ends."""
    return geometry.shard_rows // geometry.chunk_rows * 2 * INDEX_ENTRY.itemsize + CHECKSUM.itemsize


def read_index(
    geometry: Geometry, shard: np.ndarray, rows: int, nbytes: int | None = None
) -> np.ndarray:
    """Offset and length of the inner chunks that hold ``rows`` rows: uint64 (chunks, 2).

    Args:
        shard: its bytes, uint8, or only the last of them.
        nbytes: it has; None: all of them are given.

    Raises:
        BadChunk: the index fails its checksum, or points outside the file.
    """
    slots = geometry.shard_rows // geometry.chunk_rows
    tail = shard[len(shard) - index_bytes(geometry) :].tobytes()
    data, checksum = tail[: -CHECKSUM.itemsize], tail[-CHECKSUM.itemsize :]
    if len(data) != slots * 2 * INDEX_ENTRY.itemsize or _checksum(data) != checksum:
        raise BadChunk("its index fails its checksum")
    index = np.frombuffer(data, INDEX_ENTRY).reshape(slots, 2)[: -(-rows // geometry.chunk_rows)]
    if int(index.sum(axis=1).max(initial=0)) > (nbytes or len(shard)) - len(tail):
        raise BadChunk("its index points outside the file")
    return index


def unpack(geometry: Geometry, chunk: np.ndarray, out: np.ndarray) -> None:
    """Decode one packed inner chunk where it is wanted.

    Args:
        chunk: its bytes (uint8), the checksum included.
        out: for stored elements as they lie, (chunk_rows, …, feature), C-contiguous.

    Raises:
        BadChunk: it fails its checksum.
    """
    body, checksum = chunk[: -CHECKSUM.itemsize], chunk[-CHECKSUM.itemsize :]
    if _checksum(body) != checksum.tobytes():
        raise BadChunk("an inner chunk fails its checksum")
    _compressor(geometry.profile, geometry.dtype.itemsize).decode(body, out)


def decode(
    geometry: Geometry, shard: np.ndarray, rows: int, chunk: int | None = None
) -> np.ndarray:
    """Rows of a whole shard, which has ``rows`` of them: stored elements as they lie.

    Args:
        chunk: of a packed shard, this inner chunk alone; None: all. Raw rows are not copied.

    Raises:
        BadChunk: the index or a chunk of a packed shard fails its checksum.
    """
    if geometry.profile == "raw":
        body = shard[: rows * geometry.row_bytes]
        return body.view(geometry.dtype).reshape(rows, *geometry.lying)
    index = read_index(geometry, shard, rows).tolist()
    index = index if chunk is None else [index[chunk]]
    out = np.empty((len(index), geometry.chunk_rows, *geometry.lying), geometry.dtype)
    for piece, (at, nbytes) in zip(out, index, strict=True):
        unpack(geometry, shard[at : at + nbytes], piece)
    return out.reshape(-1, *geometry.lying)[:rows]
