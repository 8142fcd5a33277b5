"""Labelled images and other arrays: the contract of a source, what sources share, and those held in
memory."""

from __future__ import annotations

import difflib
import hashlib
import io
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
IMAGE_NAMES = ("image", "img", "x", "pixel_values", "picture", "jpg", "png")
LABEL_NAMES = ("label", "labels", "cls", "class", "target", "targets", "y", "fine_label")
"""Usual names of the image and of the label in a sample that has several parts."""
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

    @property
    def split(self) -> float:
        """The share of a data set without a test split that is drawn for one; 0: none is."""
        ...

    @property
    def split_seed(self) -> int: ...


class Source(ABC):
    """A labelled data set, of images if nothing else is said, with a train and a test split; or, as
    it lies on disk, with the split train alone.

    A context manager. Without `classes` there is one for each label up to the largest, named by its
    number, and of labels that are numbers one for each. All but `close` may be called from several
    threads at once. Raises DataError, naming `title`, when a split has no samples.
    """

    classes: tuple[str, ...]
    """Class names in label order; the label itself where there are no names."""
    left_out: Mapping[str, tuple[int, str]] = MappingProxyType({})
    """Files that lie among the images and are not listed: reason → how many, and the first's name,
    or that of the folder they lie in."""
    without_test = "no test split"
    """What a source lacks that has the split train alone."""
    form: Form | None = None
    """The form that samples are held to where they are no images; None: images."""

    def __init__(
        self, title: str, labels: Mapping[str, np.ndarray], classes: Iterable[str] | None = None
    ) -> None:
        self.title, self._labels = title, dict[str, np.ndarray]()
        for split, given in labels.items():
            dtype = np.float32 if np.asarray(given).dtype.kind == "f" else np.int64
            self._labels[split] = values = np.array(given, dtype)
            values.setflags(write=False)
            if not values.size:
                raise DataError(f"the {split} split of {title} has no images")
        if classes is None:
            all_of = [*self._labels.values()]
            numbers = (*all_of[0].shape, 1)[1]
            largest = max(values.max() for values in all_of)
            classes = map(str, range(numbers if self.of_numbers else int(largest) + 1))
        self.classes = tuple(classes)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are: train, and unless it has none, test."""
        return tuple(self._labels)

    @property
    def of_numbers(self) -> bool:
        """Are labels numbers to be met, or several at once, and not one of some classes?"""
        return self._labels["train"].dtype.kind == "f"

    def count(self, split: str) -> int:
        """Number of samples in `split`."""
        return len(self._labels[split])

    def labels(self, split: str) -> np.ndarray:
        """Labels in sample order, read-only: int64 (n,), or of every token (n, token); or numbers,
        float32 (n,) or (n, k)."""
        return self._labels[split]

    @abstractmethod
    def name(self, split: str, i: int) -> str:
        """Name of sample `i`, the same wherever the data set lies, such as train/cat/0001.jpg."""

    @abstractmethod
    def open_sample(self, split: str, i: int) -> tuple[bytes, Image.Image | np.ndarray]:
        """Content of sample `i` and its image, which need not be decoded yet, or array, by one
        reading.

        Content is what is hashed: the file's bytes; empty, where the sample itself is its content.
        Raises nearly anything on damaged data.
        """

    def decoded(self, split: str, i: int) -> tuple[bytes, Image.Image | np.ndarray]:
        """Content of sample `i`, and the image, fully decoded, in its own mode and size; or an
        array: of another dtype than uint8, or, where a form has a shape, any.

        The content of what is no file is its bytes after a line of its dtype and shape. Raises
        nearly anything on damaged data; see `broken`.
        """
        hush_pillow()
        content, image = self.open_sample(split, i)
        if isinstance(image, np.ndarray):
            shaped = self.form is not None and self.form.shape
            image = image if shaped else channels_last(image)
            content = content or array_bytes(image)
            if image.dtype != np.uint8 or shaped:
                return content, image
            return content, Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or np.inf):
            raise ValueError(f"{image.width} x {image.height} pixels, the bound is {limit} in all")
        if (tiles := getattr(image, "tile", ())) and image.mode[0] not in "IF":
            image.info[HIGH_BYTE] = ";16" in str(tiles[0][3])  # of a file, until it is decoded
        image.load()
        return content or image.mode.encode() + array_bytes(np.asarray(image)), image

    def image(self, split: str, i: int) -> Image.Image:
        """Sample `i`, fully decoded, in its own mode and size.

        Raises BrokenImage, with its name and a short reason, for whatever is wrong with it, and
        where it is an array.
        """
        try:
            if isinstance(found := self.decoded(split, i)[1], np.ndarray):
                raise ValueError(f"it is an array of {found.dtype}")
            return found
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


def hush_pillow() -> None:
    """Show none of Pillow's own warnings: each is followed by an error of ours, or harmless."""
    # Not in warnings.catch_warnings, which swaps what is the process's under other threads' feet.
    if ("ignore", None, Warning, re.compile(r"PIL\."), 0) not in warnings.filters[:1]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


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


def channels_last(image: np.ndarray) -> np.ndarray:
    """(H,W) as it is, (H,W,C) or (C,H,W) as (H,W,C), with C of 1, 3 or 4.

    Raises ValueError for another shape or where both readings fit.
    """
    if image.ndim == 2:
        return image
    first, last = (image.ndim == 3 and image.shape[axis] in _DEPTHS for axis in (0, -1))
    if first and last:
        raise ValueError(f"it has shape {image.shape}: channels may be first or last")
    if not first and not last:
        raise ValueError(
            f"it has shape {image.shape}, an image must be (H,W), (H,W,C) or (C,H,W), C 1, 3 or 4; "
            "what is no image needs 'data.shape'"
        )
    return image if last else image.transpose(1, 2, 0)


def array_bytes(array: np.ndarray) -> bytes:
    """An array's bytes after a line of its dtype and shape, which the bytes alone do not tell."""
    return f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes()


def sample_of(x: Any) -> tuple[bytes, Image.Image | np.ndarray]:
    """A sample as people have it, as `Source.open_sample` gives it: an image of Pillow, an array or
    tensor, the path of an image or .npy file, or its bytes. Raises nearly anything on damaged data.
    """
    if isinstance(x, Mapping):  # as Hugging Face's datasets have an image that is not decoded
        x = x["bytes"] if x.get("bytes") else Path(x["path"])
    content = x.read_bytes() if isinstance(x, Path) else x
    if isinstance(content, bytes):
        if not content:
            raise ValueError("the file is empty")
        if content.startswith(b"\x93NUMPY"):
            return content, np.load(io.BytesIO(content), allow_pickle=False)
        return content, Image.open(io.BytesIO(content))
    if isinstance(x, Image.Image):
        return b"", x
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)  # pyright: ignore
    if array.dtype.kind not in "biuf":
        raise ValueError(f"it is a {type(x).__name__}, must be an image, an array or a tensor")
    return b"", array.astype(array.dtype.newbyteorder("="), copy=False)


class Arrays(Source):
    """Samples held in memory, or got one by one by their number; classes are numbers where they
    have no names.

    `samples` are, by split, what `sample_of` takes. `marks` and `files` are what the signature is
    made of, `names` those of the samples. Raises DataError when a split is empty.
    """

    def __init__(
        self,
        title: str,
        samples: Mapping[str, Any],
        labels: Mapping[str, np.ndarray],
        marks: Sequence[str],
        files: Sequence[Path] = (),
        *,
        classes: Iterable[str] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(title, labels, classes)
        self._samples, self._marks, self._files = samples, marks, files
        self._names = names or {}

    def name(self, split: str, i: int) -> str:
        return self._names[split][i] if split in self._names else f"{split}/{i}"

    def open_sample(self, split: str, i: int) -> tuple[bytes, Image.Image | np.ndarray]:
        return sample_of(self._samples[split][i])

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
