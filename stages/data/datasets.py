"""Map-style data sets as a source: objects with a length and ``[i]``, as torch's DataLoader takes
them, and ``python:FILE.py:make``, a function that gives them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
        classes: Sequence[str] | None = None,
        targets: str = "sample",
    ) -> None:
        self._lock, self._marks = threading.Lock(), marks
        self._parts: dict[str, Any] = {"train": train} | ({} if test is None else {"test": test})
        self._given = {split: _labels(part, title) for split, part in self._parts.items()}
        named = {split: f"the labels of {title}, {split}," for split in self._parts}
        labels, words = labels_of(self._given, named, targets)
        super().__init__(title, labels, words)
        whole = getattr(train, "dataset", train)  # of a part of one, as torch divides it
        known = getattr(whole, "classes", None) if classes is None else classes
        if words is None and isinstance(known, (list, tuple)) and len(known) >= len(self.classes):
            self.classes = tuple(map(str, known))
        first: list[bytes] = []
        with suppress(Exception):  # a broken sample is named later, with all others
            first = [array_bytes(np.asarray(self.open_sample("train", 0)[1])) for _ in "12"]
        if len(set(first)) > 1:
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
            words.append(array_bytes(labels).decode("latin-1"))
            for i in np.unique(np.linspace(0, len(labels) - 1, _SPOTS).astype(int)).tolist():
                try:
                    content, sample = self.open_sample(split, i)
                    content = content or array_bytes(np.asarray(sample))
                except Exception as error:  # a broken sample
                    content = str(error).encode()
                words.append(content.decode("latin-1"))
        return stamp(words, ())


def open_python(file: Path, function: str, targets: str) -> FromDataset:
    """The data sets that a function of a Python file gives: one, two, or a mapping with ``train``
    and ``test``. Raises DataError: it cannot be had."""
    title, read = f"python:{file.name}:{function}", set[str]()
    if file.suffix != ".py" or not function.isidentifier():
        raise DataError(f"{title} must be python:FILE.py:FUNCTION")
    try:
        code = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    folder = file.parent.absolute()
    import torch

    try:
        # What it draws, such as a split of its own, is the same at every reading.
        with (
            foreign.guarded(title),
            foreign.at_home(folder, folder, read),
            torch.random.fork_rng([]),
        ):
            torch.default_generator.manual_seed(0)
            module = foreign.executed(f"data {file.stem}", code, file.absolute())
            made = getattr(module, function, None)
            if not callable(made):
                raise DataError(f"{file} has no function {function}")
            found: Any = made()
    except UnusableNetwork as error:
        raise DataError(str(error)) from error
    if isinstance(found, Mapping) and "train" in found:
        found = found["train"], found.get("test", found.get("validation"))
    parts = found if isinstance(found, tuple) else (found,)
    if not 1 <= len(parts) <= 2:
        raise DataError(f"{title} gives {len(parts)} things, must be one or two data sets")
    marks = [code, stamp(sorted(read), (folder / name for name in sorted(read)))]
    with foreign.guarded(title):
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
    if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
        raise DataError(
            f"{title} is a {type(part).__name__}, must be a map-style data set: len(d), and d[i] "
            "gives (x, y)"
        )
    count = len(part)
    for name in ("targets", "labels"):
        known = getattr(part, name, None)
        if hasattr(known, "__len__") and len(known) == count:  # pyright: ignore
            spots = np.unique(np.linspace(0, max(0, count - 1), _SPOTS).astype(int)).tolist()
            if count and all(_same(_label(part, i), known[i]) for i in spots):  # pyright: ignore
                return known
    found = [_label(part, i) for i in range(count)]
    sound = next((y for y in found if y is not _BROKEN), None)
    return [sound if y is _BROKEN else y for y in found]


_BROKEN = object()
"""In the place of a label that cannot be read: its sample cannot be, either."""


def _label(part: Any, i: int) -> Any:
    try:
        return _pair(part[i])[1]
    except Exception:
        return _BROKEN


def _same(y: Any, known: Any) -> bool:
    if y is None or known is None:
        return y is None and known is None
    return bool(np.array_equal(np.asarray(y), np.asarray(known)))
