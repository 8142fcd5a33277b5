"""Identity by content: canonical JSON, and hashes of arrays. No pickles, paths or mtimes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8; NaN is a ``ValueError``."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def fingerprint(value: Any) -> str:
    """sha256 hex of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256(data: bytes | bytearray | memoryview) -> str:
    """sha256 hex of some bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Digest of named arrays: names, dtypes, shapes and raw little-endian bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(canonical([name, array.dtype.str, list(array.shape)]))
        digest.update(array.tobytes())
    return digest.hexdigest()


def differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, one line per leaf: ``"schedule.epochs: was 12, is 50"``."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = sorted({*was, *now})
        return [
            d
            for k in keys
            for d in differences(was.get(k), now.get(k), f"{path}.{k}" if path else k)
        ]
    return [] if was == now else [f"{path}: was {json.dumps(was)}, is {json.dumps(now)}"]
