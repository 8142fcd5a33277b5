"""What may lie in a store: every file is of one line of a table, or does not belong there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from strata.store.errors import LevelDamaged, refusals
from strata.store.files.files import DISK, Files
from strata.store.files.publish import TEMPORARY, unseal
from strata.store.fingerprint import fingerprint
from strata.store.level.group import SMALL
from strata.store.level.references import NOTE
from strata.store.write.verify import DEPTH, NOT_ITSELF, Damage

RECORD = "record"
ARRAYS = "|".join(SMALL)
TABLE = (
    (rf"(.+/)?{re.escape(TEMPORARY)}[^/]+|calibration-[^/]+/.+", "temporary"),
    (rf"{DEPTH}/intent\.json|{DEPTH}/[\w.]+/(COMMIT|(({ARRAYS}|x)/)?zarr)\.json", "level"),
    (rf"{DEPTH}/[\w.]+/(x/c\.\d+(\.0){{1,4}}|({ARRAYS})/c(\.0)+|receipts/\d+\.json)", "level"),
    (rf"{DEPTH}/[\w.]+/(c\.\d+\.0\.0\.0|\w+\.npy)", "level"),  # up to format 3
    (r"(runs|sources)/[0-9a-f]{12}\.json", RECORD),
    # Nobody reads what is in these, or whoever reads it checks it.
    (rf"machine\.toml|locks/.+|quarantine/.+|{DEPTH}/\.?[\w.]+\.beton(\.lock)?", "kept"),
)
"""Patterns of paths, and kinds of what has them. The files of levels are for ``check_level``."""
STRANGE = {
    "temporary": "a temporary file, of a process that was killed or is at work",
    "": "nothing of a store has such a name",
}
NAMED_BY = {"runs": ("host", "run", NOTE), "sources": ("source", "signature", {"signature": str})}
"""Fields of a record that its file is named by, and its shape, by the directory that it is in."""


def kind(name: str) -> str:
    """The kind of a file by its path in a store; empty: the table has none."""
    return next((found for pattern, found in TABLE if re.fullmatch(pattern, name)), "")


def beside_levels(
    root: Path, files: Files = DISK
) -> tuple[list[Damage], tuple[tuple[Path, str], ...]]:
    """Records of runs and images that are not what was written; and files that do not belong into a
    store, with what they are."""
    damaged: list[Damage] = []
    with refusals(root):
        kinds = {name: kind(name) for name in sorted(files.listed(root))}
        for name in (name for name, found in kinds.items() if found == RECORD):
            with suppress(FileNotFoundError):  # it has gone since
                damaged += _record(root / name, files)
    strange = ((root / name, STRANGE[found]) for name, found in kinds.items() if found in STRANGE)
    return damaged, tuple(strange)


def _record(path: Path, files: Files) -> Iterator[Damage]:
    one, other, shape = NAMED_BY[path.parent.name]
    try:
        body = unseal(path, files, shape)
        if f"{fingerprint([body.get(one), body[other]])[:12]}.json" != path.name:
            yield Damage(path, "it is the record of another", path.parent)
    except LevelDamaged:
        yield Damage(path, NOT_ITSELF, path.parent)
