"""Labelled images: the contract of a source, what sources share, and those held in memory."""

from __future__ import annotations

import difflib
import hashlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from strata.stages.errors import BrokenImage, DataError

SPLITS = ("train", "test")
_DEPTHS = (1, 3, 4)
_MOST_CLASSES = 65536


class Source(Protocol):
    """A labelled image data set with a train and a test split; a context manager.

    Everything but `close` may be called from several threads at once.
    """

    classes: tuple[str, ...]
    """Class names in label order; the label itself where there are no names."""

    def count(self, split: str) -> int:
        """Number of samples in `split`."""
        ...

    def labels(self, split: str) -> np.ndarray:
        """Labels in sample order: int64 (n,), read-only."""
        ...

    def name(self, split: str, i: int) -> str:
        """Name of sample `i`, the same wherever the data set lies, such as train/cat/0001.jpg."""
        ...

    def content(self, split: str, i: int) -> bytes:
        """What is hashed: the file's bytes, or an array's after a line of its dtype and shape.

        Raises BrokenImage where it cannot be read.
        """
        ...

    def image(self, split: str, i: int) -> Image.Image:
        """Sample `i`, fully decoded, in its own mode and size. Raises BrokenImage."""
        ...

    def signature(self) -> str:
        """Hex digest that changes when files do; looks at sizes and times, reads no image."""
        ...

    def close(self) -> None:
        """Release files. The source is of no use afterwards."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Listed:
    """What every source here shares: class names, labels, and being a context manager.

    Raises DataError, naming `title`, when a split has no samples.
    """

    def __init__(
        self, title: str, classes: Iterable[str], labels: Mapping[str, np.ndarray]
    ) -> None:
        self.classes = tuple(classes)
        self._labels = {split: np.array(labels[split], np.int64) for split in SPLITS}
        for split, values in self._labels.items():
            values.setflags(write=False)
            if not values.size:
                raise DataError(f"the {split} split of {title} has no images")

    def count(self, split: str) -> int:
        return self._labels[split].size

    def labels(self, split: str) -> np.ndarray:
        return self._labels[split]

    def close(self) -> None:
        """Nothing to release unless a subclass says so."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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


def decoded(name: str, load: Callable[[], Image.Image]) -> Image.Image:
    """The image that `load` opens, fully decoded.

    Raises BrokenImage, with `name` and a short reason, for whatever is wrong with it.
    """
    _silence_pillow()
    try:
        image = load()
        if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or np.inf):
            reason = f"{image.width} x {image.height} pixels, the bound is {limit} in all"
            raise BrokenImage(name, reason)
        image.load()
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage(name, "not an image in a known format") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise BrokenImage(name, one_line(error)) from error
    return image


def _silence_pillow() -> None:
    """Ignore Pillow's own warnings: each is either followed by an error here or harmless.

    `warnings.catch_warnings` would be more local, but it swaps process-wide state under the
    feet of other threads, and decoding runs in threads.
    """
    wanted = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if wanted not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def one_line(error: BaseException) -> str:
    """The first line of an error's text, at most 120 characters; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


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


def picture(array: np.ndarray) -> Image.Image:
    """An image of uint8 (H,W) or (H,W,C)."""
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def packed(array: np.ndarray) -> bytes:
    """An array's bytes after a line of its dtype and shape, which the bytes alone do not tell."""
    return f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes()


class Arrays(Listed):
    """Images held in memory: uint8 (n,H,W) or (n,H,W,C) per split.

    `mark` gives the signature anew at each call. Raises DataError when a split is empty.
    """

    def __init__(
        self,
        title: str,
        classes: Iterable[str],
        images: Mapping[str, np.ndarray],
        labels: Mapping[str, np.ndarray],
        mark: Callable[[], str],
    ) -> None:
        super().__init__(title, classes, labels)
        self._images = images
        self._mark = mark

    def name(self, split: str, i: int) -> str:
        return f"{split}/{i}"

    def content(self, split: str, i: int) -> bytes:
        return packed(self._images[split][i])

    def image(self, split: str, i: int) -> Image.Image:
        return picture(self._images[split][i])

    def signature(self) -> str:
        return self._mark()


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
    return Arrays(
        "digits",
        map(str, range(10)),
        {"train": images[:-360], "test": images[-360:]},
        {"train": bunch.target[:-360], "test": bunch.target[-360:]},
        lambda: stamp(("digits", sklearn.__version__), ()),
    )


def open_npz(path: Path) -> Arrays:
    """The arrays x_train, y_train, x_test and y_test of an .npz file.

    Images are uint8 (N,H,W), (N,H,W,C) or (N,C,H,W), labels integers (N,) or (N,1), from 0.
    Raises DataError for anything else.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    images, labels = {}, {}
    stored = _load_npz(path)
    for split in SPLITS:
        images[split] = _npz_images(stored[f"x_{split}"], f"x_{split} in {path}")
        labels[split] = _npz_labels(stored[f"y_{split}"], f"y_{split} in {path}")
        if len(images[split]) != len(labels[split]):
            raise DataError(
                f"{path} has {len(images[split])} images in x_{split} "
                f"but {len(labels[split])} labels in y_{split}"
            )
    most = max((int(part.max()) for part in labels.values() if part.size), default=-1)
    return Arrays(
        str(path), map(str, range(most + 1)), images, labels, lambda: stamp(("npz",), [path])
    )


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of the file, read whole."""
    wanted = [f"{axis}_{split}" for split in SPLITS for axis in "xy"]
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not an .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [key for key in wanted if key not in file.files]:
                raise DataError(
                    f"{path} has no {' and no '.join(missing)}, it holds {', '.join(file.files)}"
                )
            return {key: file[key] for key in wanted}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz of arrays: {one_line(error)}") from error


def _npz_images(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype != np.uint8:
        raise DataError(f"{what} is {array.dtype}, images must be uint8")
    return channels_last(array, what)


def _npz_labels(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise DataError(f"{what} is {array.dtype}, labels must be integers")
    if array.ndim != 1 and (array.ndim != 2 or array.shape[1] != 1):
        raise DataError(f"{what} has shape {array.shape}, labels must be (N,) or (N,1)")
    labels = array.reshape(-1)
    # Names are made for every class up to the largest, so the largest is bounded.
    if (bad := np.flatnonzero((labels < 0) | (labels >= _MOST_CLASSES))).size:
        raise DataError(
            f"{what} has label {labels[bad[0]]} at {bad[0]}, must be 0..{_MOST_CLASSES - 1}"
        )
    return labels.astype(np.int64)
