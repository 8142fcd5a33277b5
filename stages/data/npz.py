"""Arrays of an .npz file as a source: images, or samples of any shape."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from strata.stages.data.sources import (
    SPLITS,
    Arrays,
    Form,
    array_bytes,
    channels_last,
    short_reason,
)
from strata.stages.errors import DataError

_MOST_CLASSES = 65536


class Tensors(Arrays):
    """Samples held in memory that are no images: uint8, int32, float16 or float32 (n, …) per
    split."""

    def array(self, split: str, i: int) -> tuple[bytes, np.ndarray]:
        """Content of sample `i`, as of an image, and its values.

        Raises ValueError for values that a level cannot hold.
        """
        array = self._images[split][i]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("it holds NaN or infinity")
        if array.dtype == np.int32 and array.min() == np.iinfo(np.int32).min:
            raise ValueError(f"it holds {array.min()}, which stands for what is missing")
        return array_bytes(array), array


def open_tensors(path: Path, form: Form) -> Tensors:
    """The arrays x_train, y_train, x_test and y_test of an .npz file as they are.

    Labels are integers (N,), or where every token has one (N, token), of as many classes as `form`
    says or more. Raises DataError where shape or dtype are not those of `form`.
    """
    samples, labels = {}, {}
    stored = _load_npz(path)
    for split in SPLITS:
        array, what = stored[f"x_{split}"], f"x_{split} in {path}"
        if array.dtype != np.dtype(form.dtype):
            raise DataError(f"{what} is {array.dtype}, 'data.dtype' says {form.dtype}")
        if array.shape[1:] != form.shape:
            raise DataError(
                f"{what} has samples of shape {list(array.shape[1:])}, 'data.shape' says "
                f"{list(form.shape)}"
            )
        samples[split] = array.astype(form.dtype, copy=False)  # of this machine's byte order
        tokens = form.targets == "token"
        labels[split] = _npz_labels(stored[f"y_{split}"], f"y_{split} in {path}", tokens)
        _check_count(path, split, array, labels[split])
    widths = {split: labels[split].shape[1:] for split in SPLITS}
    if widths["train"] != widths["test"]:
        raise DataError(
            f"{path} has {widths['train'][0]} labels a sample in y_train, and "
            f"{widths['test'][0]} in y_test"
        )
    marks = ("npz", form.dtype, form.targets, *map(str, form.shape))
    source = Tensors(str(path), samples, labels, marks, [path])
    if form.targets == "token" and len(source.classes) < form.classes:
        source.classes = tuple(map(str, range(form.classes)))
    return source


def open_npz(path: Path) -> Arrays:
    """The arrays x_train, y_train, x_test and y_test of an .npz file.

    Images are uint8 (N,H,W), (N,H,W,C) or (N,C,H,W), labels integers (N,) or (N,1), from 0.
    Raises DataError for anything else.
    """
    images, labels = {}, {}
    stored = _load_npz(path)
    for split in SPLITS:
        array, what = stored[f"x_{split}"], f"x_{split} in {path}"
        if array.dtype != np.uint8:
            raise DataError(f"{what} is {array.dtype}, images must be uint8")
        images[split] = channels_last(array, what)
        labels[split] = _npz_labels(stored[f"y_{split}"], f"y_{split} in {path}")
        _check_count(path, split, images[split], labels[split])
    return Arrays(str(path), images, labels, ("npz",), [path])


def _check_count(path: Path, split: str, samples: np.ndarray, labels: np.ndarray) -> None:
    if len(samples) != len(labels):
        raise DataError(
            f"{path} has {len(samples)} images in x_{split} but {len(labels)} labels in y_{split}"
        )


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of the file, read whole."""
    if not path.is_file():
        folders = f", but a folder: --data imagefolder:{path}" if path.is_dir() else ""
        raise DataError(f"there is no file {path}{folders}")
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
        raise DataError(
            f"{path} cannot be read as an .npz of arrays: {short_reason(error)}"
        ) from error


def _npz_labels(array: np.ndarray, what: str, tokens: bool = False) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise DataError(f"{what} is {array.dtype}, labels must be integers")
    if tokens and (array.ndim != 2 or not array.shape[1]):
        raise DataError(f"{what} has shape {array.shape}, labels of tokens must be (N, token)")
    if not tokens and array.ndim != 1 and (array.ndim != 2 or array.shape[1] != 1):
        raise DataError(f"{what} has shape {array.shape}, labels must be (N,) or (N,1)")
    labels = array if tokens else array.reshape(-1)
    # Names are made for every class up to the largest, so the largest is bounded.
    if (bad := np.argwhere((labels < 0) | (labels >= _MOST_CLASSES))).size:
        first, at = labels[tuple(bad[0])], ", ".join(map(str, bad[0]))
        raise DataError(f"{what} has label {first} at {at}, must be 0..{_MOST_CLASSES - 1}")
    return np.ascontiguousarray(labels, np.int64)
