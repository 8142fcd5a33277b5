"""Faults of levels and runs: each spoils a thing, and returns the paths that must be named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from command import Result
from runs import Place, tiny

from strata.store.level.level import COMMIT

TEXT = tiny(flip="false", layers=2, epochs=1)
"""A run to spoil. x_1 train.plain has four shards, every other level one or two."""
Fault = Callable[[Path], None]
"""Spoils one file."""
Spoil = Callable[[Place], list[Path]]


def flip(path: Path, byte: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def early_flip(path: Path) -> None:
    flip(path, 100)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def nuls(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def hole(path: Path) -> None:
    """A page that never reached the disk."""
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)


def exchange(a: Path, b: Path) -> list[Path]:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    return [a, b]


def in_level(name: str, fault: Fault, depth: int = 1, level: str = "train.plain") -> Spoil:
    def spoil(place: Place) -> list[Path]:
        path = place.level(depth, level) / name
        fault(path)
        return [path]

    return spoil


def without(array: str) -> Spoil:
    def spoil(place: Place) -> list[Path]:
        directory = place.level(1, "train.plain") / array
        paths = list(directory.iterdir())
        shutil.rmtree(directory)
        return paths

    return spoil


def in_run(name: str, fault: Fault = flip) -> Spoil:
    def spoil(place: Place) -> list[Path]:
        fault(place.run / name)
        return [place.run / name]

    return spoil


def intent(fault: Fault) -> Spoil:
    def spoil(place: Place) -> list[Path]:
        path = place.level(1, "test").parent / "intent.json"
        fault(path)
        return [path]

    return spoil


def swapped(a: tuple[int, str], b: tuple[int, str]) -> Spoil:
    def spoil(place: Place) -> list[Path]:
        return exchange(
            *(
                place.level(depth, name.split("/")[0]) / Path(*name.split("/")[1:])
                for depth, name in (a, b)
            )
        )

    return spoil


def renamed(depth: int, name: str, other: str) -> Spoil:
    def spoil(place: Place) -> list[Path]:
        return [place.level(depth, name).rename(place.level(depth, name).with_name(other))]

    return spoil


def other_fingerprint(place: Place) -> list[Path]:
    depth = place.level(1, "test").parent
    moved = depth.rename(depth.with_name("x_1-0123456789ab"))
    return [moved / "test", moved / "train.plain"]


def copied_over(place: Place) -> list[Path]:
    """One level lies where another should, and where it should, too."""
    target = place.level(1, "train.plain")
    shutil.rmtree(target)
    shutil.copytree(place.level(2, "train.plain"), target)
    return [target]


SHARD = "x/c.2.0.0.0"
SIZES: dict[str, Spoil] = {
    "shard missing": in_level(SHARD, Path.unlink),
    "shard empty": in_level(SHARD, empty),
    "shard truncated": in_level(SHARD, truncate),
    "shards of two levels swapped": swapped((1, f"train.plain/{SHARD}"), (2, "test/x/c.0.0.0.0")),
}
"""Shards of another size."""
BYTES: dict[str, Spoil] = {
    "one bit": in_level(SHARD, early_flip),
    "NULs": in_level(SHARD, nuls),
    "hole": in_level(SHARD, hole),
    "shards of a level swapped": swapped(
        (1, f"train.plain/{SHARD}"), (1, "train.plain/x/c.1.0.0.0")
    ),
    "images": in_level("x/c.0.0.0.0", early_flip, 0, "train"),
    "one bit of the index": in_level(SHARD, lambda path: flip(path, -3)),
}
"""Shards of the right size: only their hash tells."""
STRUCTURE: dict[str, Spoil] = SIZES | {
    "receipt": in_level("receipts/000002.json", flip),
    "receipt missing": in_level("receipts/000000.json", Path.unlink),
    "zarr.json": in_level("zarr.json", flip),
    "zarr.json of the rows": in_level("x/zarr.json", flip),
    "zarr.json of the labels": in_level("label/zarr.json", empty),
    "commit": in_level(COMMIT, flip),
    "commit full of NULs": in_level(COMMIT, nuls),
    "commit of x_0": in_level(COMMIT, early_flip, 0, "train"),
    "intent": intent(flip),
    "intent missing": intent(Path.unlink),
    "label": in_level("label/c.0", flip, 0, "train"),
    "sample id": in_level("sample_id/c.0", empty, 0, "test"),
    "label of x_1": in_level("label/c.0", flip),
    "label missing": without("label"),
    "x missing": without("x"),
    "level renamed": renamed(1, "train.plain", "train.flipped"),
    "depth renamed": other_fingerprint,
    "levels of one depth swapped": swapped((1, "train.plain"), (1, "test")),
    "levels of two depths swapped": swapped((1, "train.plain"), (2, "train.plain")),
    "level copied over another": copied_over,
    "weights": in_run("layer_1/weights.safetensors"),
    "weights missing": in_run("layer_2/weights.safetensors", Path.unlink),
    "auxiliary": in_run("layer_2/auxiliary.safetensors"),
    "layer": in_run("layer_1/layer.json"),
    "data": in_run("data.json"),
    "evaluation": in_run("evaluation.json"),
}
"""What sizes, names and the hashes of small files tell."""


def params(faults: dict[str, Spoil]) -> list[ParameterSet]:
    return [pytest.param(spoil, id=name) for name, spoil in faults.items()]


def named(said: Result) -> list[str]:
    """The paths that a verification names."""
    return sorted(entry["path"] for entry in json.loads(said.out)["damaged"])
