"""Weights on disk: safetensors, whole and durable, with a digest of names, shapes and bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from strata.pipeline.errors import NotThereYet
from strata.pipeline.run.rundir import NOTE
from strata.store.errors import LevelDamaged, refusals
from strata.store.files.publish import make_directory, replace
from strata.store.fingerprint import digest_arrays


def write(path: Path, tensors: Mapping[str, Tensor], note: Any = None) -> None:
    """Write tensors, and a JSON value in the file's header, replacing the file in one step."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {NOTE: json.dumps(note)} if note is not None else None
    make_directory(path.parent)
    replace(path.parent, path.name, save(plain, metadata))


def read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors on the CPU and the note.

    Raises:
        NotThereYet: there is no such file.
        LevelDamaged: it is not a safetensors file.
        StoreRefused: it cannot be read; safetensors gives no number of the error.
    """
    if not path.exists():
        raise NotThereYet(f"{path} is missing")
    try:
        with refusals(path), safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = (file.metadata() or {}).get(NOTE)
    except SafetensorError as error:
        raise LevelDamaged(f"{path} is damaged: {error}") from None
    return tensors, json.loads(note) if note else None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes: the same for equal weights, however saved."""
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    return digest_arrays(arrays)


def read_checked(path: Path, expected: str) -> dict[str, Tensor]:
    """Tensors whose digest must be ``expected``. Raises LevelDamaged if it is not."""
    tensors, _ = read(path)
    found = digest(tensors)
    if found != expected:
        raise LevelDamaged(f"{path} has digest {found[:12]}, its record says {expected[:12]}")
    return tensors
