"""x_0 as the ffcv loader reads it: a .beton beside the level, written when it is first wanted."""

from __future__ import annotations

from pathlib import Path

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.run.session import Session
from strata.store.level.level import Level


def image_file(session: Session, level: Level) -> Path | None:
    """The .beton of x_0 that the session's loader reads; None if it reads the level itself.

    Raises:
        LoaderError: ffcv cannot be had, or the recipe wants JPEG and the loader cannot read it.
    """
    quality = session.run.recipe.data.jpeg
    if session.loader != "ffcv":
        if quality:
            raise LoaderError(
                f"'data.jpeg' is {quality}: its images are read by ffcv. Use --loader ffcv"
            )
        return None
    beton.check()
    mode = f"jpeg{quality}" if quality else "raw"
    path = level.directory.with_name(f"{level.key.name}.{mode}.beton")
    try:
        beton.read_beton(path, level)
    except LoaderError as error:  # it is only a copy, so that there is nothing to lose
        if path.exists():
            session.report.say(f"{error}. It is written again")
        _write(session, path, level, quality)
    return path


def _write(session: Session, path: Path, level: Level, quality: int) -> None:
    with session.report.task(f"writing {path.name}", len(level), "images") as tick:

        def done(rows: int) -> None:
            session.stop.check()
            tick(rows)

        if quality:
            beton.write_images(path, level, "jpeg", quality, done)
        else:
            beton.write_images(path, level, tick=done)
