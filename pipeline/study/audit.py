"""Is a cache right? Rows drawn at random are made again from the images, as they lie in their
source, through the layers, and compared with what is stored, to the bit.

Nothing that is checked is used for it: which sample a row is, its label, its pixels and its draw of
the augmentation come from the source, the recipe and the seed, and the layers from the run. So that
the bits are those of the writer, a forward pass has as many rows as one of its own, and what a
layer gives is stored and read back, in memory, before the next one sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.errors import RunConflict
from strata.pipeline.feed.features import frozen_layers, image_views, level_draws
from strata.pipeline.materialize.images import ImageShards, memo_of, order_of_rows
from strata.pipeline.plan.costs import level_geometry
from strata.pipeline.run import record
from strata.pipeline.run.device import versions
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.session import Session
from strata.stages.data.images import SPLITS, Source, survey
from strata.stages.features.quantise import Codec
from strata.stages.network.featurize import Frozen, featurize
from strata.store.errors import LevelConflict, LevelDamaged
from strata.store.feature_store import Store
from strata.store.files.publish import unseal
from strata.store.level.layout import LevelKey, depth_directory
from strata.store.level.level import Level, commit_of
from strata.store.read.order import generator, parts

CONFIDENCE = 0.95
NAMES = ("row", "stored", "expected", "sample", "name")
"""What is said of a value that differs, beside its place in the row."""
NAMED = 5
"""Rows of a level that are named where they differ."""


def audit(
    session: Session, source: Source, keys: Sequence[LevelKey], rows: int, draw: int
) -> list[dict[str, Any]]:
    """What was found of some levels, as JSON, the lowest first.

    Args:
        rows: that are drawn of every split, the same of all its levels.
        draw: names the draw: the same draws the same rows.

    Raises:
        RunConflict: the source has not as many images as the run was made from.
        LevelDamaged: a row, a small array or weights are not what was written.
        LevelConflict: a level has another shape or precision.
    """
    run, block, found = session.run, session.run.recipe.cache.block, _surveyed(session, source)
    depth = max((key.depth for key in keys), default=0)
    layers = frozen_layers(run, range(1, depth + 1), session.device)
    audited: dict[LevelKey, dict[str, Any]] = {}
    for split in dict.fromkeys(key.split for key in keys):
        samples = order_of_rows(session.key(0, split, "clean"), found)
        drawn = np.sort(generator("audit", draw, split).permutation(len(samples))[:rows])
        levels = {key: session.store.open(key) for key in keys if key.split == split}
        beside: dict[str, Any] = {"label": source.labels(split)[samples], "sample_id": samples}
        for key, level in levels.items():
            shapes = level.geometry, level_geometry(run.recipe, key.depth, len(samples))
            has, wanted = (f"{g.rows:,} rows of {g.sample} {g.precision}" for g in shapes)
            if has != wanted:
                raise LevelConflict(f"{key.label} has {has}, the images give {wanted}")
            scales = layers[key.depth - 1].stored.tensors() if key.depth else {}
            audited[key] = _begun(level, beside | scales, len(drawn))
        shape = level_geometry(run.recipe, 0, len(samples))
        images = ImageShards(run.recipe, source, split, samples, shape, found["scales"])
        with session.report.task(f"auditing {split}", len(drawn), "rows") as tick:
            for part in parts(drawn, block):
                session.stop.check()
                pixels = np.stack([images.pixels(sample) for sample in samples[part]])
                for key, values in _computed(session, layers, levels, pixels, samples[part]):
                    codec, one = layers[key.depth - 1].stored if key.depth else None, audited[key]
                    wrong, first = _compared(levels[key], part, values, codec)
                    if first and not one["different"]:
                        sample = int(samples[first["row"]])
                        which = {"sample": sample, "name": source.name(split, sample)}
                        one["first"] = first | which
                    one["different"] += wrong
                tick(len(part))
    return sorted(audited.values(), key=itemgetter("depth"))


def _surveyed(session: Session, source: Source) -> dict[str, Any]:
    """What :func:`order_of_rows` asks, by listing; of images that were broken, by the record of the
    survey, or by looking again. Raises RunConflict: there are more images now, or fewer."""
    known = session.run.data()
    assert known is not None
    kept: Mapping[str, Any] = {split: np.arange(source.count(split)) for split in SPLITS}
    if known["broken_count"]:
        try:
            memo, files = memo_of(session, known["signature"]), session.store.files
            kept = unseal(memo, files, record.SURVEY)["kept"]
        except (FileNotFoundError, LevelDamaged):
            kept = survey(source, skip_broken=True).kept
    there, was = sum(map(source.count, SPLITS)), [known[split] for split in SPLITS]
    sizes = [len(kept[split]) for split in SPLITS if kept[split][-1] < source.count(split)]
    if sizes != was or there != sum(was) + known["broken_count"]:
        raise RunConflict(
            f"the source has {there:,} images, or they are in other splits; the run was made from "
            f"{sum(was):,}, and {known['broken_count']:,} broken. Restore them, or name them with "
            "--data"
        )
    return {"kept": kept, "scales": known.get("scales", {})}


def _begun(level: Level, arrays: Mapping[str, Any], drawn: int) -> dict[str, Any]:
    """What is said of a level of which no row was compared yet, but all of the small arrays beside
    it with what they should be."""
    beside = list[str]()
    for name, array in arrays.items():
        found, expected = level.array(name).ravel(), np.ravel(torch.as_tensor(array).cpu())
        if len(wrong := np.flatnonzero(found != expected)):
            count, i = f"{len(wrong):,} of {len(found):,} differ", wrong[0]
            beside.append(f"{name}: {count}: {i} has {found[i]}, should have {expected[i]}")
    return {
        **{"level": level.key.label, "depth": level.key.depth, "directory": str(level.directory)},
        **{"rows": len(level), "drawn": drawn, "bound": bound(drawn, len(level))},
        **{"different": [], "first": None, "beside": beside},
    }


def bound(drawn: int, rows: int) -> float:
    """The share of rows below which those that differ are, if none of those drawn does."""
    return 0.0 if drawn == rows else 1 - (1 - CONFIDENCE) ** (1 / drawn)


def _computed(
    session: Session,
    layers: Sequence[Frozen],
    keys: Iterable[LevelKey],
    pixels: np.ndarray,
    samples: np.ndarray,
) -> Iterator[tuple[LevelKey, Tensor]]:
    """The stored form of some rows in every level, from their images, uint8 (n, channel, y, x)."""
    run, images = session.run, torch.from_numpy(pixels)
    wanted = {(key.view, key.depth): key for key in keys}
    if ("clean", 0) in wanted:
        yield wanted.pop(("clean", 0)), images
    for view in dict.fromkeys(view for view, _ in wanted):
        draws = level_draws(run.recipe, run.seed, view, int(samples.max()) + 1).of(samples)
        x = image_views(run.recipe, images.to(session.device), draws)
        for j in range(1, max(depth for name, depth in wanted if name == view) + 1):
            frozen, block = layers[j - 1], run.recipe.cache.block
            stored = featurize([frozen], x, block=block, compute=session.compute, encode=True)
            if (view, j) in wanted:
                yield wanted[view, j], stored
            x = frozen.stored.decode(stored, level_geometry(run.recipe, j, 1).features)


def _compared(
    level: Level, rows: np.ndarray, computed: Tensor, codec: Codec | None
) -> tuple[list[int], dict[str, Any] | None]:
    """Which of some rows (ascending) are not what was computed, and the first value that is not:
    a code where codes are stored."""
    shape = level.geometry
    found = np.empty((len(rows), *shape.lying), shape.dtype)
    level.take(rows, found)
    pair = [torch.from_numpy(found).movedim(-1, shape.axis), computed.cpu()]
    if codec is not None:
        pair = [codec.unpacked(one, shape.features) for one in pair]
    pair = [one.contiguous() for one in pair]
    bits = [one.view(torch.uint8).unflatten(-1, (one.shape[-1], -1)) for one in pair]
    differs = (bits[0] != bits[1]).any(-1)
    wrong = differs.flatten(1).any(1).nonzero().flatten().tolist()
    if not wrong:
        return [], None
    place = differs[wrong[0]].nonzero()[0].tolist()
    stored, expected = (one[(wrong[0], *place)].item() for one in pair)
    names = ("channel", "y", "x") if shape.is_map else shape.axes
    first = {"row": int(rows[wrong[0]]), **dict(zip(names, place, strict=True))}
    return rows[wrong].tolist(), {**first, "stored": stored, "expected": expected}


# ---- what it says -------------------------------------------------------------------------------


def lines(one: Mapping[str, Any]) -> Iterator[str]:
    """What was found of a level: a line, and one for the first value that differs."""
    different, said, at = one["different"], list(one["beside"]), one["first"]
    if not (different or said):
        percent = f"{math.ceil(10**4 * one['bound']) / 100:g} %"
        share = f"with 95 % confidence fewer than {percent} of rows differ"
        said = [share if one["bound"] else "these are all rows"]
        said += one.get("right", ["labels and order of all rows are right"])
    elif different:
        rows = ", ".join(map(str, different[:NAMED])) + " …" * (len(different) > NAMED)
        said = [f"these differ: {rows}", *said]
    equal = f"{one['drawn'] - len(different):,} of {one['drawn']:,} equal"
    yield f"{one['level']}: {equal}: {'; '.join(said)}"
    if at:
        place = ", ".join(f"{axis} {i}" for axis, i in at.items() if axis not in NAMES)
        yield (
            f"  row {at['row']} (sample {at['sample']}, {at['name']}), {place}: "
            f"{at['stored']:.9g}, should be {at['expected']:.9g}"
        )


def of_other_weights(run: Run, store: Store) -> Iterator[str]:
    """What is in a store of x_j as the run last wrote it, and not of the weights it has now."""
    names = {node.fingerprint for node in run.nodes()}
    for j in range(1, run.layers + 1):
        if (last := run.features(j)) and last["fingerprint"] not in names:
            directory = depth_directory(store.root, j, last["fingerprint"])
            if store.files.exists(directory):
                yield f"{directory.name} is of earlier weights, and left out: `explain -l {j}`"


def reason(session: Session, source: Source, lowest: Mapping[str, Any]) -> str:
    """What can be the reason that levels differ, the ``lowest`` first, and what to do next."""
    run, j, directory = session.run, lowest["depth"], Path(lowest["directory"])
    if j == 0:
        why = "images were changed since they were read, or moved: restore them, or use another run"
        if source.signature() == (run.data() or {})["signature"]:
            why = f"remove {directory} to have it written again"
        return f"x_0 differs already, so it is not the weights; {why}"
    tool = commit_of(directory, session.store.files)["tool"] | {"device": run.facts["device"]}
    here = versions() | {"device": session.device.type}
    made = [f"{what} {tool[what]}, now {v}" for what, v in here.items() if tool.get(what, v) != v]
    return (
        f"x_{j} is the lowest that differs; the reason can be {'; '.join(made) or 'other weights'}."
        f" `evict --layer {j}` and `materialize --layer {j}` write it again; layers above have seen"
        " what lies there"
    )
