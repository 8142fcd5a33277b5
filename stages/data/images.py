"""Labelled images: their pixels, and one checking pass over a data set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from strata.stages.data.arrays import fitted
from strata.stages.data.sources import SPLITS, Source, broken
from strata.stages.data.values import CLEARED, plain, plain_array, told, undecided
from strata.stages.errors import BrokenImage, DataError

_MODES = {1: "L", 3: "RGB"}
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
# Samples handed to a thread at a time: enough that handing over costs next to nothing.
_CHUNK = 32
_NAMED = 3


def square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """uint8 (channels, size, size) of a plain image, 1 channel being grey and 3 RGB.

    The shorter side is resized to `size`, then the centre is cut out. An image of that size already
    keeps its pixels bit for bit. Raises DataError for another number of channels.
    """
    if channels not in _MODES:
        raise DataError(f"{channels} channels asked for, must be 1 or 3")
    array = np.asarray(_resized(image.convert(_MODES[channels]), size))
    return np.ascontiguousarray(array.reshape(size, size, channels).transpose(2, 0, 1))


def _resized(image: Image.Image, size: int) -> Image.Image:
    """size x size: the shorter side resized to `size` and the centre of the longer one."""
    if image.size == (size, size):
        return image
    short = min(image.size)
    sides = [max(size, round(side * size / short)) for side in image.size]
    # Only what is kept is computed, so that a long thin image takes no more memory than it has.
    starts = [(side - size) // 2 for side in sides]
    scales = [side / new for side, new in zip(image.size, sides, strict=True)]
    left, top = (start * scale for start, scale in zip(starts, scales, strict=True))
    right, bottom = (
        min((start + size) * scale, side)
        for start, scale, side in zip(starts, scales, image.size, strict=True)
    )
    box = (left, top, right, bottom)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def check_labels(source: Source, classes: int) -> None:
    """Hold a source to the recipe's number of classes.

    Raises DataError, naming the sample, for a label outside 0..classes-1, and naming both numbers
    when the source has more or fewer classes, or numbers in a label.
    """
    noun = "numbers in a label" if source.of_numbers else "classes"
    counts = f"the data set has {len(source.classes)} {noun}, the recipe says {classes}"
    for split in () if source.of_numbers else SPLITS:
        labels = source.labels(split)
        if (bad := np.argwhere((labels < 0) | (labels >= classes))).size:
            first = labels[tuple(bad[0])]
            raise DataError(
                f"{split} sample {source.name(split, int(bad[0][0]))} has label {first}, "
                f"outside 0..{classes - 1}; {counts}"
            )
    if len(source.classes) != classes:
        raise DataError(counts)


def check_probed(source: Source, channels: int) -> None:
    """Refuse images on which a trained network of `channels` channels could not be probed.

    Grey images are repeated for a network of RGB ones, as ever; but colour is not thrown away for
    a network of grey ones. Raises DataError for that, and for a single class.
    """
    if source.of_numbers:
        raise DataError("labels are numbers, and a probe tells classes apart")
    if len(source.classes) < 2:
        raise DataError(
            f"the data set has one class, {''.join(source.classes)}: there is nothing to tell apart"
        )
    with suppress(BrokenImage):  # named later, with all others
        mode = source.image("train", 0).mode
        if channels == 1 and mode not in _GREY:
            raise DataError(
                f"{source.name('train', 0)} has colour ({mode}), and the network was trained on 1 "
                "channel. Convert the images to grey first, or probe a network of RGB images"
            )


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be decoded: its split, its name and a few words on why."""

    split: str
    name: str
    reason: str


class Sound(NamedTuple):
    """A sample that can be used: the sha256 hex digest of its content, and what `plain` tells."""

    digest: str
    changes: tuple[str, ...]
    kind: str
    scale: int


Examined = list[Sound | Broken]
"""Findings on some samples."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a source found.

    `digest` is the sha256 hex digest of the good samples' splits, labels, names and contents, and
    of how their values are scaled; `kept` holds their indices by split, int64 and rising, and
    `sums` the first 4 bytes of the digests of their contents, uint32; `broken` the others. `scales`
    are the full scales of values that have not 8 bits, by kind, and `converted` counts the good
    samples by what is done to make them 8-bit grey or RGB.
    """

    digest: str
    kept: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    broken: tuple[Broken, ...]
    scales: dict[str, int]
    converted: dict[str, int]


def survey(
    source: Source,
    *,
    skip_broken: bool,
    tick: Callable[[int], None] = lambda samples: None,
    examined: Iterable[Examined] | None = None,
) -> Survey:
    """Hash and decode every sample once.

    `examined` is that work, done by others: the findings on all `spans`, in their order. `tick` is
    called with the number of samples done since its last call. Memory is bounded by a line for each
    sample and what `examined` holds. Raises DataError for broken images, all of them counted first,
    unless `skip_broken`, and when leaving them out empties a split or a class of train.
    """
    lines: list[bytes] = []
    # An index and a sum in one number: a list for each would take twice the memory.
    kept: dict[str, list[int]] = {split: [] for split in SPLITS}
    bad: list[Broken] = []
    scales: dict[str, int] = {}
    converted: Counter[str] = Counter()
    for split, i, found in _decided(source, examined, tick):
        if isinstance(found, Broken):
            bad.append(found)
            continue
        kept[split].append(i << 32 | int(found.digest[:8], 16))
        # No name holds a NUL, so no two lists of samples give the same lines.
        label = source.labels(split)[i]
        own = hashlib.sha256(label).hexdigest() if label.ndim else label
        line = f"{split}\0{own}\0{source.name(split, i)}\0{found.digest}"
        converted.update(found.changes)
        if found.kind:
            scales[found.kind] = found.scale
            converted[told(found.kind, found.scale)] += 1
            # Other images are read as they were before scales were chosen, and keep their digest.
            if found.scale < 65535 or (found.kind == "integer" and CLEARED in found.changes):
                line += f" {found.kind} {found.scale}"
        lines.append(f"{line}\n".encode("utf-8", "surrogateescape"))
    if bad and not skip_broken:
        noun = "image" if len(bad) == 1 else "images"
        named = ", ".join(f"{one.name} ({one.reason})" for one in bad[:_NAMED])
        total = len(lines) + len(bad)
        raise DataError(f"{len(bad)} broken {noun} of {total}, the first: {named}")
    both = {split: np.sort(np.array(kept[split], np.int64)) for split in SPLITS}
    indices = {split: each >> 32 for split, each in both.items()}
    _check_left(source, indices)
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line)
    sums = {split: each.astype(np.uint32) for split, each in both.items()}
    return Survey(digest.hexdigest(), indices, sums, tuple(bad), scales, dict(converted))


def _decided(
    source: Source, examined: Iterable[Examined] | None, tick: Callable[[int], None]
) -> Iterator[tuple[str, int, Sound | Broken]]:
    """Findings on all samples, by split and index: those on values of more than 8 bits come last,
    at the full scale of the whole data set, which is known only then."""
    samples = ((split, i) for split, span in spans(source) for i in span)
    deep: list[tuple[str, int, Sound]] = []
    scales: dict[str, int] = {}
    for findings in examined or (examine(source, *span) for span in spans(source)):
        for found, (split, i) in zip(findings, samples, strict=False):
            if isinstance(found, Broken) or not found.kind:
                yield split, i, found
                continue
            deep.append((split, i, found))
            scales[found.kind] = max(found.scale, scales.get(found.kind, 1))
        tick(len(findings))
    for split, i, found in deep:
        if reason := undecided(found.kind, found.scale, scales[found.kind]):
            yield split, i, Broken(split, source.name(split, i), reason)
        else:
            yield split, i, found._replace(scale=scales[found.kind])


def spans(source: Source, length: int = _CHUNK) -> Iterator[tuple[str, range]]:
    """All samples in their order, `length` at a time: split and indices."""
    for split in SPLITS:
        for start in range(0, source.count(split), length):
            yield split, range(start, min(start + length, source.count(split)))


def examine(source: Source, split: str, span: range) -> Examined:
    """Hash some samples, and read them as they will be read to be used."""
    found: Examined = []
    for i in span:
        try:
            found.append(read(source, split, i)[1])
        except BrokenImage as error:
            found.append(Broken(split, source.name(split, i), error.reason))
    return found


def read(
    source: Source, split: str, i: int, scales: Mapping[str, int] | None = None
) -> tuple[Image.Image | np.ndarray, Sound]:
    """One sample as it is used, an image of 8 bits a channel, or what is no image, read once; and
    what was found.

    `scales` are those that a survey found; None, for the survey. Raises BrokenImage, for whatever
    is wrong.
    """
    try:
        content, image = source.decoded(split, i)
        digest = hashlib.sha256(content).hexdigest()
        if source.form:
            array, changes = fitted(np.asarray(image), source.form)
            return array, Sound(digest, changes, "", 0)
        made = (plain_array if isinstance(image, np.ndarray) else plain)(image, scales)  # pyright: ignore
        flat, changes, kind, scale = made
        return flat, Sound(digest, changes, kind, scale)
    except Exception as error:  # decoders and converters do
        raise broken(source.name(split, i), error) from error


def _check_left(source: Source, kept: dict[str, np.ndarray]) -> None:
    """Raise DataError where leaving the broken images out empties a split or a class of train."""
    for split in SPLITS:
        if not kept[split].size:
            raise DataError(f"all {source.count(split)} images of the {split} split are broken")
    labels = source.labels("train")
    if source.of_numbers:
        return
    if (lost := np.setdiff1d(labels, labels[kept["train"]])).size:
        name = source.classes[lost[0]] if lost[0] < len(source.classes) else lost[0]
        raise DataError(f"all images of class {name} in the train split are broken")
