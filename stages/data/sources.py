"""Labelled images and other arrays: the contract of a source, what sources share, and those held in
memory."""

from __future__ import annotations

import difflib
import hashlib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Self, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from strata.stages.data.values import HIGH_BYTE
from strata.stages.errors import BrokenImage, DataError

SPLITS = ("train", "test")
_DEPTHS = (1, 3, 4)


class Form(Protocol):
    """What a recipe says of samples and labels; of images ``shape`` is empty."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample that is no image."""
        ...

    @property
    def dtype(self) -> str: ...

    @property
    def targets(self) -> str:
        """``token``: a label for every one; ``sample``."""
        ...

    @property
    def classes(self) -> int: ...


class Source(ABC):
    """A labelled data set, of images if nothing else is said, with a train and a test split.

    A context manager. Without `classes` there is one for each label up to the largest, named by its
    number. All but `close` may be called from several threads at once. Raises DataError, naming
    `title`, when a split has no samples.
    """

    classes: tuple[str, ...]
    """Class names in label order; the label itself where there are no names."""
    left_out: Mapping[str, tuple[int, str]] = MappingProxyType({})
    """Files that lie among the images and are not listed: reason → how many, and the first's name,
    or that of the folder they lie in."""

    def __init__(
        self, title: str, labels: Mapping[str, np.ndarray], classes: Iterable[str] | None = None
    ) -> None:
        self._labels = {split: np.array(labels[split], np.int64) for split in SPLITS}
        for split, values in self._labels.items():
            values.setflags(write=False)
            if not values.size:
                raise DataError(f"the {split} split of {title} has no images")
        if classes is None:
            largest = max(values.max() for values in self._labels.values())
            classes = map(str, range(largest + 1))
        self.classes = tuple(classes)

    def count(self, split: str) -> int:
        """Number of samples in `split`."""
        return len(self._labels[split])

    def labels(self, split: str) -> np.ndarray:
        """Labels in sample order: int64 (n,), or of every token (n, token), read-only."""
        return self._labels[split]

    @abstractmethod
    def name(self, split: str, i: int) -> str:
        """Name of sample `i`, the same wherever the data set lies, such as train/cat/0001.jpg."""

    @abstractmethod
    def _open(self, split: str, i: int) -> tuple[bytes, Image.Image]:
        """Content and image of sample `i`, which need not be decoded yet, by one reading.

        Content is what is hashed: the file's bytes, or an array's after a line of its dtype and
        shape. Raises nearly anything on damaged data.
        """

    def decoded(self, split: str, i: int) -> tuple[bytes, Image.Image]:
        """Content of sample `i`, and the image, fully decoded, in its own mode and size.

        Raises nearly anything on damaged data; see `broken`.
        """
        # Each of Pillow's own warnings is either followed by an error here or harmless. Not in
        # warnings.catch_warnings, which swaps what is the process's under other threads' feet.
        if ("ignore", None, Warning, re.compile(r"PIL\."), 0) not in warnings.filters:
            warnings.filterwarnings("ignore", module=r"PIL\.")
        content, image = self._open(split, i)
        if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or np.inf):
            raise ValueError(f"{image.width} x {image.height} pixels, the bound is {limit} in all")
        if (tiles := getattr(image, "tile", ())) and image.mode[0] not in "IF":
            image.info[HIGH_BYTE] = ";16" in str(tiles[0][3])  # of a file, until it is decoded
        image.load()
        return content, image

    def image(self, split: str, i: int) -> Image.Image:
        """Sample `i`, fully decoded, in its own mode and size.

        Raises BrokenImage, with its name and a short reason, for whatever is wrong with it.
        """
        try:
            return self.decoded(split, i)[1]
        except Exception as error:  # decoders do
            raise broken(self.name(split, i), error) from error

    @abstractmethod
    def signature(self) -> str:
        """Hex digest that changes when files do; looks at sizes and times, reads no image."""

    def close(self) -> None:  # noqa: B027 - most hold nothing open
        """Release files. The source is of no use afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def broken(sample: str, error: Exception) -> BrokenImage:
    """What decoders and converters have raised on damaged data, with the sample's name."""
    if isinstance(error, BrokenImage):
        return error
    if isinstance(error, UnidentifiedImageError):
        return BrokenImage(sample, "not an image in a known format")
    if isinstance(error, MemoryError):
        return BrokenImage(sample, "more memory is needed than there is")
    return BrokenImage(sample, getattr(error, "strerror", None) or short_reason(error))


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' with the nearest of `known`, whatever the case; '' if none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {names[near[0]]}?" if near else ""


def stamp(words: Iterable[str], paths: Iterable[Path]) -> str:
    """sha256 hex digest of `words` and of the path, size and mtime of every one of `paths`."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in paths:
        try:
            info = path.stat()
            state = f"{info.st_size} {info.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"\0{path}\0{state}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def short_reason(error: BaseException) -> str:
    """The first line of an error's text, at most 120 characters; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def printable(name: str) -> str:
    """A name with each byte that is not UTF-8 as \\xe9, so that it can be shown and stored."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def summary(left_out: Mapping[str, tuple[int, str]]) -> str:
    """``"48 thumbnail or system file, such as train/cat/@eaDir; …"``: what a source left out."""
    each = (f"{count:,} {reason}, such as {name}" for reason, (count, name) in left_out.items())
    return "; ".join(each)


def channels_last(images: np.ndarray, what: str) -> np.ndarray:
    """(N,H,W) as it is, (N,H,W,C) or (N,C,H,W) as (N,H,W,C), with C of 1, 3 or 4.

    Raises DataError, naming `what`, for another shape or where both readings fit.
    """
    if images.ndim == 3:
        return images
    first, last = (images.ndim == 4 and images.shape[axis] in _DEPTHS for axis in (1, -1))
    if first and last:
        raise DataError(f"{what} has shape {images.shape}: channels may be first or last")
    if not first and not last:
        raise DataError(
            f"{what} has shape {images.shape}, must be (N,H,W), (N,H,W,C) or (N,C,H,W), C 1, 3 or 4"
        )
    return images if last else images.transpose(0, 2, 3, 1)


def image_from(array: np.ndarray) -> Image.Image:
    """An image of uint8 (H,W) or (H,W,C)."""
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def array_bytes(array: np.ndarray) -> bytes:
    """An array's bytes after a line of its dtype and shape, which the bytes alone do not tell."""
    return f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes()


class Arrays(Source):
    """Images held in memory: uint8 (n,H,W) or (n,H,W,C) per split; classes are numbers.

    `marks` and `files` are what the signature is made of. Raises DataError when a split is empty.
    """

    def __init__(
        self,
        title: str,
        images: Mapping[str, np.ndarray],
        labels: Mapping[str, np.ndarray],
        marks: Sequence[str],
        files: Sequence[Path] = (),
    ) -> None:
        super().__init__(title, labels)
        self._images, self._marks, self._files = images, marks, files

    def name(self, split: str, i: int) -> str:
        return f"{split}/{i}"

    def _open(self, split: str, i: int) -> tuple[bytes, Image.Image]:
        array = self._images[split][i]
        return array_bytes(array), image_from(array)

    def signature(self) -> str:
        return stamp(self._marks, self._files)


def open_digits() -> Arrays:
    """scikit-learn's bundled 8 x 8 digits, grey, 0..16 scaled to 0..255.

    1437 to train on; the last 360, written by other people, are the test split. Raises DataError
    without scikit-learn.
    """
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits needs the package scikit-learn, which is missing") from error
    bunch = cast(Any, load_digits())
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    by_split = [{"train": every[:-360], "test": every[-360:]} for every in (images, bunch.target)]
    return Arrays("digits", *by_split, marks=("digits", sklearn.__version__))
