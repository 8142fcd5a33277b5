"""TIFFs of any values, written here, so that what is read can be held to what is in them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Literal

import numpy as np

Order = Literal["<", ">"]


def tiff(
    array: np.ndarray,
    *,
    order: Order = "<",
    packed: bool = False,
    planar: bool = False,
    tags: Mapping[int, list[int]] | None = None,
) -> bytes:
    """A TIFF of (y, x) or (y, x, channel), with the bits and the sign of its dtype; `packed` by
    deflate; `planar`: one channel after the other. `tags` beside, or instead of, its own."""
    maps = array if array.ndim == 3 else array[..., None]
    height, width, channels = maps.shape
    kind, bits = {"u": 1, "i": 2, "f": 3}[maps.dtype.kind], 8 * maps.dtype.itemsize
    parts = [maps[..., c : c + 1] for c in range(channels)] if planar else [maps]
    strips = [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    held = {
        256: [width],
        257: [height],
        258: [bits] * channels,
        259: [8 if packed else 1],
        262: [2 if channels > 2 else 1],
        277: [channels],
        278: [height],
        284: [2 if planar else 1],
        339: [kind] * channels,
        **({338: [2]} if channels in (2, 4) else {}),
        **(tags or {}),
        273: [0] * len(strips),
        279: [len(strip) for strip in strips],
    }
    wide = (273, 279)
    place = 8 + 2 + 12 * len(held) + 4
    place += sum(4 * len(v) if k in wide else 2 * len(v) for k, v in held.items() if _long(k, v))
    for number, strip in enumerate(strips):
        held[273][number] = place
        place += len(strip)
    table, beside = struct.pack(f"{order}H", len(held)), b""
    start = 8 + 2 + 12 * len(held) + 4
    for key, values in sorted(held.items()):
        body = struct.pack(f"{order}{len(values)}{'I' if key in wide else 'H'}", *values)
        table += struct.pack(f"{order}HHI", key, 4 if key in wide else 3, len(values))
        if _long(key, values):
            table += struct.pack(f"{order}I", start + len(beside))
            beside += body
        else:
            table += body.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + table + bytes(4) + beside + b"".join(strips)


def _long(key: int, values: list[int]) -> bool:
    """Whether an entry's values do not fit beside it."""
    return len(values) > (1 if key in (273, 279) else 2)
