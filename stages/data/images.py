"""Labelled images: opening a data set, its pixels, and one checking pass over it.

A data source is named by a word: digits, torchvision:NAME, imagefolder:PATH or npz:PATH.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from strata.stages.data.archives import open_imagefolder
from strata.stages.data.sources import SPLITS, Source, open_digits, open_npz, suggest
from strata.stages.data.zoo import open_torchvision
from strata.stages.errors import BrokenImage, DataError

_FORMS = ("digits", "torchvision:NAME", "imagefolder:PATH", "npz:PATH")
_MODES = {1: "L", 3: "RGB"}
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
# Samples handed to a thread at a time: enough that handing over costs next to nothing.
_CHUNK = 32
_NAMED = 3


def open_source(spec: str, *, root: Path, download: bool = False) -> Source:
    """The data source that `spec` names; close it, or use it in a with statement.

    digits is scikit-learn's, its last 360 samples the test split; torchvision:NAME reads files
    under `root` and fetches them only where `download` is True; imagefolder:PATH is a directory
    or tar of class folders under train/ and test/ (or val/); npz:PATH holds x_train, y_train,
    x_test and y_test. Raises DataError when `spec` is none of these or the data is unfit.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return open_digits()
    if kind == "torchvision" and rest:
        return open_torchvision(rest, root, download)
    if kind == "imagefolder" and rest:
        return open_imagefolder(Path(rest).expanduser())
    if kind == "npz" and rest:
        return open_npz(Path(rest).expanduser())
    kinds = [form.partition(":")[0] for form in _FORMS]
    near = "" if kind in kinds else suggest(kind, kinds)
    raise DataError(f"unknown data source {spec!r}, must be {', '.join(_FORMS)}.{near}")


def pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """uint8 (channels, size, size) of an image of any mode, 1 channel being grey and 3 RGB.

    Upright as its EXIF says; transparency over white; 16-bit grey by its high byte, rounded. The
    shorter side is resized to `size`, then the centre is cut out. An image of that size already
    keeps its pixels bit for bit. Raises DataError for another number of channels.
    """
    if channels not in _MODES:
        raise DataError(f"{channels} channels asked for, must be 1 or 3")
    plain = _flat(_upright(image)).convert(_MODES[channels])
    array = np.asarray(_square(plain, size))
    return np.ascontiguousarray(array.reshape(size, size, channels).transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is where the EXIF cannot be read."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # the EXIF reader raises nearly anything on a damaged block
        return image


def _flat(image: Image.Image) -> Image.Image:
    """8 bits a channel and opaque: in mode 1, L or RGB."""
    if image.mode.startswith("I"):
        # The 32-bit mode is how some 16-bit files are read, so its range is theirs too.
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
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
    when the source has more or fewer classes.
    """
    counts = f"the data set has {len(source.classes)} classes, the recipe says {classes}"
    for split in SPLITS:
        labels = source.labels(split)
        if (bad := np.flatnonzero((labels < 0) | (labels >= classes))).size:
            raise DataError(
                f"{split} sample {source.name(split, int(bad[0]))} has label {labels[bad[0]]}, "
                f"outside 0..{classes - 1}; {counts}"
            )
    if len(source.classes) != classes:
        raise DataError(counts)


def check_probed(source: Source, channels: int) -> None:
    """Refuse images on which a trained network of `channels` channels could not be probed.

    Grey images are repeated for a network of RGB ones, as ever; but colour is not thrown away for
    a network of grey ones. Raises DataError for that, and for a single class.
    """
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


Examined = list[str | Broken]
"""Findings on some samples: each one's sha256 hex digest of its content, or what is wrong."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a source found.

    `digest` is the sha256 hex digest of the good samples' splits, labels, names and contents;
    `kept` holds their indices by split, int64 and rising; `broken` the others.
    """

    digest: str
    kept: dict[str, np.ndarray]
    broken: tuple[Broken, ...]


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
    samples = ((split, i) for split, span in spans(source) for i in span)
    lines: list[bytes] = []
    kept: dict[str, list[int]] = {split: [] for split in SPLITS}
    broken: list[Broken] = []
    for findings in examined or (examine(source, *span) for span in spans(source)):
        for finding, (split, i) in zip(findings, samples, strict=False):
            if isinstance(finding, Broken):
                broken.append(finding)
                continue
            kept[split].append(i)
            # No name holds a NUL, so no two lists of samples give the same lines.
            line = f"{split}\0{source.labels(split)[i]}\0{source.name(split, i)}\0{finding}\n"
            lines.append(line.encode("utf-8", "surrogateescape"))
        tick(len(findings))
    if broken and not skip_broken:
        noun = "image" if len(broken) == 1 else "images"
        named = ", ".join(f"{one.name} ({one.reason})" for one in broken[:_NAMED])
        total = len(lines) + len(broken)
        raise DataError(f"{len(broken)} broken {noun} of {total}, the first: {named}")
    indices = {split: np.array(kept[split], np.int64) for split in SPLITS}
    _check_left(source, indices)
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line)
    return Survey(digest.hexdigest(), indices, tuple(broken))


def spans(source: Source, length: int = _CHUNK) -> Iterator[tuple[str, range]]:
    """All samples in their order, `length` at a time: split and indices."""
    for split in SPLITS:
        for start in range(0, source.count(split), length):
            yield split, range(start, min(start + length, source.count(split)))


def examine(source: Source, split: str, span: range) -> Examined:
    """Hash and decode some samples."""
    found: Examined = []
    for i in span:
        try:
            digest = hashlib.sha256(source.content(split, i)).hexdigest()
            source.image(split, i)
            found.append(digest)
        except BrokenImage as error:
            found.append(Broken(split, source.name(split, i), error.reason))
    return found


def _check_left(source: Source, kept: dict[str, np.ndarray]) -> None:
    """Raise DataError where leaving the broken images out empties a split or a class of train."""
    for split in SPLITS:
        if not kept[split].size:
            raise DataError(f"all {source.count(split)} images of the {split} split are broken")
    labels = source.labels("train")
    if (lost := np.setdiff1d(labels, labels[kept["train"]])).size:
        name = source.classes[lost[0]] if lost[0] < len(source.classes) else lost[0]
        raise DataError(f"all images of class {name} in the train split are broken")
