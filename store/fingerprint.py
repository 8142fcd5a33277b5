"""Identity by content: canonical JSON, and hashes of arrays. No pickles, paths or mtimes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8, a byte of a path that is not
    escaped (``\\udce9``); NaN is a ``ValueError``."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8", "backslashreplace")


def fingerprint(value: Any) -> str:
    """sha256 hex of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256(data: bytes | bytearray | memoryview) -> str:
    """sha256 hex of some bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Digest of named arrays: names, dtypes, shapes and raw little-endian bytes, in name order.

    Raises:
        TypeError: an array of Python objects, whose bytes mean nothing.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise TypeError(f"{name} has dtype {array.dtype}, which has no bytes to hash")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(canonical([name, little.dtype.str, list(array.shape)]))
        digest.update(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)  # no copy
    return digest.hexdigest()


_NOTHING = object()


def differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, one line per leaf: ``"schedule.epochs: was 12, is 50"``."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in sorted({*was, *now})
            for line in differences(
                was.get(key, _NOTHING), now.get(key, _NOTHING), f"{path}.{key}" if path else key
            )
        ]
    # As JSON, so that 1, 1.0 and true are the three things that they are to the fingerprint.
    before, after = (
        "nothing" if leaf is _NOTHING else json.dumps(leaf, sort_keys=True) for leaf in (was, now)
    )
    return [] if before == after else [f"{path}: was {before}, is {after}"]
