"""What a data set holds, from its list and a bounded sample: what a recipe may leave out, and what
`init` writes into one."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from strata.stages.data.images import read, square
from strata.stages.data.opening import Divided, open_source, open_whole
from strata.stages.data.sources import Form, Source, hush_pillow
from strata.stages.data.values import COLOUR
from strata.stages.errors import BrokenImage, DataError

SAMPLE = 300
"""Most samples that are looked at."""
_THREADS, _MOST_MEANS, _TRIED, _LARGEST = 4, 4096, 20, 256
_KEPT = ("uint8", "uint16", "int32", "float16", "float32")


@dataclass(frozen=True)
class Facts:
    """What a data set was found to hold."""

    source: str
    classes: int
    """Classes; of labels that are numbers, how many of them a sample has."""
    names: tuple[str, ...]
    """Names of the classes, in the order of their numbers."""
    labels: str
    """``classes``, one for each sample; ``tokens``, integers (n, token); ``numbers``, float32 (n,)
    or (n, k)."""
    several: bool
    """Are labels vectors of numbers in 0 … 1, such as of several classes at once?"""
    counts: Mapping[str, int]
    """Samples by split: train, and unless the data has none, test."""
    sizes: tuple[tuple[int, int], ...]
    """Of images, (height, width) of the smallest, the median and the largest that was looked at, by
    pixels; empty for arrays."""
    channels: int
    """Of images, 1 if all are grey, else 3; of arrays, the length of the first axis."""
    shape: tuple[int, ...]
    """Of arrays, what ``data.shape`` must say; empty for images."""
    dtype: str
    """Of arrays, what ``data.dtype`` may say."""
    mean: tuple[float, ...]
    """By channel, of pixels in 0 … 1, or in the units of arrays; empty for tokens."""
    std: tuple[float, ...]
    left_out: Mapping[str, tuple[int, str]]
    """As ``Source.left_out``."""


class _Seen(NamedTuple):
    """One sample: size and whether it has colour, if it is an image; kind and scale as in `Sound`;
    float64 (2, channels), means of the values and of their squares."""

    size: tuple[int, int]
    colour: bool
    kind: str
    scale: int
    moments: np.ndarray


def look(
    spec: str,
    *,
    root: Path,
    download: bool = False,
    form: Form | None = None,
    size: int = 0,
    channels: int = 0,
) -> Facts:
    """Look at a data set: at its list of samples, and at no more than ``SAMPLE`` of them, of the
    training split, always the same.

    Args:
        form: what a recipe says; None: what lies there decides whether it is images.
        size, channels: of images as a recipe has them; 0: as they lie there, but no larger than
            256 pixels.

    Raises DataError: it cannot be opened, not one sample can be read, or `form` wants a split of
    what has one.
    """
    how: Any = {"root": root, "download": download, "form": form}
    with (open_source if form else open_whole)(spec, **how) as source:
        if form and form.split and not isinstance(source, Divided):
            told = f"has a test split of {source.count('test'):,} samples"
            raise DataError(f"{source.title} {told}: leave out 'data.split' and --split")
        count = source.count("train")
        drawn = np.random.default_rng(0).choice(count, min(count, SAMPLE), replace=False)
        rows: list[int] = np.sort(drawn).tolist()
        source.form = source.form or (None if form else _form_of(source, rows))
        seen = _all_seen(source, rows, size, channels)
        sizes = sorted((one.size for one in seen), key=lambda one: (one[0] * one[1], one))
        channels = channels or (3 if any(one.colour for one in seen) else 1)
        shape, dtype = (source.form.shape, source.form.dtype) if source.form else ((), "uint8")
        mean, std = ((), ()) if dtype == "int32" else _mean_and_std(seen)
        kept = len(mean) if shape else channels
        labels = source.labels("train")
        whole = "tokens" if labels.ndim > 1 else "classes"
        several = labels.ndim > 1 and labels.min() >= 0 and labels.max() <= 1
        return Facts(
            source=spec,
            classes=len(source.classes),
            names=source.classes,
            labels="numbers" if source.of_numbers else whole,
            several=bool(several) and source.of_numbers,
            counts={split: source.count(split) for split in source.splits},
            sizes=() if shape else (sizes[0], sizes[len(sizes) // 2], sizes[-1]),
            channels=shape[0] if shape else channels,
            shape=shape,
            dtype=dtype,
            mean=mean[:kept],
            std=std[:kept],
            left_out=source.left_out,
        )


def _form_of(source: Source, rows: list[int]) -> Form | None:
    """The form of samples that are no images; None if they can be read as such."""
    array: Any = None
    hush_pillow()
    for i in rows[:_TRIED]:
        with suppress(Exception):  # broken, as others may be
            array = source.open_sample("train", i)[1]
            break
    try:
        for i in rows[:_TRIED] if isinstance(array, np.ndarray) else ():
            read(source, "train", i)
        return None
    except BrokenImage:
        shape, dtype = array.shape, str(array.dtype)
    y_first = len(shape) > 1 and (len(set(shape[:-1])) == 1 or shape[-1] < min(shape[:-1]))
    if len(shape) > 2 and len(set(shape[1:])) > 1 and y_first:
        shape = (shape[-1], *shape[:-1])
    if dtype not in _KEPT:
        dtype = "int32" if array.dtype.kind in "iu" and array.ndim == 1 else "float32"
    # What a recipe would say.
    return SimpleNamespace(shape=shape, dtype=dtype, targets="sample", classes=0)  # pyright: ignore


def _all_seen(source: Source, rows: list[int], size: int, channels: int) -> list[_Seen]:
    """The samples that are not broken. Raises DataError: all are."""

    def one(i: int) -> _Seen | BrokenImage:
        try:
            return _seen(source, i, size, channels or 3)
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        every = list(pool.map(one, rows))
    found = [each for each in every if isinstance(each, _Seen)]
    if not found:
        raise DataError(f"{source.title}: all {len(rows)} samples looked at are broken: {every[0]}")
    return found


def _seen(source: Source, i: int, size: int, channels: int) -> _Seen:
    sample, found = read(source, "train", i)
    if isinstance(sample, Image.Image):
        shape, colour = (sample.height, sample.width), COLOUR in found.changes
        array = square(sample, size or min(_LARGEST, *sample.size), channels) / 255
    else:
        shape, colour, array = (0, 0), False, sample.astype(np.float64)
    flat = array.reshape(len(array) if len(array) <= _MOST_MEANS else 1, -1)
    moments = np.stack([flat.mean(1), (flat**2).mean(1)])
    return _Seen(shape, colour, found.kind, found.scale, moments)


def _mean_and_std(seen: list[_Seen]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By channel, to four digits. What never changes has a deviation of 1, so that it can be
    divided by. Values of more than 8 bits are of the full scale of all samples."""
    largest: dict[str, int] = {}
    for one in seen:
        largest[one.kind] = max(one.scale, largest.get(one.kind, 1))
    factors = [one.scale / largest[one.kind] if one.kind else 1.0 for one in seen]
    moments = [one.moments * [[f], [f * f]] for one, f in zip(seen, factors, strict=True)]
    mean, of_squares = np.mean(moments, 0)
    std = np.sqrt(np.maximum(of_squares - mean**2, 0))
    std[std <= 1e-7 * (1 + np.abs(mean))] = 1
    rounded = [tuple(float(f"{one:.4g}") for one in each.tolist()) for each in (mean, std)]
    return rounded[0], rounded[1]
