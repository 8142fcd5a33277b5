"""The files of shards, by the layout alone."""

from __future__ import annotations

from pathlib import Path

from strata.store.level.layout import VALUES, shard_name


def shard_path(directory: Path, shard: int, axes: int = 3) -> Path:
    """The file of a shard in the directory of its level, of samples of so many axes."""
    return directory / VALUES / shard_name(shard, axes)
