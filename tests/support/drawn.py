"""Small data sets drawn for the tests of the images, and what to ask of a source."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strata.stages.data.images import square, survey
from strata.stages.data.opening import open_source
from strata.stages.data.sources import SPLITS, Source
from strata.stages.data.values import plain
from strata.stages.errors import DataError

SIZE = 12


@dataclass(frozen=True)
class Form:
    """What a recipe says of samples."""

    shape: tuple[int, ...] = (4, 3)
    dtype: str = "float32"
    targets: str = "sample"
    classes: int = 3
    split: float = 0.0
    split_seed: int = 0


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(
    image: Image.Image, size: int, channels: int, scales: Mapping[str, int] | None = None
) -> np.ndarray:
    """uint8 (channels, size, size) of an image of any mode, as a run reads it."""
    return square(plain(image, scales or {})[0], size, channels)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def pets(root: Path) -> Path:
    """Two classes, four images each to train on and two to test with, as JPEG and PNG."""
    for number, kind in enumerate(("cat", "dog")):
        for split, count in (("train", 4), ("test", 2)):
            for i in range(count):
                suffix = "png" if i % 2 else "JPG"
                image = Image.fromarray(noise(10 * number + i, SIZE, SIZE, 3))
                save(root / split / kind / f"{i}.{suffix}", image)
    return root


def opened(path: Path | str, form: str = "imagefolder") -> Source:
    return open_source(f"{form}:{path}", root=Path("nowhere"))


def pack(folder: Path, path: Path, mode: str, lead: str = "") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=lead or ".")
    return path


def facts(source: Source) -> tuple[object, ...]:
    """Everything about a source that must not depend on how it is stored."""
    with closing(source):
        names = [source.name(split, i) for split in SPLITS for i in range(source.count(split))]
        images = [
            pixels(source.image(split, i), 8, 3).tobytes()
            for split in SPLITS
            for i in range(source.count(split))
        ]
        labels = {split: source.labels(split).tolist() for split in SPLITS}
        return source.classes, names, labels, images, survey(source, skip_broken=False).digest


def refusal(path: Path | str, form: str = "imagefolder") -> str:
    with pytest.raises(DataError) as caught:
        opened(path, form).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)
