"""Damage anywhere is named, is never read as data, and is mended to the same bytes.

One finished run of three layers (codes of 8 bits, so that there are scales) is damaged in one place
after another: a flipped bit in any file of the store or of the weights; a shard that is missing,
empty, truncated or full of NULs; two shards swapped, of one level or of two; a level's directory
renamed. Each time `verify --deep` must name the file, reading every row must give the right rows or
an error, and `--repair` must give back every byte.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import durability_kills
import numpy as np

import checkout  # noqa: F401
from strata.pipeline.commands import lifecycle, verify
from strata.pipeline.options import Options
from strata.store.errors import StoreError
from strata.store.files.publish import unseal
from strata.store.level.layout import VALUES, ZARR, LevelKey
from strata.store.level.level import COMMIT, Level

VOUCHED = ("weights", "auxiliary", "quantiser", "layer.json", "test_logits")
OPTIONS = Options(recipe="tiny.toml", device="cpu", as_json=True)


# ---- damage: each returns the paths of which one must be named ----------------------------------


def flipped(draw: random.Random, files: list[Path]) -> list[Path]:
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return [path]


def missing(draw: random.Random, files: list[Path]) -> list[Path]:
    path = draw.choice(shards(files))
    path.unlink()
    return [path]


def rewritten(change: Callable[[random.Random, bytes], bytes]) -> Callable[..., list[Path]]:
    def damage(draw: random.Random, files: list[Path]) -> list[Path]:
        path = draw.choice(shards(files))
        path.write_bytes(change(draw, path.read_bytes()))
        return [path]

    return damage


def swapped(draw: random.Random, files: list[Path]) -> list[Path]:
    one, other = draw.sample(shards(files), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return [one, other]


def renamed(draw: random.Random, files: list[Path]) -> list[Path]:
    level = draw.choice(shards(files)).parents[1]
    name = draw.choice(("test", "train.v7", "train.plain", "train.flipped", "old"))
    place = level.with_name(name)
    if place == level:
        place = level.with_name("other")
    if place.exists():  # two levels change places
        aside = level.with_name("aside")
        place.rename(aside)
        level.rename(place)
        aside.rename(level)
        return [place, level]
    level.rename(place)
    return [place]


DAMAGE: dict[str, Callable[[random.Random, list[Path]], list[Path]]] = {
    "flipped bit": flipped,
    "shard missing": missing,
    "shard empty": rewritten(lambda draw, data: b""),
    "shard truncated": rewritten(lambda draw, data: data[: draw.randrange(1, len(data))]),
    "shard of NULs": rewritten(lambda draw, data: bytes(len(data))),
    "shards swapped": swapped,
    "directory renamed": renamed,
}
WEIGHTS = (10, 1, 1, 1, 1, 1, 1)
"""Most of the cases are flipped bits, because they can be anywhere."""


def shards(files: list[Path]) -> list[Path]:
    return [path for path in files if path.parent.name == VALUES and path.name != ZARR]


# ---- one case -----------------------------------------------------------------------------------


@contextmanager
def inside(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def everything(place: Path) -> dict[Path, bytes]:
    """The files that must come back: every file of every level, and what vouches for weights."""
    files = [path for path in place.glob("features/x_*/**/*") if path.is_file()]
    files += [p for p in place.glob("runs/**/layer_*/*") if p.name.startswith(VOUCHED)]
    return {path: path.read_bytes() for path in sorted(files)}


def comparable(files: dict[Path, bytes]) -> dict[Path, bytes]:
    """Without the record of a layer, which says how long it took."""
    return {path: data for path, data in files.items() if path.name != "layer.json"}


def rows_of(place: Path) -> dict[LevelKey, bytes]:
    """All rows of every level that opens, in random batches; errors of the store are fine."""
    found = {}
    for commit in place.glob(f"features/x_*/*/{COMMIT}"):
        try:
            key = LevelKey(**unseal(commit)["level"])
            level = Level.open(place / "features", key)
            parts = np.array_split(np.arange(len(level)), 5)
            found[key] = b"".join(level.read(int(p[0]), int(p[-1]) + 1).tobytes() for p in parts)
        except StoreError:
            continue
    return found


def named(paths: list[Path]) -> bool:
    found = verify.check(lifecycle.find(OPTIONS), deep=True)
    at_fault = {d.path.absolute() for d in found.damaged} | {p.absolute() for p, _ in found.run}
    return any(path.absolute() in at_fault for path in paths)


def mended() -> None:
    overview = lifecycle.find(OPTIONS)
    with lifecycle.at_work(overview, OPTIONS) as session:
        verify.repair(session, verify.check(overview, deep=True))


def measure(cases: int, seed: int) -> dict[str, Any]:
    """Counts over ``cases`` cases of damage, each undone by the repair before the next."""
    durability_kills.prepare()
    draw, counts, kinds = random.Random(seed), Counter(), Counter()
    with tempfile.TemporaryDirectory(prefix="corruption-") as top, inside(Path(top)):
        place = Path(top)
        recipe = durability_kills.RECIPE.replace("epochs = 2", "epochs = 1")
        (place / "tiny.toml").write_text(recipe + 'precision = "uint8"\n')
        lifecycle.perform(lifecycle.find(OPTIONS), OPTIONS, write=3)
        whole, rows = everything(place), rows_of(place)
        for case in range(cases):
            kind = draw.choices(list(DAMAGE), WEIGHTS)[0]
            at_fault = DAMAGE[kind](draw, list(everything(place)))
            kinds[kind] += 1
            counts["not named"] += not named(at_fault)
            read = rows_of(place)
            counts["wrong rows read"] += any(rows[key] != data for key, data in read.items())
            mended()
            same = comparable(everything(place)) == comparable(whole)
            counts["not mended"] += not same
            shutil.rmtree(place / "features/quarantine", ignore_errors=True)
            if case % 50 == 49:
                print(f"  corruption: {case + 1} of {cases}, {dict(counts)}", file=sys.stderr)
    holds = not any(counts.values())
    return {"cases": cases, "by_kind": dict(kinds), "files": len(whole), **counts, "holds": holds}
