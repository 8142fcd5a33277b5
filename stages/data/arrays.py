"""Arrays of an .npz file, or of a folder of .npy files, as a source; and samples that are no images
in the shape and dtype that a recipe says."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from strata.stages.data.labels import SPLIT_WORDS, arrays_of
from strata.stages.data.sources import Arrays, Form, short_reason
from strata.stages.errors import DataError

_SAMPLES = r"x|(image|img|input|feature|sample|signal)s?|data"
_LABELS = r"y|(label|target|class|classe)s?|cls"
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def open_npz(path: Path, form: Form | None) -> Arrays:
    """The arrays of an .npz file, or of a folder of .npy files, which are mapped.

    x_train, y_train, x_test and y_test, or x and y, by these or other usual names (images, labels,
    data, target, train_x, …). Labels are as `labels_of` takes them. Raises DataError for other
    arrays, naming those that there are.
    """
    stored, files = _load(path)
    found: dict[str, list[list[str]]] = {}
    for name in stored:
        if (role := _role(name)) is not None:
            found.setdefault(role[0], [[], []])[role[1]].append(name)
    if not all(len(names) == 1 for pair in found.values() for names in pair) or not found:
        told = (f"{name} {'' if a is None else a.shape}".strip() for name, a in stored.items())
        raise DataError(
            f"{path} holds {', '.join(told) or 'nothing'}: samples and labels must be called "
            "x_train, y_train, x_test and y_test, or x and y, or the like"
        )
    parts = {word: (stored[x[0]], stored[y[0]]) for word, (x, y) in found.items()}
    for word, (samples, _) in parts.items():
        if samples.ndim < 2 or samples.dtype.kind not in "biuf":
            what = f"{found[word][0][0]} in {path} is {samples.dtype} {samples.shape}"
            raise DataError(f"{what}, must be numbers of (N, …)")
    called = {word: f"{y[0]} in {path}" for word, (_, y) in found.items()}
    targets = form.targets if form and form.shape else "sample"
    marks = ["npz", *([form.dtype, targets, *map(str, form.shape)] if form else ())]
    source = arrays_of(str(path), parts, targets, called=called, marks=marks, files=files)
    if others := [name for name in sorted(stored) if _role(name) is None]:
        source.left_out = {**source.left_out, "another array": (len(others), others[0])}
    if form and targets == "token" and len(source.classes) < form.classes:
        source.classes = tuple(map(str, range(form.classes)))
    return source


def _role(name: str) -> tuple[str, int] | None:
    """The split of an array by its name, and whether it holds samples (0) or labels (1)."""
    if name in ("arr_0", "arr_1"):  # as numpy calls them where nobody did
        return "train", int(name[-1])
    words = [word.lower() for word in _WORD.findall(name)]
    splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    others = [word for word in words if word not in SPLIT_WORDS]
    for role, known in enumerate((_SAMPLES, _LABELS)):
        if others and all(re.fullmatch(known, word) for word in others):
            return (*splits, "train")[0], role
    return None


def _load(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The arrays of the file, read whole, or of the files of a folder, by name; None where the name
    says that it is not needed. And the files."""
    wrong: tuple[type[Exception], ...] = (OSError, ValueError, EOFError, zipfile.BadZipFile)
    try:
        if files := sorted(path.glob("*.npy")):
            arrays = {file.stem: np.load(file, mmap_mode="r") for file in files}
            return arrays, files
        if not path.is_file():
            folders = f", but a folder: --data imagefolder:{path}" if path.is_dir() else ""
            raise DataError(f"there is no file {path}{folders}")
        if path.suffix == ".npy":
            raise DataError(f"{path} holds one array: give the folder, with the labels in another")
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] if _role(key) else None for key in file.files}, [path]
    except (*wrong, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as an .npz of arrays: {short_reason(error)}"
        ) from error


def fitted(array: np.ndarray, form: Form) -> tuple[np.ndarray, tuple[str, ...]]:
    """A sample that is no image in the shape and dtype of `form`, and what was done to it.

    Channels that are last become the first where that gives the shape; values of another dtype are
    kept as they are, or rounded from one float to another. Raises ValueError for another shape, for
    values that the dtype does not hold, and for those that a level cannot.
    """
    changes, wanted, dtype = (), form.shape, np.dtype(form.dtype)
    if array.shape != wanted:
        if array.ndim > 2 and (array.shape[-1], *array.shape[:-1]) == wanted:
            array, changes = np.moveaxis(array, -1, 0), ("channels made the first axis",)
        elif (1, *array.shape) == wanted:
            array = array[None]
        else:
            raise ValueError(f"it has shape {list(array.shape)}, 'data.shape' is {list(wanted)}")
    if array.dtype != dtype:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("it holds NaN or infinity")
        with np.errstate(over="ignore", invalid="ignore"):
            found = array.astype(dtype)
            same = (found.astype(array.dtype) == array).all()
        rounded = array.dtype.kind == dtype.kind == "f" and np.isfinite(found).all()
        if not rounded and not same:
            raise ValueError(f"it is {array.dtype}, whose values 'data.dtype' {dtype} cannot hold")
        array, changes = found, (*changes, f"{array.dtype} as {dtype}")
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")
    if dtype == np.int32 and array.size and array.min() == np.iinfo(np.int32).min:
        raise ValueError(f"it holds {array.min()}, which stands for what is missing")
    return np.ascontiguousarray(array), changes
