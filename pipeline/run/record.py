"""Records that can be believed: small JSON files, each with its own hash, written last of all.

    {"sha256": …, "body": {…, "made_of": …, "files": {"weights.safetensors": sha256, …}}}

A body says what it was made of, and vouches for the files beside it. So what is there is believed
if the record matches its own hash, was made of what it would be made of now, and every file is what
it was. What it was made of has the same keys in the record and in a checkpoint: ``input``, the
fingerprint of what was trained on, for layers and baselines; ``made_of``, that and the settings,
for variants and probes. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from strata.store.errors import LevelDamaged
from strata.store.files.files import DISK
from strata.store.files.publish import make_directory, replace, sealed, unseal
from strata.store.fingerprint import sha256

RUN, DATA, EVALUATION = "run.json", "data.json", "evaluation.json"
NETWORK, LAYER, FEATURES, RESULT = "network.json", "layer.json", "features.json", "result.json"
RECORDS = (RUN, DATA, EVALUATION, NETWORK, LAYER, FEATURES, RESULT)
CHECKPOINT, CURVE = "checkpoint.safetensors", "epochs.jsonl"
FIELDS: Mapping[str, tuple[str, ...]] = {
    RUN: ("science", "recipe", "seed", "source", "compute"),
    DATA: ("digest", "source", "stamp", "train", "test", "classes"),
    EVALUATION: ("solved", "samples", "layers", "confusion"),
    NETWORK: ("blocks",),
    LAYER: ("input", "weights", "scales", "files"),
    FEATURES: ("fingerprint", "levels"),
}
"""What a record of each name must say, whatever wrote it."""


def write(path: Path, body: Any) -> None:
    """Write a sealed JSON file, and its directory."""
    replace(make_directory(path.parent), path.name, sealed(body))


def vouch(path: Path, body: Mapping[str, Any], without: Collection[str] = (CURVE,)) -> None:
    """Write a record with the hash of every file beside it; then its checkpoint is not needed.

    Args:
        without: files that it does not vouch for, because they decide nothing.
    """
    left_out = {*RECORDS, CHECKPOINT, *without}
    files = [f for f in sorted(path.parent.glob("[!.]*.*")) if f.name not in left_out]
    write(path, {**body, "files": {f.name: sha256(f.read_bytes()) for f in files}})
    (path.parent / CHECKPOINT).unlink(missing_ok=True)


def read(path: Path) -> Any:
    """The body of a record that matches its own hash, whatever it was made of; None: there is none.

    Raises:
        LevelDamaged: it does not match, or is of another kind.
    """
    try:
        return _unsealed(path)
    except FileNotFoundError:
        for one in (path, path.parent):
            if one.is_symlink() and not one.exists():
                raise LevelDamaged(f"{one} is a link that leads nowhere") from None
        return None


def whole(path: Path) -> Any:
    """The body of a record if it and its files are what they were; else None."""
    with suppress(FileNotFoundError, NotADirectoryError, LevelDamaged):
        found = _unsealed(path)
        if not any(_damaged_files(path, found)):
            return found
    return None


def believed(path: Path, made_of: Mapping[str, Any]) -> Any:
    """The body of a record that is whole, and was made of this; else None."""
    found = whole(path)
    return found if found is not None and agrees(found, made_of) else None


def agrees(found: Mapping[str, Any], made_of: Mapping[str, Any]) -> bool:
    """Does a record, or the note of a checkpoint, say that it was made of this?"""
    wanted = json.loads(json.dumps(made_of))  # as a file gives it back
    return all(found.get(key) == value for key, value in wanted.items())


def damage(path: Path) -> Iterator[tuple[Path, str]]:
    """What is not as it was of a record and of the files beside it, and what is wrong with it.

    Raises:
        FileNotFoundError: there is no record.
    """
    try:
        found = _unsealed(path)
    except LevelDamaged:
        yield path, "it does not match its own sha256"
        return
    yield from _damaged_files(path, found)


def _unsealed(path: Path) -> Any:
    return unseal(path, DISK, *FIELDS.get(path.name, ("files",)))


def _damaged_files(path: Path, found: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """The files that a record vouches for in its body ``found`` and that are not what they were."""
    for name, expected in found.get("files", {}).items():
        file = path.parent / name
        if not file.is_file():
            yield file, "it is missing"
        elif sha256(file.read_bytes()) != expected:
            yield file, f"it is not what {path.name} says: its sha256 differs"
