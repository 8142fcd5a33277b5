"""Map-style data sets as a source: objects with a length and ``[i]``, as torch's DataLoader takes
them, and ``python:FILE.py:make``, a function that gives them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from strata.stages import foreign
from strata.stages.data.labels import labels_of
from strata.stages.data.sources import (
    IMAGE_NAMES,
    LABEL_NAMES,
    Source,
    array_bytes,
    sample_of,
    stamp,
)
from strata.stages.errors import DataError, UnusableNetwork

_SPOTS = 8
"""Samples of a split that are read to see whether a data set is another."""


class FromDataset(Source):
    """Map-style data sets as a source.

    Args:
        train, test: with a length, and by ``[i]`` a pair (x, y), or x alone. x is an image of
            Pillow, an array, a tensor, or the bytes or path of an image; y an int, a word, a
            vector or a float; None, as where there is no y, is class 0. A mapping with the usual
            names (image, label) does for a pair.
        title: what messages call it.
        marks: what the signature is made of beside labels and a few samples.
        targets: ``token`` where every token has a label.

    Labels are read first: the attribute ``targets`` or ``labels`` where it holds what a few samples
    say, else all samples. Every y is compared with them when its sample is read. A data set is
    asked by one thread at a time. Raises DataError: it is no map-style data set, gives something
    else at every reading, or its labels are unfit.
    """

    def __init__(
        self,
        train: Any,
        test: Any = None,
        *,
        title: str = "the data set",
        marks: Sequence[str] = (),
        targets: str = "sample",
    ) -> None:
        self._lock, self._marks = threading.Lock(), marks
        self._parts: dict[str, Any] = {"train": train} | ({} if test is None else {"test": test})
        self._given = {split: _labels(part, title) for split, part in self._parts.items()}
        called = {split: f"the labels of {title}, {split}," for split in self._parts}
        super().__init__(title, *labels_of(self._given, called, targets))
        # Of a part of one, as torch divides it, the whole has the names.
        known = getattr(getattr(train, "dataset", train), "classes", None)
        if isinstance(known, (list, tuple)) and len(known) >= len(self.classes):
            self.classes = tuple(map(str, known))
        if self._spot("train", 0) != self._spot("train", 0):
            raise DataError(
                f"{title} gives another sample 0 at each reading: leave what is drawn at random to "
                "[augment]"
            )

    def name(self, split: str, i: int) -> str:
        return f"{split}/{i}"

    def open_sample(self, split: str, i: int) -> tuple[bytes, Image.Image | np.ndarray]:
        with self._lock:
            try:
                x, y = _pair(self._parts[split][i])
            except Exception as error:
                raise ValueError(foreign.told(error)) from error
        if not _same(y, self._given[split][i]):
            raise ValueError(f"its label is {y!r} now, and was {self._given[split][i]!r}")
        return sample_of(x)

    def signature(self) -> str:
        words = [*self._marks]
        for split, labels in self._labels.items():
            words.append(sha256(array_bytes(labels)).hexdigest())
            words += [self._spot(split, i) for i in _spots(len(labels))]
        return stamp(words, ())

    def _spot(self, split: str, i: int) -> str:
        """A digest of one sample, or what is wrong with it."""
        try:
            content, sample = self.open_sample(split, i)
            return sha256(content or array_bytes(np.asarray(sample))).hexdigest()
        except Exception as error:  # a broken sample is named later, with all others
            return str(error)


def open_python(file: Path, function: str, targets: str) -> FromDataset:
    """The data sets that a function of a Python file gives: one, two, or a mapping with ``train``
    and ``test``. Raises DataError: it cannot be had."""
    title, read, folder = f"python:{file.name}:{function}", set[str](), file.parent.absolute()
    try:
        code = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    import torch

    # What it draws, such as a split of its own, is the same at every reading.
    draws = torch.random.fork_rng([])
    try:
        with foreign.guarded(title), foreign.at_home(folder, folder, read), draws:
            torch.default_generator.manual_seed(0)
            module = foreign.executed(f"data {file.stem}", code, file.absolute())
            if not callable(made := getattr(module, function, None)):
                raise DataError(f"{file} has no function {function}: give python:FILE.py:FUNCTION")
            found: Any = made()
    except UnusableNetwork as error:
        raise DataError(str(error)) from error
    if isinstance(found, Mapping) and "train" in found:
        found = found["train"], found.get("test", found.get("validation"))
    both = isinstance(found, list) and all(isinstance(d, torch.utils.data.Dataset) for d in found)
    parts = found if isinstance(found, tuple) or both else (found,)  # random_split gives a list
    if not 1 <= len(parts) <= 2:
        raise DataError(f"{title} gives {len(parts)} things, must be one or two data sets")
    marks = [code, stamp(sorted(read), (folder / name for name in sorted(read)))]
    return FromDataset(*parts, title=title, marks=marks, targets=targets)


def _pair(item: Any) -> tuple[Any, Any]:
    """x and y of what a data set gives. Raises ValueError: there are not two."""
    if isinstance(item, Mapping):
        named = [
            next((n for n in names if n in item), None) for names in (IMAGE_NAMES, LABEL_NAMES)
        ]
        if named[0] is None:
            raise ValueError(f"it is a mapping of {', '.join(map(str, item))}, without an image")
        return item[named[0]], item.get(named[1])
    if not isinstance(item, (tuple, list)):
        return item, None
    if not 1 <= len(item) <= 2:
        raise ValueError(f"it has {len(item)} parts, must be (x, y)")
    return item[0], (*item, None)[1]


def _labels(part: Any, title: str) -> Any:
    """The labels of a data set, as it gives them."""
    try:
        count, _ = len(part), part.__getitem__
    except (TypeError, AttributeError):
        raise DataError(
            f"{title} is a {type(part).__name__}, must be a map-style data set: len(d), and d[i] "
            "gives (x, y)"
        ) from None
    for name in ("targets", "labels"):
        known = getattr(part, name, ())
        with suppress(Exception):  # an attribute of another kind
            if len(known) == count and all(_same(_label(part, i), known[i]) for i in _spots(count)):
                return known
    found = [_label(part, i) for i in range(count)]
    sound = next((y for y in found if y is not _BROKEN), None)
    return [sound if y is _BROKEN else y for y in found]


_BROKEN = object()
"""In the place of a label that cannot be read: its sample cannot be, either."""


def _label(part: Any, i: int) -> Any:
    try:
        return _pair(part[i])[1]
    except Exception:  # named when the sample is read
        return _BROKEN


def _spots(count: int) -> list[int]:
    """A few of so many samples: the first, the last, and some between."""
    return np.unique(np.linspace(0, max(0, count - 1), _SPOTS).astype(int)).tolist()


def _same(y: Any, known: Any) -> bool:
    return bool(np.array_equal(np.asarray(y), np.asarray(known)))
