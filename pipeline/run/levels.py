"""The levels and images of a run, and whether they are current. No torch: status and plan ask."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from strata.pipeline.plan.plan import Inventory
from strata.pipeline.recipe import augmentation
from strata.pipeline.run.rundir import Run
from strata.stages.home import files_of, home, place_of
from strata.store.errors import StoreRefused
from strata.store.feature_store import LevelState, Store
from strata.store.level.layout import LevelKey
from strata.store.level.references import refer, reference


def keys_at(run: Run, depth: int, *, clean: bool = False) -> list[LevelKey]:
    """Every level x_depth has; empty if the layers up to it are not solved.

    Args:
        clean: those of the un-augmented images instead, which probes read.
    """
    nodes = run.nodes()
    if depth >= len(nodes):
        return []
    name = nodes[depth].fingerprint
    wanted = augmentation.levels_at(run.recipe, depth, clean=clean)
    return [LevelKey(depth, name, split, view) for split, view in wanted]


def all_at(run: Run, depth: int) -> list[LevelKey]:
    """Those of both kinds: a level of the un-augmented images may be one of the others."""
    return list(dict.fromkeys((*keys_at(run, depth), *keys_at(run, depth, clean=True))))


def state_of(store: Store, key: LevelKey) -> LevelState:
    """The state of a level in the store; ``stale`` if the level below was rewritten with other
    values since."""
    state = store.state(key)
    if state.state == "complete" and state.parent is not None:
        parent = LevelKey(**{k: state.parent[k] for k in ("depth", "fingerprint", "split", "view")})
        root = store.state(parent).content_root
        if root is not None and root != state.parent["content_root"]:
            return replace(state, state="stale")
    return state


def is_current(store: Store, key: LevelKey) -> bool:
    """Is a level complete, and made from what lies below it now?"""
    return state_of(store, key).state == "complete"


def parent_of(key: LevelKey, content_root: str) -> dict[str, Any]:
    """What a commit says of the level it was computed from."""
    return {**asdict(key), "content_root": content_root}


def profile_at(run: Run, store: Store, depth: int) -> str | None:
    """How the levels of x_depth are stored that are there or were begun; None: there are none.

    A level that was begun goes on as it was, and views of one depth are best alike.
    """
    found = (store.geometry(key) for key in keys_at(run, depth))
    return next((geometry.profile for geometry in found if geometry), None)


def missing_at(run: Run, store: Store, depth: int, *, clean: bool = False) -> list[LevelKey]:
    """Levels of x_depth that must be written; its layer must be solved. ``clean`` as above."""
    return [key for key in keys_at(run, depth, clean=clean) if not is_current(store, key)]


def refer_to(run: Run, store: Store) -> None:
    """Note in the store which levels the run uses, so that ``gc`` leaves them alone.

    A store that is only read takes no notes.
    """
    with run.in_turn(), suppress(StoreRefused):
        note = reference(run.directory, [(node.depth, node.fingerprint) for node in run.nodes()])
        refer(store.root, note, store.files)


# ---- the images, and all of it ----------------------------------------------------------------


def have_images(run: Run, store: Store) -> bool:
    """x_0 is complete, and its source is unchanged as far as can be told without reading it."""
    known = run.data()
    return known is not None and not missing_at(run, store, 0) and unchanged(run, known)


def stamp(source: str) -> list[int] | None:
    """Size in all and latest mtime of a source that is some files; None: it is not, or gone."""
    with suppress(OSError):
        if files := files_of(source):
            found = [file.stat() for file in files]
            return [sum(one.st_size for one in found), max(one.st_mtime_ns for one in found)]
    return None


def unchanged(run: Run, known: dict[str, Any]) -> bool:
    """Is the source still what a record of the images says, as far as can be told without reading
    it? A file by size and time, a folder by those of all its files; built in or gone: yes."""
    kind, place, _ = place_of(run.source)
    if run.source != known["source"]:
        return False
    listed = home(place).is_dir() if kind == "imagefolder" else kind == "csv" and stamp(run.source)
    if listed:
        from strata.stages.data.opening import open_source

        with open_source(run.source, root=Path(), form=run.recipe.data) as source:
            return source.signature() == known["signature"]
    return stamp(run.source) in (None, known["stamp"])


def inventory(run: Run | None, store: Store) -> Inventory:
    """Take stock of a run; one that was not made has nothing."""
    if run is None or run.data() is None:
        return Inventory(False, 0, frozenset(), run.recipe.given if run else 0)
    solved = run.solved()
    written = {j for j in range(1, solved + 1) if not missing_at(run, store, j)}
    return Inventory(have_images(run, store), solved, frozenset(written), run.recipe.given)
