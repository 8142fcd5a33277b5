"""Runs whose store is in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command import Result, start
from runs import Place, tiny
from s3_server import connect, contents

from strata.store.feature_store import Store

TEXT = tiny(flip="false", layers=2, epochs=1) + 'profile = "zstd"\n'
"""x_1 train.plain has several shards."""


@dataclass(frozen=True)
class Remote(Place):
    """A place whose store is in a bucket."""

    bucket: str = ""

    @property
    def store(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"s3://{self.bucket}/store"

    @property
    def options(self) -> tuple[object, ...]:
        return (*super().options, "--read-cache", f"{self.root / 'cache'}:50MB")

    @property
    def objects(self) -> Store:
        return connect(self.bucket)

    def level_path(self, depth: int, name: str) -> Path:
        (found,) = (n for n in self.objects.files.names(self.objects.root) if f"x_{depth}-" in n)
        return self.objects.root / found / name


def levels(store: Store) -> dict[str, bytes]:
    return {name: data for name, data in contents(store).items() if name.startswith("x_")}


def local_levels(local: Place) -> dict[str, bytes]:
    return {name: data for name, data in local.files().items() if name.startswith("x_")}


def both(places: Sequence[Place], *arguments: object) -> list[Result]:
    """The same command of all of them at once, in processes."""
    command, *rest = arguments
    started = [start(place.root, command, *place.options, *rest) for place in places]
    results = []
    for process in started:
        with process:
            try:
                out, err = process.communicate(timeout=120)
            finally:
                process.kill()
        results.append(Result(process.returncode, out, err))
    return results
