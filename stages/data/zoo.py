"""The classification data sets of torchvision.datasets as sources."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from strata.stages.data.sources import (
    SPLITS,
    Source,
    sample_of,
    short_reason,
    stamp,
    suggest,
)
from strata.stages.errors import DataError
from strata.stages.home import home

_FLAGS, _NAMES = (True, False), ("train", "test")
_SETS: dict[str, tuple[tuple[Any, Any], str | None, str | None]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "USPS"), (_FLAGS, "targets", None)),
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST"), (_FLAGS, "targets", None)),
    "QMNIST": (_FLAGS, None, None),
    **dict.fromkeys(("STL10", "SVHN"), (_NAMES, "labels", None)),
    "LFWPeople": (_NAMES, "targets", None),
    "FER2013": (_NAMES, "_samples", None),
    "PCAM": (_NAMES, None, None),
    "Country211": (_NAMES, "targets", "samples"),
    "ImageNet": (("train", "val"), "targets", "samples"),
    **dict.fromkeys(("GTSRB", "RenderedSST2", "StanfordCars"), (_NAMES, "_samples", "_samples")),
    "Imagenette": (("train", "val"), "_samples", "_samples"),
    **dict.fromkeys(("DTD", "FGVCAircraft"), (_NAMES, "_labels", "_image_files")),
    **dict.fromkeys(("Flowers102", "Food101"), (_NAMES, "_labels", "_image_files")),
    "CLEVRClassification": (("train", "val"), "_labels", "_image_files"),
    "OxfordIIITPet": (("trainval", "test"), "_labels", "_images"),
}
"""torchvision's classes that are labelled images with a train and a test split. For each: how the
two are asked for, by a flag `train` or a name `split`; its attribute with labels, or (image, label)
pairs (None: samples are read); and its attribute with paths of image files, if it has any."""
_NOT_FETCHED = ("FER2013", "ImageNet")
_NEEDS = {"EMNIST": "split", "PhotoTour": "name"}


class TorchvisionSource(Source):
    """One torchvision data set, both splits.

    `title` is its name, `sets` are torchvision's objects by split, `root` the folder they were read
    from, `release` torchvision's version. Content is the image file where a sample has one, else
    its array. Raises DataError when labels are not single class numbers or a split is empty.
    """

    def __init__(self, title: str, sets: Mapping[str, Any], root: Path, release: str) -> None:
        _, kept, self._paths = _SETS[title]
        labels = {split: _labels(title, sets[split], kept) for split in SPLITS}
        classes = getattr(sets["train"], "classes", None) or None
        if classes:  # ImageNet has a tuple of synonyms for each class
            classes = [each if isinstance(each, str) else str(each[0]) for each in classes]
        super().__init__(title, labels, classes)
        self._sets, self._root = sets, root
        self._marks = ("torchvision", title, release)

    def name(self, split: str, i: int) -> str:
        path = self._path(self._sets[split], i)
        if path is None:
            return f"{split}/{i}"
        inside = path.is_relative_to(self._root)
        return path.relative_to(self._root).as_posix() if inside else path.name

    def open_sample(self, split: str, i: int) -> tuple[bytes, Image.Image | np.ndarray]:
        path, found = self._path(self._sets[split], i), sample_of(self._sets[split][i][0])
        return found if path is None else (path.read_bytes(), found[1])

    def signature(self) -> str:
        paths = {path for part in self._sets.values() for path in self._files(part)}
        return stamp(self._marks, sorted(paths))

    def _path(self, part: Any, i: int) -> Path | None:
        """The image file of sample `i`, where the data set keeps a list of them."""
        if self._paths is None:
            return None
        entry = getattr(part, self._paths)[i]
        return Path(entry[0] if isinstance(entry, tuple) else entry)

    def _files(self, part: Any) -> list[Path]:
        """The files behind a data set; all under the root where it names none."""
        paths = [path for i in range(len(part)) if self._paths and (path := self._path(part, i))]
        kept = ("raw_folder", "_base_folder", "base_folder", "filename")
        named = (getattr(part, key, None) for key in kept)
        places = (self._root / str(place) for place in named if place)
        place = next((place for place in places if place.exists()), self._root)
        return paths or [path for path in (place, *place.rglob("*")) if path.is_file()]


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
    if name in _NEEDS:
        raise DataError(f"torchvision's {name} needs more than a split: {_NEEDS[name]}")
    if name not in _SETS:
        if name in datasets.__all__:
            raise DataError(f"torchvision's {name} has no train and test split of labelled images")
        raise DataError(f"torchvision has no data set {name!r}.{suggest(name, _SETS)}")
    root = home(str(root))
    sets, extra = {}, {"download": True} if download and name not in _NOT_FETCHED else {}
    for split, option in zip(SPLITS, _SETS[name][0], strict=True):
        chosen = {"train" if isinstance(option, bool) else "split": option}
        try:
            sets[split] = getattr(datasets, name)(str(root), **chosen, **extra)
        except Exception as error:  # its readers raise nearly anything on damaged files
            raise DataError(_refusal(name, root, bool(extra), error)) from error
    return TorchvisionSource(name, sets, root, torchvision.__version__)


def _refusal(name: str, root: Path, fetch: bool, error: Exception) -> str:
    """What is wrong, where torchvision could not open a data set."""
    reason = short_reason(error)
    if isinstance(error, ImportError):
        return f"torchvision's {name} needs a package: {reason}"
    if not isinstance(error, RuntimeError | OSError):
        return f"{name} under {root} cannot be read: {reason}"
    if fetch:
        return f"{name} could not be downloaded to {root}: {reason}"
    if name in _NOT_FETCHED:
        return f"the data set {name} is not under {root}, and torchvision cannot download it"
    return f"the data set {name} is not under {root}, or damaged there: --download fetches it"


def _labels(title: str, part: Any, kept: str | None) -> np.ndarray:
    """int64 (n,), from the attribute `kept`, or without one by reading every sample."""
    try:
        rows = getattr(part, kept) if kept else (part[i] for i in range(len(part)))
        if kept in (None, "_samples"):
            rows = [row[1] for row in rows]
        return np.array([operator.index(label) for label in np.asarray(rows).tolist()], np.int64)
    except Exception as error:  # from here or from any reader of torchvision's
        raise DataError(
            f"the labels of {title} are not class numbers: {short_reason(error)}"
        ) from error
