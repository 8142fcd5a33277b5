"""The commands `evict`, `du` and `gc`: what is in a store, who uses it, and what may go.

No torch, and no recipe but for `evict`: notes of runs and commits of levels tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.errors import NotThereYet, RunConflict, remedy
from strata.pipeline.options import Options
from strata.pipeline.progress import size
from strata.pipeline.run.rundir import RUN
from strata.pipeline.run.stores import check_places, open_store
from strata.store.errors import LevelBusy, LevelDamaged, LevelStale, readable
from strata.store.feature_store import LevelState, Place, Store, complete, partial, used_bytes
from strata.store.files.files import DISK, Files
from strata.store.level.layout import depth_directory
from strata.store.level.level import commit_of, geometry_of
from strata.store.level.references import Reference, forget, references
from strata.store.write.verify import QUARANTINE, level_directories


def _existing(place: Place) -> Store:
    check_places(place)
    store = open_store(place)
    if not store.files.is_directory(store.root):
        raise NotThereYet(f"there is no store in {store.root}. Name one with --store")
    return store


def _notes_in(store: Store, left_out: list[str] | None = None) -> list[Reference]:
    """Every run's note. Who removes something has no ``left_out``: LevelDamaged is raised if one
    cannot be read, since nobody knows what that run uses."""
    advice = "`materialize` of that run writes it again; if the run is gone, remove the note"
    with remedy(LevelDamaged, advice):
        return references(store.root, store.files, left_out)


def _is_live(note: Reference) -> bool:
    """Does the run that left a note still exist? One of another host, or where nobody may look, is
    taken to."""
    try:
        return not note.here or bool((Path(note.run) / RUN).lstat())
    except OSError as error:
        return not isinstance(error, FileNotFoundError | NotADirectoryError)


def _users(notes: Iterable[Reference], directory: str) -> list[str]:
    """The runs that use a directory of the store, such as ``x_3-9f3c1a72be04``."""
    return [note.run for note in notes if directory in note.levels and _is_live(note)]


def level_state(directory: Path, files: Files = DISK) -> tuple[LevelState, int | None]:
    """State, and the bytes that its values would take uncompressed, in one file each."""
    try:
        body = commit_of(directory, files)
    except FileNotFoundError:
        return partial(directory, files), None
    except LevelDamaged as error:
        return LevelState("stale" if isinstance(error, LevelStale) else "damaged"), None
    shape = geometry_of(body)
    return complete(body), shape.rows * shape.row_bytes


def du(options: Options) -> Answer:
    """Every level of a store with its bytes and users."""
    store = _existing(options.store)
    root, files, left_out = store.root, store.files, list[str]()
    notes = _notes_in(store, left_out)

    def entry(directory: Path) -> dict[str, Any]:
        state, values = level_state(directory, files)
        return {
            "depth": directory.parent.name,
            "level": directory.name,
            "state": state.state,
            "rows": state.rows,
            "bytes": used_bytes(directory, files),
            "value_bytes": values,
            "runs": _users(notes, directory.parent.name),
        }

    def sizes(path: Path) -> dict[str, int]:
        if not files.is_directory(path):
            return {path.name: files.size(path)}
        return {f"{path.name}/{name}": n for name, n in files.listed(path).items()}

    directories = level_directories(root, files, left_out)
    tops = (root / name for name in files.names(root))
    tops = (path for path in tops if not any(one.startswith(f"{path}: ") for one in left_out))
    tops = readable(tops, sizes, left_out)
    listed = dict(chain.from_iterable(map(dict.items, tops)))
    found = {
        "store": str(root),
        "levels": list(readable(directories, entry, left_out)),
        "quarantine_bytes": used_bytes(root / QUARANTINE, files),
        "beton_bytes": sum(n for name, n in listed.items() if fnmatch(name, "x_0-*/*.beton")),
        "total_bytes": sum(listed.values()),
        "free_bytes": store.free_bytes(),
    }
    return Answer(found, tables.of_disk_use(found), left_out=list(dict.fromkeys(left_out)))


@dataclass(frozen=True)
class Garbage:
    """Something in a store that nobody uses."""

    path: Path
    why: str
    bytes: int


def gc(options: Options) -> Answer:
    """What nobody uses, removed with ``--delete``."""
    store, left_out = _existing(options.store), list[str]()
    found = list(_garbage(store, _notes_in(store, None if options.delete else left_out), left_out))
    left = list(_remove(store, found)) if options.delete else found
    items = [{**vars(one), "path": str(one.path)} for one in found]
    value = {"garbage": items, "left": [str(one.path) for one in left]}
    lines = [f"{one.path} ({size(one.bytes)}): {one.why}" for one in found]
    if not found:
        lines = ["nothing to collect: runs refer to every level"]
    elif options.delete:
        lines += [f"left, because it is in use: {one.path}" for one in left]
        lines.append(f"removed {size(sum(one.bytes for one in found if one not in left))}")
    else:
        lines.append(f"{size(sum(one.bytes for one in found))} in all; `gc --delete` removes it")
    return Answer(value, tuple(lines), left_out=left_out)


def _garbage(store: Store, notes: Sequence[Reference], left_out: list[str]) -> Iterator[Garbage]:
    """Levels that no run refers to, and what repairs set aside."""
    files = store.files
    for path in sorted({one.parent for one in level_directories(store.root, files, left_out)}):
        if not _users(notes, path.name):
            gone = [note.run for note in notes if path.name in note.levels]
            why = f"used by {gone[0]}, which is gone" if gone else "no run refers to it"
            yield Garbage(path, why, used_bytes(path, files))
    for name in files.names(store.root / QUARANTINE):
        path = store.root / QUARANTINE / name
        nbytes = used_bytes(path, files) if files.is_directory(path) else files.size(path)
        yield Garbage(path, "set aside by a repair", nbytes)


def _remove(store: Store, found: Iterable[Garbage]) -> Iterator[Garbage]:
    """Remove garbage, and the notes of runs that are gone; yields what could not be removed.

    What somebody writes at this moment, or began to use since we looked, is left alone.
    """
    for item in found:
        if item.path.parent.name == QUARANTINE:
            store.remove_file(item.path)
            continue
        depth, _, fingerprint = item.path.name.removeprefix("x_").partition("-")
        try:
            if _users(_notes_in(store), item.path.name):
                raise LevelBusy(f"{item.path.name} is used now")
            store.remove(int(depth), fingerprint)
        except LevelBusy:
            yield item
    for note in _notes_in(store):
        if not _is_live(note):
            forget(store.root, note, store.files)


def evict(options: Options) -> Answer:
    """Remove x_j, after making sure that it can be made again.

    Raises:
        NotThereYet, LevelDamaged: there is no x_j, or what it is made from is not there or sound.
        RunConflict: other runs use it, and ``--force`` was not given.
    """
    found, j, left_out = lifecycle.find(options), options.j, list[str]()
    run, store = found.existing(), found.store
    found.check_layer(j)
    nodes = run.nodes()
    if j >= len(nodes):
        raise NotThereYet(f"layer {j} is not solved, so x_{j} could not be made again")
    place = depth_directory(store.root, j, nodes[j].fingerprint)
    if not store.files.exists(place):
        raise NotThereYet(f"x_{j} is not in {store.root}: nothing to evict")
    if not found.inventory().images:
        raise NotThereYet("x_0 is not complete, so nothing could be made again from it")
    for path, what in run.damaged(*(f"layer_{i}" for i in range(1, j + 1))):
        raise LevelDamaged(f"{path}: {what}; x_{j} could not be made again. Nothing is removed")
    own = str(run.directory.resolve())
    notes = _notes_in(store, left_out if options.force else None)
    others = [user for user in _users(notes, place.name) if user != own]
    if others and not options.force:
        raise RunConflict(
            f"x_{j} is also used by {', '.join(others)}. It can be made again, there too; to evict "
            "it nevertheless pass --force"
        )
    freed = store.remove(j, nodes[j].fingerprint)
    text = f"removed x_{j}: {size(freed)} freed; `materialize --layer {j}` makes it again"
    return Answer({"freed": freed}, (text,), left_out=left_out)
