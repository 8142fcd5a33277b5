"""Are features that another program wrote what a network gives for the data?

Rows drawn at random are made again and compared. Kernels, batches and versions of others round
otherwise, so rows are equal within a tolerance, and of those that are not it is said how far off
they are. Then it is tried what would explain them: another order, other preprocessing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from strata.pipeline.progress import Reporter
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.study.audit import bound
from strata.pipeline.study.foreign import NEAR, Form, Network, Table, distance, inputs
from strata.stages.data import augment
from strata.stages.data.sources import Source
from strata.store.read.order import generator, parts

TOLERANCE, TOLERANCE_16 = 1e-3, 1e-2
"""What a value may differ by, relative to itself and to the row's size, in 32 bits and in 16."""
TRIED, READ_VALUES = 16, 1 << 24
"""Rows that differ for which an explanation is looked for; values read for it at a time."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def audit(
    table: Table,
    network: Network,
    source: Source,
    split: str,
    layer: int | None,
    drawn: int,
    draw: int,
    report: Reporter,
) -> dict[str, Any]:
    """What was found of one split, as JSON, as of a level of ours; ``why`` has what would explain
    it.

    Args:
        layer: the rows are of x_layer; None: of the x_j that has their size.
        drawn: rows that are drawn; ``draw`` names the draw.

    Raises:
        OptionRange: no x_j has rows of that size.
        DataError: a sample that is drawn cannot be read.
    """
    recipe, there, first = network.recipe, len(table) - table.first, table.first
    count, block = min(source.count(split), there), recipe.cache.block
    samples = np.sort(generator("audit", draw, split).permutation(count)[:drawn])
    stored, made = table.take(samples + first), list[Tensor]()
    few = inputs(recipe, source, split, samples[:TRIED])
    key = network.chosen(few, stored[: len(few)], layer)
    with report.task(f"auditing {split}", len(samples), "rows") as tick:
        for some in parts(samples, block):
            made.append(network.form(key, inputs(recipe, source, split, some)))
            tick(len(some))
    expected = torch.cat(made)
    allowed = TOLERANCE_16 if table.parts[0].element_size() == 2 else TOLERANCE
    size = expected.square().mean(1, keepdim=True).sqrt()
    differs = ~((stored - expected).abs() <= allowed * (expected.abs() + size))
    wrong = differs.any(1).nonzero().flatten().numpy()
    found: dict[str, Any] = {"level": f"{split}, {key[1]}", "depth": key[0], "rows": count}
    found |= {"drawn": len(samples), "bound": bound(len(samples), count), "first": None, "why": []}
    found |= {"different": (samples[wrong] + first).tolist(), "beside": [], "right": []}
    if source.count(split) != there and not table.shared:
        found["beside"].append(f"{there:,} rows, and {source.count(split):,} samples")
    if table.labels:
        pieces = [one for one in table.labels if one.shape[1:] == table.labels[0].shape[1:]]
        labels = torch.cat(pieces)[first:][:count].numpy()
        of_labels(found, labels, source.labels(split)[:count])
    if len(wrong):
        row, i = wrong[0], int(differs[wrong[0]].nonzero()[0])
        sample = {"sample": int(samples[row]), "name": source.name(split, int(samples[row]))}
        pair = {"stored": float(stored[row, i]), "expected": float(expected[row, i])}
        found["first"] = {"row": int(samples[row]) + first, "value": i, **pair, **sample}
        found["distance"], tried = distance(stored[wrong], expected[wrong]), wrong[:TRIED]
        found["why"] += of_order(table, stored[tried], expected[tried], samples[tried])
        found["why"] += of_inputs(network, source, split, key, samples[tried], stored[tried])
    return found


# ---- explanations --------------------------------------------------------------------------------


def of_labels(found: dict[str, Any], labels: np.ndarray, expected: np.ndarray) -> None:
    """Add what is wrong with the labels, and what would explain it."""
    if labels.ndim == 2 and expected.ndim == 1 and labels.shape[1] > 1:
        labels = labels.argmax(1)  # one-hot, or probabilities
    if labels.size != expected.size:
        found["beside"].append(
            f"labels have shape {labels.shape}, those of the data {expected.shape}"
        )
        return
    labels = labels.reshape(expected.shape)
    bad = np.flatnonzero(~np.isclose(labels, expected).reshape(len(labels), -1).all(1))
    if not len(bad):
        found["right"].append("labels of all rows are right")
        return
    (i, *_), count = bad, f"label: {len(bad):,} of {len(labels):,} differ"
    found["beside"].append(f"{count}: {i} has {labels[i]}, should have {expected[i]}")
    pairs = {*zip(labels.flat, expected.flat, strict=True)}
    if (labels[1:] == expected[:-1]).all():
        found["why"].append("labels are those of the row before")
    elif (labels[:-1] == expected[1:]).all():
        found["why"].append("labels are those of the row after")
    elif len(steps := np.unique(labels - expected)) == 1:
        found["why"].append(f"labels are {steps[0]:+d} off: they begin at another number")
    elif len(pairs) == len({one for one, _ in pairs}) == len({one for _, one in pairs}):
        found["why"].append("classes are numbered in another order")


def of_order(table: Table, stored: Tensor, expected: Tensor, samples: np.ndarray) -> Iterator[str]:
    """Where in the table the rows lie that differ, if they are there; and rows without content."""
    best, where = torch.full((len(expected),), torch.inf), torch.zeros(len(expected)).long()
    empty, step = list[int](), max(1, READ_VALUES // expected.shape[1])
    for start in range(0, len(table), step):
        rows = table.take(np.arange(start, min(start + step, len(table))))
        idle = ~rows.isfinite().all(1) | (rows == 0).all(1)
        empty += (idle.nonzero().flatten() + start).tolist()
        near = torch.cdist(expected, rows).nan_to_num(torch.inf).min(1)
        where = torch.where(near.values < best, near.indices + start, where)
        best = torch.minimum(best, near.values)
    if empty:
        yield f"{len(empty):,} rows are all 0, or not finite, the first {empty[0]}"
    away, own = where.numpy() - (samples + table.first), (stored - expected).norm(dim=1)
    is_there = (best <= TOLERANCE_16 * expected.norm(dim=1)) & ~(best > own / 3)
    moved = np.flatnonzero(is_there.numpy() & (away != 0))
    if len(moved):
        pairs = ", ".join(f"{samples[i]} in row {where[i]}" for i in moved[:3])
        steps = np.unique(away[moved])
        yield (
            f"order: of {len(samples)} samples whose rows differ, {len(moved)} lie elsewhere: "
            f"sample {pairs}" + f"; all {steps[0]:+d} rows off" * (len(steps) == 1)
        )


def of_inputs(
    network: Network,
    source: Source,
    split: str,
    key: Form,
    samples: np.ndarray,
    stored: Tensor,
) -> Iterator[str]:
    """Which other preparation of the samples gives the rows, or comes nearest by far."""
    plain = inputs(network.recipe, source, split, samples)
    apart = distance(stored, network.form(key, plain))
    others = otherwise(network.recipe, source, split, samples, plain)
    far = {name: distance(stored, network.form(key, x)) for name, x in others.items()}
    name = min(far, key=lambda name: far[name])
    if far[name] < apart / 3 and far[name] <= NEAR:
        word = "equal" if far[name] < TOLERANCE_16 else f"within {100 * far[name]:.1f} %"
        yield f"preprocessing: rows are {word} where images are {name}"
    elif apart <= NEAR:
        yield (
            f"rows are near, {100 * apart:.1f} % off: computed in fewer bits, or from images that "
            "were resized or decoded otherwise"
        )


def otherwise(
    recipe: Recipe, source: Source, split: str, samples: np.ndarray, x: Tensor
) -> dict[str, Tensor]:
    """Inputs of layer 1 where samples are prepared in other ways that people do."""
    data, side, shape = recipe.data, recipe.augment.crop, (1, -1, *[1] * (x.ndim - 2))
    mean, std = (torch.tensor(one).view(shape) for one in (data.mean or [0.0], data.std or [1.0]))
    raw = x * std + mean
    found = {"without mean and std": raw}
    if data.shape:
        return found
    found |= {"in 0…255": raw * 255, "in -1…1": raw * 2 - 1}
    found |= {"mirrored": x.flip(-1), "turned on their side": x.transpose(-1, -2)}
    if data.channels == 3:
        usual = [torch.tensor(one).view(shape) for one in IMAGENET]
        found["with the mean and std of ImageNet"] = (raw - usual[0]) / usual[1]
        found["with blue before red"] = (raw.flip(1) - mean) / std
    images, larger = [source.image(split, int(i)) for i in samples], round(side * 8 / 7)
    sizes = {f"resized to {side} and cut, as torchvision does": [side]}
    sizes[f"resized to {larger} and cut to {side}, as torchvision does"] = [larger]
    sizes["resized to a square, whatever their shape"] = [side, side]
    for name, size in sizes.items() if isinstance(images[0], Image.Image) else ():
        mode: Any = "RGB" if data.channels == 3 else "L"
        small = [center_crop(resize(one.convert(mode), size), [side]) for one in images]  # pyright: ignore
        pixels = np.stack([np.asarray(one) for one in small]).reshape(len(x), side, side, -1)
        there = torch.from_numpy(pixels).movedim(-1, 1)
        found[name] = augment.normalise(there, data.mean, data.std)
    return found
