"""What a data set holds, from its list and a bounded sample: what a recipe may leave out, and what
`init` writes into one."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from strata.stages.data.images import read, square
from strata.stages.data.opening import open_source, open_whole
from strata.stages.data.sources import Form, Source
from strata.stages.data.values import COLOUR
from strata.stages.errors import BrokenImage, DataError

SAMPLE = 300
"""Most samples that are looked at."""
_THREADS = 4
_LARGEST = 256
_MOST_MEANS = 4096
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
    """``classes``, one for each sample; ``tokens``, integers (n, token) that are one for every
    token or numbers; ``numbers``, float32 (n,) or (n, k)."""
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
        size, channels: of images as a recipe has them; 0: as they lie there.

    Raises DataError: it cannot be opened, or not one sample can be read.
    """
    how: Any = {"root": root, "download": download, "form": form}
    with (open_source if form else open_whole)(spec, **how) as source:
        count = source.count("train")
        draw = np.random.default_rng(0)
        rows = np.sort(draw.choice(count, min(count, SAMPLE), replace=False)).tolist()
        source.form = source.form or (None if form else _form_of(source, rows))
        shaped = source.form.shape if source.form else ()
        found = _of_arrays(source, rows) if shaped else _of_images(source, rows, size, channels)
        labels = source.labels("train")
        kind = "numbers" if source.of_numbers else "tokens" if labels.ndim > 1 else "classes"
        return Facts(
            source=spec,
            classes=len(source.classes),
            names=source.classes,
            labels=kind,
            counts={split: source.count(split) for split in source.splits},
            shape=shaped,
            dtype=source.form.dtype if source.form else "uint8",
            left_out=source.left_out,
            **found,
        )


def _form_of(source: Source, rows: list[int]) -> Form | None:
    """The form of samples that are no images: None if they can be read as such."""
    array = np.empty(0)
    for i in rows:
        try:
            array: Any = source.open_sample("train", i)[1]
            if isinstance(array, Image.Image):
                return None
            break
        except Exception:  # broken, as others may be
            continue
    try:
        for i in rows:
            read(source, "train", i)
        return None
    except BrokenImage:
        pass
    shape = array.shape
    if len(shape) > 2 and shape[-1] < min(shape[:-1]):
        shape = (shape[-1], *shape[:-1])
    dtype = str(array.dtype)
    if dtype not in _KEPT:
        tokens = array.dtype.kind in "iu" and array.ndim == 1
        dtype = "int32" if tokens else "float32"
    return SimpleNamespace(shape=shape, dtype=dtype, targets="sample", classes=0)  # pyright: ignore


def _of_images(source: Source, rows: list[int], size: int, channels: int) -> dict[str, Any]:
    """Sizes, channels, mean and std of images."""
    scales: dict[str, int] = {}
    seen = _mapped(lambda i: _seen(source, i, None), rows, source)
    for _, _, kind, scale in seen:
        if kind:
            scales[kind] = max(scale, scales.get(kind, 1))
    sizes = sorted((one[0] for one in seen), key=lambda one: (one[0] * one[1], one))
    channels = channels or (3 if any(one[1] for one in seen) else 1)
    size = size or min(_LARGEST, min(sizes[len(sizes) // 2]))

    def moments(i: int) -> np.ndarray:
        image: Any = read(source, "train", i, scales)[0]
        return _moments(square(image, size, channels) / 255)

    return {
        "sizes": (sizes[0], sizes[len(sizes) // 2], sizes[-1]),
        "channels": channels,
        **_mean_and_std(_mapped(moments, rows, source)),
    }


def _seen(source: Source, i: int, scales: None) -> tuple[tuple[int, int], bool, str, int]:
    image, found = read(source, "train", i, scales)
    assert isinstance(image, Image.Image)
    return (image.height, image.width), COLOUR in found.changes, found.kind, found.scale


def _of_arrays(source: Source, rows: list[int]) -> dict[str, Any]:
    """Mean and std of arrays: of each index of the first axis, or where these are many, of all."""
    form = source.form
    assert form is not None
    found: dict[str, Any] = {"sizes": (), "channels": form.shape[0], "mean": (), "std": ()}
    if form.dtype == "int32":
        return found
    by = form.shape[0] if form.shape[0] <= _MOST_MEANS else 1

    def moments(i: int) -> np.ndarray:
        return _moments(np.asarray(read(source, "train", i)[0], np.float64).reshape(by, -1))

    return found | _mean_and_std(_mapped(moments, rows, source))


def _moments(array: np.ndarray) -> np.ndarray:
    """Mean and mean of squares by the first axis: float64 (2, channels)."""
    flat = array.reshape(len(array), -1)
    return np.stack([flat.mean(1), (flat**2).mean(1)])


def _mean_and_std(moments: list[np.ndarray]) -> dict[str, tuple[float, ...]]:
    """To four digits. What never changes has a deviation of 1, so that it can be divided by."""
    mean, square_mean = np.mean(moments, 0)
    std = np.sqrt(np.maximum(square_mean - mean**2, 0))
    std[std <= 1e-7 * (1 + np.abs(mean))] = 1
    pairs = {"mean": mean.tolist(), "std": std.tolist()}
    return {name: tuple(float(f"{one:.4g}") for one in values) for name, values in pairs.items()}


def _mapped(look_at: Any, rows: list[int], source: Source) -> list[Any]:
    """What a function gives for the samples that are not broken. Raises DataError: all are."""
    last: list[BrokenImage] = []

    def one(i: int) -> Any:
        try:
            return look_at(i)
        except BrokenImage as error:
            last.append(error)
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [each for each in pool.map(one, rows) if each is not None]
    if not found:
        raise DataError(f"{source.title}: all {len(rows)} samples looked at are broken: {last[0]}")
    return found
