"""`audit` finds what is wrong with a share p of the rows as often as it says, and takes seconds.

Claim: of levels of which a share p of the rows was altered, an audit of n rows finds the share
1 - (1 - p)^n, whatever was altered (MUTANTS); every hash in them holds, so nothing else tells.
1,000 mutants. And 300 rows of every level of all of CIFAR-10 (JPEG) take under 30 seconds a level.
Machine: 2 cores, shared; the times are of one run each, reading the tar included.

    STRATA_TEST_DATA=DATA python benchmarks/audit.py --write
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cifar_images
import measuring
import numpy as np
import torch
from PIL import Image

import checkout  # noqa: F401
from strata.pipeline.feed.features import frozen_layer, image_views, level_draws
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.run import rundir
from strata.pipeline.run.session import Session
from strata.pipeline.study.audit import audit
from strata.pipeline.train import algorithm
from strata.stages.data.opening import open_source
from strata.stages.network.featurize import featurize
from strata.store.feature_store import Store
from strata.store.level.layout import LevelKey
from strata.store.level.level import commit_of

RECIPE = """
[data]
source = "npz:{images}"
classes = 10
channels = 3
size = 16
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
train = {train}
test = {test}
[augment]
pad = 2
crop = 16
flip = true
views = 2
[network]
layers = 2
width = 8
downsample = [1]
batch_norm = true
bias = false
[auxiliary]
k = 1
width = 8
[schedule]
kind = "one-cycle"
epochs = 1
batch = 64
lr = 0.1
precision = "float32"
[cache]
precision = "{precision}"
shard_mb = 1
block = 64
"""
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05)
ROWS, TRAIN, TEST = 60, 2000, 500
SECONDS = 30


def made(place: Path, images: Path, precision: str, train: int, test: int) -> Session:
    """A run of two layers on 32×32 images, which are resized, with every level of it."""
    text = RECIPE.format(images=images, precision=precision, train=train, test=test)
    facts = {"compute": "float32", "device": "cpu", "machine": {}, "versions": {}}
    run = rundir.create(place / "run", "small", text, 0, None, facts, parse(text, "small", place))
    session = Session(run, Store(place / "store"), torch.device("cpu"))
    ensure_images(session)
    algorithm.make(session, write=2)
    return session


def forge(session: Session, key: LevelKey, rows: np.ndarray, **arrays: np.ndarray) -> None:
    """Write a level with other rows (stored elements), or other arrays beside it, and commit it."""
    store, level = session.store, session.store.open(key).let_go()
    beside = {name: level.array(name) for name in level.arrays} | arrays
    tool = commit_of(level.directory)["tool"]
    shape, parent = replace(level.geometry, rows=len(rows)), level.parent
    del level  # nobody removes a level that is held
    store.remove_level(key)
    writer = store.writer(key, shape, session.run.lineage(key.depth))
    with writer.locked():
        parts = (slice(*writer.geometry.shard_range(s)) for s in range(writer.geometry.shards))
        writer.fill((number, rows[part]) for number, part in enumerate(parts))
        writer.commit(parent, beside, tool)


def whole(session: Session, key: LevelKey) -> np.ndarray:
    """Every row of a level, as it is stored."""
    level = session.store.open(key)
    return level.read(0, len(level))


def rows_of(session: Session, key: LevelKey, **other: Any) -> np.ndarray:
    """Every row of a level as it would be stored, made of other images, draws or weights.

    Args:
        images: uint8 (rows, channel, y, x), in place of x_0.
        draws: in place of the view's.
        change: of the weights of layer 1, in place.
    """
    recipe, seed = session.run.recipe, session.run.seed
    images, ids = session.images()[key.split], session.images()[key.split].array("sample_id")
    draws = other.get("draws") or level_draws(recipe, seed, key.view, len(images))
    layers = [frozen_layer(session.run, j, session.device) for j in range(1, key.depth + 1)]
    if "change" in other:
        other["change"](next(layers[0].layer.parameters()))
    stored = torch.from_numpy(other.get("images", images.read(0, len(images))))
    x = image_views(recipe, stored, draws.of(ids))
    how = {"block": recipe.cache.block, "compute": session.compute}
    return featurize(layers, x, **how, encode=True).numpy()


# ---- the mutants: each gives the rows of a level of which all are wrong, or nearly all -----------


def one_ulp(weights: torch.Tensor) -> None:
    weights[0, 0, 1, 1] = torch.nextafter(weights[0, 0, 1, 1], torch.tensor(torch.inf))


def edited(session: Session, key: LevelKey) -> np.ndarray:
    rows = whole(session, key).copy()
    rows[:, 0, 3, 5] ^= 1
    return rows


def swapped(session: Session, key: LevelKey) -> np.ndarray:
    """Every two neighbours have changed places."""
    rows = whole(session, key)
    return rows[np.arange(len(rows)) ^ 1]


def shards_swapped(session: Session, key: LevelKey) -> np.ndarray:
    """The second half of the level lies before the first."""
    rows = whole(session, key)
    return np.roll(rows, len(rows) // 2, axis=0)


def resized(session: Session, key: LevelKey) -> np.ndarray:
    """By another filter."""
    ids, side = session.images()[key.split].array("sample_id"), session.run.recipe.data.size
    with open_source(session.run.source, root=Path()) as source:
        images = (source.image(key.split, int(i)) for i in ids)
        how = (side, side), Image.Resampling.BICUBIC
        rows = np.stack([np.asarray(image.resize(*how)) for image in images])
    return np.ascontiguousarray(rows.transpose(0, 3, 1, 2))


def frozen_flip(session: Session, key: LevelKey) -> np.ndarray:
    """Every image flipped, whatever the view says: wrong where it says no."""
    count = len(session.images()[key.split])
    true = level_draws(session.run.recipe, session.run.seed, key.view, count)
    return rows_of(session, key, draws=Draws(np.ones(count, bool), true.offsets))


def reused_seed(session: Session, key: LevelKey) -> np.ndarray:
    """The draws of another seed."""
    count = len(session.images()[key.split])
    draws = level_draws(session.run.recipe, session.run.seed + 1, key.view, count)
    return rows_of(session, key, draws=draws)


def one_off(session: Session, key: LevelKey) -> np.ndarray:
    rows = whole(session, key).copy()
    rows[:, 1, 2, 1] ^= 1  # the lowest bit: the even one of a pair of codes
    return rows


MUTANTS: dict[str, tuple[str, int, str, Callable[[Session, LevelKey], np.ndarray]]] = {
    "a weight by one ulp": (
        "float32",
        2,
        "v0",
        lambda session, key: rows_of(session, key, change=one_ulp),
    ),
    "an image edited": ("float32", 0, "clean", edited),
    "rows swapped": ("float32", 1, "v1", swapped),
    "shards swapped": ("uint4", 2, "v1", shards_swapped),
    "another resize filter": ("float32", 0, "clean", resized),
    "a frozen flip": ("float32", 1, "v0", frozen_flip),
    "a reused seed": ("uint4", 1, "v1", reused_seed),
    "one code off": ("uint4", 2, "v0", one_off),
}
"""Precision of the run, depth and view of the level, and the rows that it gets."""


def partly(true: np.ndarray, wrong: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of which a share has the values of others that are wrong."""
    differs = np.flatnonzero((true != wrong).reshape(len(true), -1).any(1))
    chosen = np.random.default_rng(seed).permutation(differs)[: round(share * len(true))]
    rows = true.copy()
    rows[chosen] = wrong[chosen]
    return rows


def caught(session: Session, key: LevelKey, rows: int, draw: int) -> dict[str, Any] | None:
    """What an audit of one level finds; None: nothing."""
    with open_source(session.run.source, root=Path()) as source:
        (found,) = audit(session, source, [key], rows, draw)
    return found if found["different"] or found["beside"] else None


def predicted(share: float, rows: int) -> float:
    return 1 - (1 - share) ** rows


def mutants(
    sessions: dict[str, Session], shares: Sequence[float], rows: int, repeats: int
) -> Iterator[tuple[str, float, bool]]:
    """Every kind of mutant with every share of its rows altered, again and again: was it caught?"""
    seeds = itertools.count()
    for kind, (precision, depth, view, spoil) in MUTANTS.items():
        session = sessions[precision]
        key = session.key(depth, "train", view)
        true, wrong = whole(session, key), spoil(session, key)
        for share, _ in itertools.product(shares, range(repeats)):
            seed = next(seeds)
            forge(session, key, partly(true, wrong, share, seed))
            yield kind, share, caught(session, key, rows, seed) is not None
        forge(session, key, true)


def labelled(session: Session, repeats: int) -> Iterator[bool]:
    """One label of all is another: was it caught? All of them are compared, whatever is drawn."""
    key = session.key(0, "train", "clean")
    true, rows = session.store.open(key).array("label"), whole(session, key)
    for repeat in range(repeats):
        labels = true.copy()
        labels[repeat % len(labels)] ^= 1
        forge(session, key, rows, label=labels)
        yield caught(session, key, 1, repeat) is not None
    forge(session, key, rows, label=true)


def interval(share: float, count: int) -> float:
    """Half of the 95 % interval of a share that was found in so many trials."""
    return 1.96 * math.sqrt(share * (1 - share) / count)


def measure_mutants(place: Path, total: int) -> dict[str, Any]:
    images = cifar_images.images(place, TRAIN, TEST)
    sessions = {
        name: made(place / name, images, name, TRAIN, TEST) for name in ("float32", "uint4")
    }
    repeats = math.ceil(total / len(MUTANTS) / len(SHARES))
    found = list(mutants(sessions, SHARES, ROWS, repeats))
    by_share, by_kind = [], {}
    for share in SHARES:
        of_share = [was for _, s, was in found if s == share]
        expected = predicted(share, ROWS)
        within = abs(np.mean(of_share) - expected) <= 1.5 * interval(expected, len(of_share))
        by_share.append(
            {
                "share_altered": share,
                "mutants": len(of_share),
                "caught": round(float(np.mean(of_share)), 4),
                "predicted": round(expected, 4),
                "holds": bool(within),  # three standard deviations
            }
        )
    for kind in MUTANTS:
        of_kind = [was for k, _, was in found if k == kind]
        by_kind[kind] = {"mutants": len(of_kind), "caught": round(float(np.mean(of_kind)), 4)}
    labels = list(labelled(sessions["float32"], repeats * len(SHARES)))
    by_kind["a label changed"] = {"mutants": len(labels), "caught": float(np.mean(labels))}
    mean = float(np.mean([predicted(share, ROWS) for share in SHARES]))
    for one in list(by_kind.values())[:-1]:
        one["holds"] = abs(one["caught"] - mean) <= 1.5 * interval(mean, one["mutants"])
    return {
        "mutants": len(found) + len(labels),
        "rows_drawn": ROWS,
        "rows": TRAIN,
        "by_share": by_share,
        "by_kind": by_kind,
        "predicted_by_kind": round(mean, 4),
    }


# ---- seconds ------------------------------------------------------------------------------------


def measure_seconds(place: Path) -> dict[str, Any]:
    """Seconds of whole commands on all of CIFAR-10, from the tar and from folders."""
    place.mkdir()
    with tarfile.open(cifar_images.archive()) as tar:
        tar.extractall(place / "folders", filter="data")
    sources = {"folders": place / "folders", "tar.xz": cifar_images.archive()}
    text = RECIPE.format(images="none", precision="uint8", train=50_000, test=10_000)
    text = text.replace("npz:none", f"imagefolder:{place / 'folders'}").replace("= 16", "= 32")
    (place / "cifar.toml").write_text(text.replace("shard_mb = 1", "shard_mb = 64"), "utf-8")
    words = ("cifar.toml", "--run", place / "run", "--store", place / "store")
    measuring.strata(place, "materialize", *words, "--layer", 2)
    found: dict[str, Any] = {"images": 60_000, "rows_drawn": 300}
    for name, path in sources.items():
        given = (*words, "--data", f"imagefolder:{path}")
        for what, more in (("x_2", ("--layer", 2)), ("all levels", ())):
            begun = time.perf_counter()
            said = measuring.strata(place, "audit", *given, *more)
            seconds = round(time.perf_counter() - begun, 1)
            equal = not any(one["different"] or one["beside"] for one in said["levels"])
            found[f"{what}, {name}"] = {
                **{"seconds": seconds, "levels": len(said["levels"]), "equal": equal},
                "holds": equal and seconds < SECONDS,
            }
    print(json.dumps(found), file=sys.stderr)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The mutants, as rows of docs/durability.md."""
    percent = "{:.1f} %".format
    return [
        f"| {100 * one['share_altered']:g} % | {percent(100 * one['predicted'])} "
        f"| {percent(100 * one['caught'])} |"
        for one in found["by_share"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="keep the result beside this file")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="audit-") as top:
        result = {
            "claim": "altered rows are found at the predicted rate; an audit takes seconds",
            "seconds": measure_seconds(Path(top) / "cifar"),
            "mutants": measure_mutants(Path(top), chosen.mutants),
        }
    path = measuring.RESULTS / "audit.json" if chosen.write else None
    measuring.keep(result, path, show=True)


if __name__ == "__main__":
    main()
