"""Labels as people have them (numbers, words, vectors, one-hot rows), as a level keeps them; and a
source of samples that lie by split beside their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from strata.stages.data.sources import SPLITS, Arrays, short_reason
from strata.stages.errors import DataError

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}
"""Words that name a split: train, test, or val, which does for test where there is none."""

MOST_CLASSES = 65536
"""Names are made for every class up to the largest, so the largest is bounded."""


def arrays_of(
    title: str,
    parts: Mapping[str, tuple[Any, Any]],
    targets: str,
    *,
    called: Mapping[str, str],
    marks: Sequence[str],
    files: Sequence[Path],
    classes: Sequence[str] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Arrays:
    """A source of samples and labels by the word for their split; `called` says, by that word, what
    messages call the labels. Raises DataError: there is another word, no train, or not one label
    for each sample; or as `labels_of`."""
    words = {SPLIT_WORDS.get(word.lower(), ""): word for word in parts}
    if "" in words or "train" not in words or len(words) < len(parts):
        told = ", ".join(map(repr, parts)) or "none"
        raise DataError(f"{title} has the splits {told}; they must be train, and test or val")
    left_out = {}
    if "val" in words:
        word = words.pop("val")
        if words.setdefault("test", word) != word:
            left_out = {"beside train and test": (len(parts[word][1]), word)}
    words = {split: words[split] for split in SPLITS if split in words}
    for word in words.values():
        if len(parts[word][0]) != len(parts[word][1]):
            counts = f"{len(parts[word][0])} samples but {len(parts[word][1])} labels"
            raise DataError(f"{title} has {counts} in {called[word]}")
    given = {split: parts[word][1] for split, word in words.items()}
    labels, known = labels_of(given, {s: called[word] for s, word in words.items()}, targets)
    samples = {split: parts[word][0] for split, word in words.items()}
    shown = {split: names[word] for split, word in words.items()} if names else None
    source = Arrays(title, samples, labels, marks, files, classes=known or classes, names=shown)
    source.left_out = left_out
    return source


def labels_of(
    given: Mapping[str, Any], named: Mapping[str, str], targets: str = "sample"
) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Labels by split, and the names of classes where labels are words.

    int64 (n,) of class numbers, of words in alphabetical order, and of one-hot rows; int64
    (n, token) where `targets` is ``token``; float32 (n,) or (n, k) of other numbers. `named` says,
    by split, what messages call them. Raises DataError for labels that are none of these.
    """
    tokens = targets == "token"
    arrays = {split: _array(values, named[split], tokens) for split, values in given.items()}
    kinds = {"i" if array.dtype.kind in "bu" else array.dtype.kind for array in arrays.values()}
    if kinds == {"U"}:
        words = sorted(set().union(*(set(array.tolist()) for array in arrays.values())))
        found = {split: np.searchsorted(words, array) for split, array in arrays.items()}
        return found, words
    if not kinds <= {"i", "f"}:
        told = " and ".join(f"{named[split]} is {a.dtype}" for split, a in arrays.items())
        raise DataError(f"{told}: labels must all be numbers, or all words")
    widths = {split: array.shape[1:] for split, array in arrays.items()}
    if len(set(widths.values())) > 1:
        told = ", and ".join(f"{(*width, 1)[0]} in {named[s]}" for s, width in widths.items())
        raise DataError(f"labels of a sample are {told}")
    if tokens:
        for split, array in arrays.items():
            if array.ndim != 2 or array.dtype.kind == "f":
                raise DataError(
                    f"{named[split]} is {array.dtype} {array.shape}, labels of tokens must be "
                    "integers (N, token)"
                )
        return {split: _classes(array, named[split]) for split, array in arrays.items()}, None
    if all(array.ndim == 2 for array in arrays.values()):
        if all(map(_is_one_hot, arrays.values())):
            return {split: array.argmax(1) for split, array in arrays.items()}, None
        kinds = {"f"}
    if "f" in kinds:
        return {split: _numbers(array, named[split]) for split, array in arrays.items()}, None
    return {split: _classes(array, named[split]) for split, array in arrays.items()}, None


def _array(values: Any, what: str, tokens: bool) -> np.ndarray:
    """Labels as an array of one or two axes; but for tokens (n, 1) is (n,)."""
    given: Any = values.detach().cpu() if hasattr(values, "detach") else values
    try:
        if isinstance(values, list) and values and all(value is None for value in values):
            return np.zeros(len(values), np.int64)
        if isinstance(values, list) and values and hasattr(values[0], "detach"):
            given = [value.tolist() for value in values]
        array = np.asarray(given)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{what} cannot be read as labels: {short_reason(error)}") from error
    if array.dtype.kind == "O" and all(isinstance(each, str) for each in array):
        array = array.astype(str)
    if array.ndim == 2 and array.shape[1] == 1 and not tokens:
        array = array[:, 0]
    if array.dtype.kind not in "biufU" or (array.dtype.kind == "U" and array.ndim != 1):
        raise DataError(f"{what} is {array.dtype}: labels must be numbers or words")
    if array.ndim not in (1, 2) or 0 in array.shape[1:]:
        raise DataError(f"{what} has shape {array.shape}, labels must be (N,) or (N, number)")
    return array


def _is_one_hot(array: np.ndarray) -> bool:
    """Does every row hold one 1, and else 0?"""
    return bool(((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all())


def _classes(array: np.ndarray, what: str) -> np.ndarray:
    if (bad := np.argwhere((array < 0) | (array >= MOST_CLASSES))).size:
        first, at = array[tuple(bad[0])], ", ".join(map(str, bad[0]))
        raise DataError(f"{what} has label {first} at {at}, must be 0..{MOST_CLASSES - 1}")
    return np.ascontiguousarray(array, np.int64)


def _numbers(array: np.ndarray, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, np.float32)
    if (bad := np.argwhere(~np.isfinite(found))).size:
        first, at = array[tuple(bad[0])], ", ".join(map(str, bad[0]))
        raise DataError(f"{what} has label {first} at {at}, which is no finite number")
    return found
