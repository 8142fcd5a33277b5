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
from hashlib import file_digest
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Any

from strata.store.errors import LevelDamaged
from strata.store.files.files import DISK
from strata.store.files.publish import make_directory, replace, sealed, unseal

RUN, DATA, EVALUATION = "run.json", "data.json", "evaluation.json"
NETWORK, LAYER, FEATURES, RESULT = "network.json", "layer.json", "features.json", "result.json"
INITIAL = "initial/initial.json"
RECORDS = (RUN, DATA, EVALUATION, NETWORK, LAYER, FEATURES, RESULT, "initial.json")
CHECKPOINT, CURVE = "checkpoint.safetensors", "epochs.jsonl"


def _each(shape: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), shape)


_MAYBE, _NUMBER, _FILES = EllipsisType, (float, NoneType), {"files": {str: str}}
_ANY = _each(_NUMBER, "top1 top5")
_LOSS = {"loss": float, "top1": _NUMBER}
_TEST = {"test": _ANY, "ensemble": _each(_ANY, "logits probabilities")}
_OUTCOME = _each(_each(_NUMBER, "seconds bytes peak_bytes"), "expected measured") | {"whole": bool}
_COPY = _FILES | _each(str, "input weights") | {"scales": (str, NoneType)}
_TRAINED = _each(_LOSS, "train test") | {
    "seconds": float,
    "kept_epoch": (int, NoneType),
    "parameters": int,
}
_PROBLEM = _TRAINED | {
    "auxiliary": str,
    "auxiliary_parameters": int,
    "peak_memory_bytes": _NUMBER,
}
_REMOVAL = {"filters": int} | _each(float, "test_before test_removed test_after")
_CODES = _each(_NUMBER, "median_snr_db worst_channel worst_snr_db") | _each(
    float, "clipped dead channels"
)
_SWEPT = _FILES | {"made_of": {"input": str}, "name": str, "changes": {str: object}}
FIELDS: Mapping[str, Any] = {
    RUN: _each(str, "recipe source compute device")
    | _each({str: object}, "science machine versions")
    | {"seed": int, "accumulate": ([int], NoneType, _MAYBE)},
    DATA: _each(str, "digest source signature")
    | _each(int, "train test broken_count")
    | _each([str], "classes broken")
    | {"stamp": ([int], NoneType)},
    EVALUATION: {
        "solved": [str],
        "samples": int,
        "layers": [_TEST | {"layer": int}],
        "finals": ([_TEST | {"layer": int, "name": str}], _MAYBE),
        "confusion": ({"of": str, "matrix": [[int]]}, NoneType),
    },
    NETWORK: {"blocks": [{str: object}], "heads": ([{str: object}], _MAYBE)}
    | {"read": ({str: str}, _MAYBE), "home": (str, _MAYBE)}
    | {"weights": ({"file": str, "stamp": ([int], NoneType)}, _MAYBE)},
    "initial.json": _FILES | {"layers": [str]},
    LAYER: (
        _COPY | {"origin": str},
        _COPY | {"given": bool},
        _COPY
        | _PROBLEM
        | {
            "outcome": _OUTCOME,
            "quantiser": (_CODES, NoneType),
            "variant": ({"name": str}, _MAYBE),
            "compression": ({"removals": [_REMOVAL], "solved_filters": int}, _MAYBE),
        },
    ),
    FEATURES: {
        "fingerprint": str,
        "levels": {str: {"bytes": int, "seconds": float}},
        "outcome": _OUTCOME,
    },
    RESULT: (
        _FILES
        | {"layer": int, "kind": str, "seconds": float}
        | _each({"top1": _NUMBER}, "train test"),
        _SWEPT | {"diverged": {"epoch": int, "last_good": _NUMBER}},
        _SWEPT | _PROBLEM | {"diverged": NoneType, "risk": float},
        _FILES | _TRAINED | _each(str, "input weights variant"),
    ),
}
"""The shape of the records of each name, as ``publish.misfit`` has it: what others rely on."""
SURVEY = (
    FIELDS[DATA] | _each({str: int}, "scales converted") | {"kept": {str: list}, "sums": {str: str}}
)
"""The shape of what a store remembers of images; a million numbers are not looked at."""


def write(path: Path, body: Any) -> None:
    """Write a sealed JSON file, and its directory."""
    replace(make_directory(path.parent), path.name, sealed(body))


def vouch(path: Path, body: Mapping[str, Any], without: Collection[str] = (CURVE,)) -> None:
    """Write a record with the hash of every file beside it; then its checkpoint is not needed.

    Args:
        without: files that it does not vouch for, because they decide nothing.
    """
    left_out = {path.name, *RECORDS, CHECKPOINT, *without}
    files = [f for f in sorted(path.parent.glob("[!.]*.*")) if f.name not in left_out]
    write(path, {**body, "files": {f.name: file_sha256(f) for f in files}})
    (path.parent / CHECKPOINT).unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """sha256 hex digest of a file, which is read in pieces."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


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
    except LevelDamaged as error:
        yield path, str(error).partition(" is damaged: ")[2]
        return
    yield from _damaged_files(path, found)


def _unsealed(path: Path) -> Any:
    return unseal(path, DISK, FIELDS.get(path.name, _FILES))


def _damaged_files(path: Path, found: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """The files that a record vouches for in its body ``found`` and that are not what they were."""
    for name, expected in found.get("files", {}).items():
        file = path.parent / name
        if not file.is_file():
            yield file, "it is missing"
        elif file_sha256(file) != expected:
            yield file, f"it is not what {path.name} says: its sha256 differs"
