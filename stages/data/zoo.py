"""The classification data sets of torchvision.datasets as sources."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from strata.stages.data.sources import (
    SPLITS,
    Source,
    array_bytes,
    channels_last,
    decoded,
    image_from,
    short_reason,
    stamp,
    suggest,
)
from strata.stages.errors import BrokenImage, DataError

_SPLIT_NAMES = {"train": ("train", "trainval"), "test": ("test", "val", "valid")}


class TorchvisionSource(Source):
    """One torchvision data set, both splits.

    `sets` are torchvision's objects by split, `root` the folder they were read from, `release`
    torchvision's version. Content is the image file where a sample has one, else its array.
    Raises DataError when labels are not single class numbers or a split is empty.
    """

    def __init__(self, title: str, sets: Mapping[str, Any], root: Path, release: str) -> None:
        labels = {split: _labels(title, sets[split]) for split in SPLITS}
        classes = getattr(sets["train"], "classes", None) or None
        if classes:  # ImageNet has a tuple of synonyms for each class
            classes = [each if isinstance(each, str) else str(each[0]) for each in classes]
        super().__init__(title, labels, classes)
        self._sets, self._root = sets, root
        self._marks = ("torchvision", title, release)

    def name(self, split: str, i: int) -> str:
        path = _path(self._sets[split], i)
        if path is None:
            return f"{split}/{i}"
        inside = path.is_relative_to(self._root)
        return path.relative_to(self._root).as_posix() if inside else path.name

    def content(self, split: str, i: int) -> bytes:
        path = _path(self._sets[split], i)
        if path is None:
            image = self.image(split, i)
            return image.mode.encode() + array_bytes(np.asarray(image))
        try:
            return path.read_bytes()
        except OSError as error:
            raise BrokenImage(self.name(split, i), short_reason(error)) from error

    def image(self, split: str, i: int) -> Image.Image:
        return decoded(self.name(split, i), lambda: _as_image(self._sets[split][i][0]))

    def signature(self) -> str:
        paths = {path for part in self._sets.values() for path in _files(part, self._root)}
        return stamp(self._marks, sorted(paths))


def open_torchvision(name: str, root: Path, download: bool) -> TorchvisionSource:
    """The data set `name` of torchvision.datasets, its files under `root`.

    Fetches them only where `download` is True. Raises DataError for an unknown name, a data set
    that has no train and test split or needs further arguments, and missing files.
    """
    try:
        import torchvision
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{name} needs the package torchvision, which is missing") from error
    kinds = {key: getattr(datasets, key) for key in datasets.__all__}
    kind = kinds.get(name)
    if not (isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)):
        raise DataError(f"torchvision has no data set {name!r}.{suggest(name, kinds)}")
    given = dict(inspect.signature(kind).parameters)
    if issubclass(kind, datasets.MNIST):  # some hand their keyword arguments on to it
        given = dict(inspect.signature(datasets.MNIST).parameters) | given
    chooser = "train" if "train" in given else "split"
    if chooser not in given:
        raise DataError(f"torchvision's {name} has no train and test split")
    needed = {key for key, entry in given.items() if entry.default is entry.empty}
    if more := sorted(needed - {"root", "kwargs", chooser}):
        raise DataError(f"torchvision's {name} needs more than a split: {', '.join(more)}")
    root = root.expanduser()
    fetch = download if "download" in given else None
    sets = {split: _open_split(kind, root, chooser, split, fetch) for split in SPLITS}
    return TorchvisionSource(name, sets, root, torchvision.__version__)


def _open_split(kind: type, root: Path, chooser: str, split: str, fetch: bool | None) -> Any:
    """torchvision's object for one split.

    `chooser` is the argument that selects it, a flag called train or a name called split; `fetch`
    is None where torchvision cannot download.
    """
    options = (split == "train",) if chooser == "train" else _SPLIT_NAMES[split]
    extra = {"download": True} if fetch else {}
    for option in options:
        try:
            return kind(str(root), **{chooser: option}, **extra)
        except Exception as error:  # its readers raise nearly anything on damaged files
            if not isinstance(error, ValueError) or option == options[-1]:
                raise DataError(_refusal(kind.__name__, root, options, fetch, error)) from error
    return None


def _refusal(
    name: str, root: Path, options: tuple[Any, ...], fetch: bool | None, error: Exception
) -> str:
    """What is wrong, where torchvision could not open a data set."""
    reason = short_reason(error)
    if isinstance(error, ValueError) and len(options) > 1:  # how it refuses the name of a split
        return f"torchvision's {name} has no split {' or '.join(options)}: {reason}"
    if isinstance(error, ImportError):
        return f"torchvision's {name} needs a package: {reason}"
    if not isinstance(error, RuntimeError | OSError):
        return f"{name} under {root} cannot be read: {reason}"
    if fetch:
        return f"{name} could not be downloaded to {root}: {reason}"
    if fetch is None:
        return f"the data set {name} is not under {root}, and torchvision cannot download it"
    return f"the data set {name} is not under {root}, or damaged there: --download fetches it"


def _labels(title: str, part: Any) -> np.ndarray:
    """int64 (n,), from the data set's own list where it has one, else by reading every sample."""
    try:
        kept = [getattr(part, key, ()) for key in ("targets", "labels", "_labels")]
        kept.append([row[1] for row in getattr(part, "_samples", ())])
        for values in map(np.asarray, kept):
            if values.dtype.kind in "iu" and values.shape == (len(part),):
                return values.astype(np.int64)
        return np.array([operator.index(part[i][1]) for i in range(len(part))], np.int64)
    except Exception as error:  # from here or from any reader of torchvision's
        raise DataError(
            f"the labels of {title} are not class numbers: {short_reason(error)}"
        ) from error


def _path(part: Any, i: int) -> Path | None:
    """The image file of sample `i` where the data set keeps a list of them."""
    for key in ("samples", "_samples", "_image_files", "_images"):
        rows = getattr(part, key, None)
        if isinstance(rows, list) and len(rows) == len(part):
            entry = rows[i][0] if isinstance(rows[i], tuple) else rows[i]
            if isinstance(entry, str | Path):
                return Path(entry)
    return None


def _files(part: Any, root: Path) -> list[Path]:
    """The files behind a data set; all under `root` where it names none."""
    if _path(part, 0) is not None:
        return [path for i in range(len(part)) if (path := _path(part, i)) is not None]
    named = (getattr(part, key, None) for key in ("raw_folder", "_base_folder", "base_folder"))
    places = [root / str(place) for place in (*named, getattr(part, "filename", None)) if place]
    place = next((place for place in places if place.exists()), root)
    return [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]


def _as_image(item: Any) -> Image.Image:
    """A sample of torchvision's, an image or an array, as an image."""
    if isinstance(item, Image.Image):
        return item
    array = np.asarray(item)
    if array.dtype != np.uint8:
        raise ValueError(f"its pixels are {array.dtype}, not uint8")
    return image_from(channels_last(array[None], "the image")[0])
