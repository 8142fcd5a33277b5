"""Is every file of a level what its commit says? And how a damaged level is made whole again.

Structure is fast: every small file by its hash, every shard by its size. ``deep`` hashes the shards
too. A file that is wrong is named; nothing is changed until :func:`forget_damage` is asked to.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from strata.store.errors import LevelDamaged, LevelStale, readable, refusals
from strata.store.files.files import DISK, Files
from strata.store.files.lock import Waiting
from strata.store.files.publish import make_directory, present, read_hashed, replace, unseal
from strata.store.fingerprint import fingerprint, sha256
from strata.store.level.group import chunk_name
from strata.store.level.layout import BEGUN, VALUES, LevelKey
from strata.store.level.level import (
    COMMIT,
    RECEIPT,
    RECEIPTS,
    SHARDS,
    check_size,
    commit_of,
    geometry_of,
    receipt_path,
)
from strata.store.parallel import map_in_threads
from strata.store.write.shard import ShardWriter, forget_shard
from strata.store.write.unfinished import HASH_THREADS
from strata.store.write.writer import INTENT, read_lineage

QUARANTINE = "quarantine"
DEPTH = r"x_\d+-[0-9a-f]{12}"
"""Pattern of the name that the directory of the levels of one x_depth has."""
NOT_ITSELF = "it does not match its own sha256, or is of another kind"


@dataclass(frozen=True)
class Damage:
    """One file that is not what it should be, or one directory that is not where it should be."""

    path: Path
    what: str
    level: Path
    """The level's directory."""
    shard: int | None = None
    """Number of the shard, if it is one."""
    belongs: LevelKey | None = None
    """The level that a misplaced directory holds."""


def level_directories(
    root: Path, files: Files = DISK, left_out: list[str] | None = None
) -> list[Path]:
    """Every directory of a store that holds, or began to hold, a level.

    Args:
        left_out: as of :func:`readable`; directories that have no name of a level are named there,
            too.
    """

    def levels(depth: Path) -> list[Path]:
        ours = re.fullmatch(DEPTH, depth.name) and files.is_directory(depth)
        if left_out is not None and not ours:
            raise LevelDamaged(f"{depth} is no directory of levels")
        found = (depth / name for name in files.names(depth))
        return [directory for directory in found if files.is_directory(directory)]

    depths = (root / name for name in files.names(root) if name.startswith("x_"))
    return list(chain.from_iterable(readable(depths, levels, left_out)))


def check_level(
    root: Path, directory: Path, *, deep: bool = False, files: Files = DISK
) -> list[Damage]:
    """Every damaged file of a level; of one without a commit, which is not done, only ``deep``, and
    then of what has a receipt.

    Args:
        deep: hash the shards, too. Those of a level whose commit cannot be read are always hashed.
    """
    if not files.exists(directory / COMMIT):
        # A killed removal leaves receipts without shards: the next writer makes those again.
        found = _by_receipts(directory, files) if deep else []
        return [damage for damage in found if files.exists(damage.path)]
    try:
        body = commit_of(directory, files)
    except LevelDamaged as error:
        damage = Damage(directory / COMMIT, NOT_ITSELF, directory)
        if isinstance(error, LevelStale):
            damage = _damage(directory / COMMIT, error, directory)
        return [damage, *_check_intent(directory, files), *_by_receipts(directory, files)]
    key = LevelKey(**body["level"])
    if key.directory(root) != directory:
        what = f"it holds {key.label} of {key.fingerprint[:12]}, which belongs elsewhere"
        return [Damage(directory, what, directory, belongs=key)]
    return [
        *_check_intent(directory, files),
        *_small_files(directory, body, files),
        *_shards(directory, body[SHARDS], deep, files),
    ]


def _check_intent(directory: Path, files: Files) -> Iterator[Damage]:
    path = directory.parent / INTENT
    try:
        lineage = read_lineage(directory.parent, files)
    except FileNotFoundError:
        yield Damage(path, "it is missing", directory)
    except LevelDamaged:
        yield Damage(path, NOT_ITSELF, directory)
    else:
        made = [fingerprint(one)[:12] for one in lineage]
        if made[-1:] != [directory.parent.name.rpartition("-")[2]]:
            yield Damage(path, "it describes another level", directory)


def _small_files(directory: Path, body: dict[str, Any], files: Files) -> Iterator[Damage]:
    """Metadata, the small arrays and the receipts, by their hashes in the commit."""
    arrays = {
        f"{name}/{chunk_name(facts['shape'])}": facts for name, facts in body["arrays"].items()
    }
    expected = (body["metadata"] | arrays).items()
    small = ((directory / name, facts["sha256"]) for name, facts in expected)
    receipts = ((receipt_path(directory, s["shard"]), s["receipt"]) for s in body["shards"])

    def check(file: tuple[Path, str]) -> Damage | None:
        path, sha = file
        try:
            read_hashed(path, sha, files)
        except LevelDamaged as error:
            return _damage(path, error, directory)
        return None

    yield from filter(None, map_in_threads(check, chain(small, receipts), files.requests))


def _shards(
    directory: Path, entries: Sequence[dict[str, Any]], deep: bool, files: Files
) -> Iterator[Damage]:
    """Shards by size, and ``deep`` by hash."""
    sizes = files.sizes(directory / VALUES)
    check = partial(check_shard, directory, deep=deep, files=files, sizes=sizes)
    yield from filter(None, map_in_threads(check, entries, HASH_THREADS if deep else 1))


def check_shard(
    directory: Path,
    entry: dict[str, Any],
    *,
    deep: bool,
    files: Files = DISK,
    sizes: Mapping[str, int] | None = None,
) -> Damage | None:
    """A shard by its size, and ``deep`` by its hash; None: it is sound.

    Args:
        entry: what its commit, or its receipt, says of it.
        sizes: of the files in the directory, if they were asked for.
    """
    path = directory / entry["key"]
    try:
        with present(path, f"its commit says {entry['nbytes']:,} bytes"):
            size = files.size(path) if sizes is None else sizes.get(path.name)
        check_size(path, entry["nbytes"], size)
        if deep:
            with refusals(path):
                if sha256(files.read(path)) != entry["sha256"]:
                    raise LevelDamaged(f"{path} is not what was written: its sha256 differs")
    except LevelDamaged as error:
        return _damage(path, error, directory, entry["shard"])
    return None


def _damage(path: Path, error: LevelDamaged, directory: Path, shard: int | None = None) -> Damage:
    return Damage(path, str(error).removeprefix(f"{path} "), directory, shard)


def _by_receipts(directory: Path, files: Files) -> list[Damage]:
    """The shards of a level whose commit is not there or cannot be read, always by hash. What an
    older version wrote in another layout is not looked at: it is written anew."""
    entries, damaged = [], []
    for path in (directory / RECEIPTS / name for name in files.names(directory / RECEIPTS)):
        try:
            if path.suffix == ".json":  # no temporary file
                entry = unseal(path, files, RECEIPT)
                if entry["key"].startswith(f"{VALUES}/"):
                    entries.append(entry)
        except FileNotFoundError:  # a writer makes it again
            continue
        except LevelDamaged:
            damaged.append(Damage(path, NOT_ITSELF, directory))
    return [*damaged, *_shards(directory, entries, True, files)]


# ---- making it whole --------------------------------------------------------------------------


def put_back(root: Path, damaged: Sequence[Damage], files: Files = DISK) -> list[Path]:
    """Move directories that hold another level to where that level belongs, or to quarantine if its
    place is taken.

    On its way a directory lies beside its place, so that after a kill it is found there again.

    Returns:
        The directories that went to quarantine, as they were called.
    """
    moved, aside = [], []
    for damage in damaged:
        if damage.belongs is not None:
            place = damage.belongs.directory(root)
            make_directory(place.parent, files)
            beside = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
            _move(damage.path, beside, files)
            moved.append((damage.path, beside, place))
    for path, beside, place in moved:
        if files.exists(place):
            set_aside(root, beside, files)
            aside.append(path)
        else:
            _move(beside, place, files)
        _leave(root, path.parent, place.parent, files)
    return aside


def _leave(root: Path, old: Path, new: Path, files: Files) -> None:
    """Once no level is left in a depth's directory, its intent follows them, and it goes."""
    if not files.exists(old) or any(files.is_directory(old / name) for name in files.names(old)):
        return
    if files.exists(old / INTENT) and not files.exists(new / INTENT):
        _move(old / INTENT, new / INTENT, files)
    if files.names(old):
        set_aside(root, old, files)
    else:
        with refusals(old):
            files.remove_directory(old)


def set_aside(root: Path, path: Path, files: Files = DISK) -> Path:
    """Move a file or directory to quarantine; returns where it is now."""
    quarantine = make_directory(root / QUARANTINE, files)
    aside = quarantine / ".".join([*path.relative_to(root).parts, uuid.uuid4().hex[:8]])
    _move(path, aside, files)
    return aside


def _move(path: Path, target: Path, files: Files) -> None:
    with refusals(path):
        files.rename(path, target)
        files.sync_directory(path.parent)
        files.sync_directory(target.parent)


def forget_damage(
    root: Path, directory: Path, files: Files = DISK, waiting: Waiting = None
) -> list[Damage]:
    """Make of a damaged level one that is not finished, for a writer to go on with; returns what
    was damaged. Nobody else may be writing; who reads it is waited for, unless ``waiting`` is None.

    The commit goes before the first shard does, so that no reader meets a level in repair, and
    after the damaged small files: nobody looks for damage in a level without a commit, and a writer
    would take one of those for another level's. Of these ``x/zarr.json``, which says how the level
    was begun, is written again if the commit can be read. Damaged shards go to quarantine. A
    receipt alone is written again from its shard, if the commit vouches for that.
    """
    finished = files.exists(directory / COMMIT)  # or else the next writer looks at all there is
    damaged = check_level(root, directory, deep=True, files=files) if finished else []
    if not damaged:
        return []
    writer, known = None, ()
    with contextlib.suppress(LevelDamaged, FileNotFoundError):
        body = commit_of(directory, files)
        writer = ShardWriter(root, LevelKey(**body["level"]), geometry_of(body), files)
        known = body[SHARDS]
    small = {d.path for d in damaged if d.shard is None and d.path.name != COMMIT}
    with files.alone([directory / COMMIT], f"{directory.parent.name} {directory.name}", waiting):
        for path in (*sorted(small), directory / COMMIT):
            make_directory(path.parent, files)
            if writer is not None and path == directory / BEGUN:
                replace(path.parent, path.name, writer.metadata, files)
                continue
            with refusals(path):
                with contextlib.suppress(FileNotFoundError):
                    files.unlink(path)
                files.sync_directory(path.parent)
    bad = {damage.shard for damage in damaged}
    for damage in damaged:
        if damage.shard is not None:
            if files.exists(damage.path):
                set_aside(root, damage.path, files)
            with refusals(damage.path):
                forget_shard(damage.path, damage.shard, files)
        elif writer is not None and damage.path.parent.name == RECEIPTS:
            shard = int(damage.path.stem)
            if shard not in bad:
                writer.adopt(shard, known[shard]["sha256"])
    return damaged
