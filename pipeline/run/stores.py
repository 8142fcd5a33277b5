"""From what ``--store`` says to a store: a directory, or a part of a bucket."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from strata.pipeline.errors import LoaderError, OptionRange
from strata.pipeline.progress import parse_size
from strata.pipeline.run.rundir import Run
from strata.store.feature_store import Place, Store, is_url
from strata.store.files.files import Files

READ_CACHE = "read-cache"
CACHE_BYTES = 20 * 10**9
"""Of local copies of an object store's shards, where nothing else is said."""


@dataclass(frozen=True)
class StoreAddress:
    """Where a worker finds a store: the command holds its levels. Credentials are its own."""

    place: str
    """Absolute, or a URL."""
    read_cache: str | None = None

    @classmethod
    def of(cls, store: Store) -> StoreAddress:
        """The address of a store; of a bucket with its read cache, at the same path over there."""
        if not store.remote:
            return cls(str(store.root.absolute()))
        from strata.store.s3.objects import Objects

        files = store.files
        assert isinstance(files, Objects)
        alone = "" if files.conditional else "?writers=1"
        cache = files.cache and f"{files.cache.directory.absolute()}:{files.cache.budget}B"
        return cls(f"{store.root}{alone}", cache)

    def open(self) -> Store:
        """Raises StoreRefused: the environment says nothing sensible of the object store."""
        store = open_store(self.place, self.read_cache)
        return Store(store.root, store.files, hold=False)

    @property
    def files(self) -> Files:
        """The files of the store. Raises as :meth:`open`."""
        return self.open().files


def open_store(place: Place, read_cache: str | None = None) -> Store:
    """
    Args:
        read_cache: where copies of an object store's shards lie, and how many bytes they may take:
            ``PATH``, ``PATH:20GB``.

    Raises:
        OptionRange: there is no such kind of store, or size.
        StoreRefused: the environment says nothing sensible of the object store.
    """
    if not is_url(place):
        return Store(Path(place))
    directory, budget = _cache(read_cache or READ_CACHE)
    return _remote(str(place), directory, budget)


@cache
def _remote(url: str, directory: Path, budget: int) -> Store:
    """One client for all that a process does: it keeps its connections."""
    from strata.store.s3.objects import Objects
    from strata.store.s3.read_cache import ReadCache
    from strata.store.s3.s3 import object_path

    bucket, prefix, several = _parsed(url)
    files = Objects(bucket, ReadCache(directory, budget), conditional=several)
    return Store(object_path(f"s3://{bucket}/{prefix}"), files)


def _parsed(url: str) -> tuple[str, str, bool]:
    """Bucket, prefix, and whether several may write."""
    from strata.store.s3.s3 import parsed

    try:
        return parsed(url)
    except ValueError as error:
        raise OptionRange(f"--store: {error}") from None


def _cache(text: str) -> tuple[Path, int]:
    """``PATH`` or ``PATH:BYTES``."""
    path, colon, size = text.rpartition(":")
    if not colon:
        return Path(text), CACHE_BYTES
    try:
        return Path(path), parse_size(size)
    except ValueError as error:
        raise OptionRange(f"--read-cache {text}: {error}. It is PATH or PATH:BYTES") from None


def check_loader(store: Store, loader: str) -> None:
    """Raises LoaderError if a loader cannot read a store."""
    if store.remote and loader != "native":
        raise LoaderError(
            f"--loader {loader} reads files, and {store.root} has none. Use --loader native"
        )


def check_several(place: Place) -> None:
    """Raises OptionRange if a store is said to have one writer: the bytes of a worker that is slow
    and believed dead would replace what others have vouched for, also after the commit."""
    if is_url(place) and not _parsed(str(place))[2]:
        raise OptionRange(
            f"--store {place} says that there is one writer, and workers are several. Leave out "
            "--workers and --scheduler"
        )


def check_calibrated(place: Place) -> None:
    """Raises OptionRange: the rates of an object store are not those of a disk."""
    if is_url(place):
        raise OptionRange(
            f"--store {place}: calibrate measures a disk. Measure with a local --store, and name "
            "the figures with --machine"
        )


def default_profile(store: Store, run: Run) -> str:
    """How a run's features lie in a store where nothing else is known: packed in an object store,
    which is slow and paid by the byte, unless the recipe names a profile."""
    text = (run.directory / "recipe.toml").read_text("utf-8")
    named = tomllib.loads(text).get("cache", {}).get("profile", "auto")
    if store.remote and named == "auto":
        return "zstd"
    return "raw" if named == "auto" else named
