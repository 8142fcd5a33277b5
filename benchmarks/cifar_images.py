"""The first images of every class of CIFAR-10 (JPEG), as one .npz that a run can read."""

from __future__ import annotations

import os
import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = 10


def archive() -> Path:
    """All of CIFAR-10 (JPEG), a tar of class folders."""
    path = Path(os.environ.get("STRATA_TEST_DATA", "")) / "cifar10-jpeg.tar.xz"
    if not path.is_file():
        raise SystemExit(f"no {path.name}: let STRATA_TEST_DATA name the folder that holds it")
    return path


def images(place: Path, train: int, test: int) -> Path:
    """Written once.

    Args:
        train, test: images of each split, as many of every class.
    """
    path = place / f"cifar-{train}-{test}.npz"
    if path.exists():
        return path
    arrays: dict[str, list[Any]] = {f"{a}_{s}": [] for a in "xy" for s in ("train", "test")}
    most, classes = {"train": train // CLASSES, "test": test // CLASSES}, {}
    with tarfile.open(archive()) as tar:
        for member in tar:
            found = re.search(r"(train|test)/([^/]+)/(\d+)\.jpg$", member.name)
            if not found or int(found[3]) >= most[found[1]]:
                continue
            data = tar.extractfile(member)
            assert data is not None
            split = found[1]
            arrays[f"x_{split}"].append(np.asarray(Image.open(BytesIO(data.read())).convert("RGB")))
            arrays[f"y_{split}"].append(classes.setdefault(found[2], len(classes)))
    np.savez(path, **{name: np.array(values) for name, values in arrays.items()})
    return path
