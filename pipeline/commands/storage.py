"""What is in a store, who uses it, and what may go. No torch, no recipe: notes and commits tell."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.pipeline.errors import NotThereYet, RunConflict, remedy
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import RUN, Run
from strata.pipeline.run.stores import open_store
from strata.store.errors import LevelBusy, LevelDamaged
from strata.store.feature_store import LevelState, Place, Store, complete, partial, used_bytes
from strata.store.files.files import DISK, Files
from strata.store.level.layout import depth_directory
from strata.store.level.level import commit_of, geometry_of
from strata.store.level.references import Reference, forget, references
from strata.store.write.verify import QUARANTINE, level_directories


def is_live(note: Reference) -> bool:
    """Does the run that left a note still exist? One of another host is taken to."""
    return not note.here or (Path(note.run) / RUN).exists()


def users(notes: Iterable[Reference], directory: str) -> list[str]:
    """The runs that use a directory of the store, such as ``x_3-9f3c1a72be04``."""
    return [note.run for note in notes if directory in note.levels and is_live(note)]


def existing(place: Place) -> Store:
    """A store that is there. Raises NotThereYet."""
    store = open_store(place)
    if not store.files.is_directory(store.root):
        raise NotThereYet(f"there is no store in {store.root}. Name one with --store")
    return store


def notes_in(store: Store) -> list[Reference]:
    """Every run's note. Raises LevelDamaged if one cannot be read: who knows what that run uses."""
    advice = "`materialize` of that run writes it again; if the run is gone, remove the note"
    with remedy(LevelDamaged, advice):
        return references(store.root, store.files)


# ---- du -----------------------------------------------------------------------------------------


def disk_use(place: Place) -> dict[str, Any]:
    """Every level of a store with its bytes and users, as JSON."""
    store = existing(place)
    root, files, notes = store.root, store.files, notes_in(store)
    return {
        "store": str(root),
        "levels": [_level(store, found, notes) for found in level_directories(root, files)],
        "quarantine_bytes": used_bytes(root / QUARANTINE, files),
        "beton_bytes": 0 if store.remote else _beton_bytes(root),
        "total_bytes": used_bytes(root, files),
        "free_bytes": store.free_bytes(),
    }


def _beton_bytes(root: Path) -> int:
    """Of the copies that ffcv reads; one of them may just be written again."""
    total = 0
    for path in root.glob("x_0-*/*.beton"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _level(store: Store, directory: Path, notes: list[Reference]) -> dict[str, Any]:
    state, values = level_state(directory, store.files)
    return {
        "depth": directory.parent.name,
        "level": directory.name,
        "state": state.state,
        "rows": state.rows,
        "bytes": used_bytes(directory, store.files),
        "value_bytes": values,
        "runs": users(notes, directory.parent.name),
    }


def level_state(directory: Path, files: Files = DISK) -> tuple[LevelState, int | None]:
    """State, and the bytes that its values would take uncompressed, in one file each."""
    try:
        body = commit_of(directory, files)
    except FileNotFoundError:
        return partial(directory, files), None
    except LevelDamaged:
        return LevelState("damaged"), None
    shape = geometry_of(body)
    return complete(body), shape.rows * shape.row_bytes


# ---- gc -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Garbage:
    """Something in a store that nobody uses."""

    path: Path
    why: str
    nbytes: int

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "why": self.why, "bytes": self.nbytes}


def garbage(place: Place) -> list[Garbage]:
    """Levels that no run refers to, and what repairs set aside."""
    store = existing(place)
    files, notes = store.files, notes_in(store)
    used = {name for note in notes if is_live(note) for name in note.levels}
    found = [
        Garbage(path, _why(path.name, notes), used_bytes(path, files))
        for path in sorted({found.parent for found in level_directories(store.root, files)})
        if path.name not in used
    ]
    for name in files.names(store.root / QUARANTINE):
        path = store.root / QUARANTINE / name
        nbytes = used_bytes(path, files) if files.is_directory(path) else files.size(path)
        found.append(Garbage(path, "set aside by a repair", nbytes))
    return found


def _why(name: str, notes: list[Reference]) -> str:
    gone = [note.run for note in notes if name in note.levels]
    return f"used by {gone[0]}, which is gone" if gone else "no run refers to it"


def collect(place: Place, found: Iterable[Garbage]) -> list[Garbage]:
    """Remove garbage, and the notes of runs that are gone; returns what could not be removed.

    What somebody writes at this moment, or began to use since we looked, is left alone.
    """
    store, busy = open_store(place), []
    for item in found:
        if item.path.parent.name == QUARANTINE:
            store.remove_file(item.path)
            continue
        depth, _, fingerprint = item.path.name.removeprefix("x_").partition("-")
        try:
            if users(notes_in(store), item.path.name):
                raise LevelBusy(f"{item.path.name} is used now")
            store.remove(int(depth), fingerprint)
        except LevelBusy:
            busy.append(item)
    for note in notes_in(store):
        if not is_live(note):
            forget(store.root, note, store.files)
    return busy


# ---- evict --------------------------------------------------------------------------------------


def evict(overview: Overview, j: int, *, force: bool = False) -> int:
    """Remove x_j, after making sure that it can be made again; returns the bytes freed.

    Raises:
        NotThereYet: there is no x_j, or what it is made from is not there.
        RunConflict: other runs use it, and ``force`` was not given.
    """
    run = overview.existing()
    overview.check_layer(j)
    nodes = run.nodes()
    if j >= len(nodes):
        raise NotThereYet(f"layer {j} is not solved, so x_{j} could not be made again")
    place = depth_directory(overview.store.root, j, nodes[j].fingerprint)
    if not overview.store.files.exists(place):
        raise NotThereYet(f"x_{j} is not in {overview.store.root}: nothing to evict")
    _check_remakable(overview, run, j)
    others = others_using(overview.store, run, place.name)
    if others and not force:
        raise RunConflict(
            f"x_{j} is also used by {', '.join(others)}. It can be made again, there too; to evict "
            "it nevertheless pass --force"
        )
    return overview.store.remove(j, nodes[j].fingerprint)


def others_using(store: Store, run: Run, directory: str) -> list[str]:
    """Runs other than this one that use a directory of the store."""
    own = str(run.directory.resolve())
    return [user for user in users(notes_in(store), directory) if user != own]


def _check_remakable(overview: Overview, run: Run, j: int) -> None:
    """x_0 and the weights of layers 1 … j must be there and sound."""
    if not overview.inventory().images:
        raise NotThereYet("x_0 is not complete, so nothing could be made again from it")
    for i in range(1, j + 1):
        for path, what in run.damaged_files(i):
            raise LevelDamaged(f"{path}: {what}; x_{j} could not be made again. Nothing is removed")
