"""Are the images of a run in the store, and still those it was made from? Asked without torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from strata.pipeline.run.levels import missing_at
from strata.pipeline.run.rundir import Run
from strata.store.feature_store import Store


def have_images(run: Run, store: Store) -> bool:
    """x_0 is complete, and its source is unchanged as far as can be told without reading it."""
    known = run.data()
    return known is not None and not missing_at(run, store, 0) and unchanged(run, known)


def stamp(source: str) -> list[int] | None:
    """Size and mtime of a source that is one file; None if it is not one, or gone."""
    with suppress(OSError):
        path = Path(source.partition(":")[2]).expanduser()
        if path.is_file():
            return [path.stat().st_size, path.stat().st_mtime_ns]
    return None


def unchanged(run: Run, known: dict[str, Any]) -> bool:
    """Is the source still what a record of the images says, as far as can be told without reading
    it? A file by size and time, a folder by those of all its files; built in or gone: yes."""
    kind, _, place = run.source.partition(":")
    path = Path(place).expanduser()
    if run.source != known["source"]:
        return False
    if kind == "imagefolder" and path.is_dir():
        from strata.stages.data.images import open_source

        with open_source(run.source, root=Path()) as source:
            return source.signature() == known["signature"]
    return stamp(run.source) in (None, known["stamp"])
