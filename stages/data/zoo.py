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
    Listed,
    channels_last,
    decoded,
    one_line,
    packed,
    picture,
    stamp,
    suggest,
)
from strata.stages.errors import BrokenImage, DataError

_CALLED = {"train": ("train", "trainval"), "test": ("test", "val", "valid")}


class Zoo(Listed):
    """One torchvision data set, both splits.

    `sets` are torchvision's objects by split, `root` the folder they were read from, `release`
    torchvision's version. Content is the image file where a sample has one, else its array.
    Raises DataError when labels are not single class numbers or a split is empty.
    """

    def __init__(self, title: str, sets: Mapping[str, Any], root: Path, release: str) -> None:
        labels = {split: _labels(title, sets[split]) for split in SPLITS}
        super().__init__(title, _classes(sets["train"], labels), labels)
        self._title = title
        self._sets = sets
        self._root = root
        self._release = release

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
            return image.mode.encode() + packed(np.asarray(image))
        try:
            return path.read_bytes()
        except OSError as error:
            raise BrokenImage(self.name(split, i), one_line(error)) from error

    def image(self, split: str, i: int) -> Image.Image:
        return decoded(self.name(split, i), lambda: _as_image(self._sets[split][i][0]))

    def signature(self) -> str:
        paths = {path for part in self._sets.values() for path in _files(part, self._root)}
        return stamp(("torchvision", self._title, self._release), sorted(paths))


def open_torchvision(name: str, root: Path, download: bool) -> Zoo:
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
    given = _parameters(kind)
    root = root.expanduser()
    sets = {
        split: _construct(kind, root, _options(name, given, split), given, download)
        for split in SPLITS
    }
    return Zoo(name, sets, root, torchvision.__version__)


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Parameters of a constructor, and of those it hands its keyword arguments on to."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(vars(base)["__init__"]).parameters
        found = {**own, **found}
        if all(entry.kind is not entry.VAR_KEYWORD for entry in own.values()):
            break
    return {key: entry for key, entry in found.items() if entry.kind is not entry.VAR_KEYWORD}


def _options(name: str, given: Mapping[str, inspect.Parameter], split: str) -> list[dict[str, Any]]:
    """The arguments that may select `split`, to be tried in order."""
    chooser = "train" if "train" in given else "split"
    if chooser not in given:
        raise DataError(f"torchvision's {name} has no train and test split")
    needed = {key for key, entry in given.items() if entry.default is entry.empty}
    if more := sorted(needed - {"self", "root", chooser}):
        raise DataError(f"torchvision's {name} needs more than a split: {', '.join(more)}")
    if chooser == "train":
        return [{"train": split == "train"}]
    return [{"split": word} for word in _CALLED[split]]


def _construct(
    kind: type,
    root: Path,
    options: list[dict[str, Any]],
    given: Mapping[str, inspect.Parameter],
    download: bool,
) -> Any:
    """torchvision's object with the first of `options` that it takes."""
    name = kind.__name__
    extra = {"download": True} if download and "download" in given else {}
    refused = None
    for option in options:
        try:
            return kind(str(root), **option, **extra)
        except ValueError as error:  # how torchvision refuses the name of a split
            refused = error
        except ImportError as error:
            raise DataError(f"torchvision's {name} needs a package: {one_line(error)}") from error
        except (RuntimeError, OSError) as error:
            raise DataError(_absent(name, root, "download" in given, extra, error)) from error
        except Exception as error:  # its readers raise nearly anything on damaged files
            raise DataError(f"{name} under {root} cannot be read: {one_line(error)}") from error
    assert refused is not None
    if "train" in options[0]:
        raise DataError(f"{name} under {root} cannot be read: {one_line(refused)}") from refused
    words = " or ".join(option["split"] for option in options)
    raise DataError(f"torchvision's {name} has no split {words}: {one_line(refused)}") from refused


def _absent(name: str, root: Path, fetchable: bool, extra: object, error: Exception) -> str:
    if extra:
        return f"{name} could not be downloaded to {root}: {one_line(error)}"
    if not fetchable:
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
            f"the labels of {title} are not class numbers: {one_line(error)}"
        ) from error


def _classes(part: Any, labels: Mapping[str, np.ndarray]) -> list[str]:
    names = getattr(part, "classes", None)
    if names:
        # ImageNet has a tuple of synonyms for each class.
        return [entry if isinstance(entry, str) else str(entry[0]) for entry in names]
    most = max((int(values.max()) for values in labels.values() if values.size), default=-1)
    return [str(label) for label in range(most + 1)]


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
    """The files behind a data set; all under `root` where it does not tell."""
    if _path(part, 0) is not None:
        return [path for i in range(len(part)) if (path := _path(part, i)) is not None]
    told = (getattr(part, key, None) for key in ("raw_folder", "_base_folder", "base_folder"))
    places = [root / str(place) for place in (*told, getattr(part, "filename", None)) if place]
    place = next((place for place in places if place.exists()), root)
    return [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]


def _as_image(item: Any) -> Image.Image:
    """A sample of torchvision's, an image or an array, as an image."""
    if isinstance(item, Image.Image):
        return item
    array = np.asarray(item)
    if array.dtype != np.uint8:
        raise ValueError(f"its pixels are {array.dtype}, not uint8")
    return picture(channels_last(array[None], "the image")[0])
