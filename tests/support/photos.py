"""Small drawn JPEGs in class folders, and data sets and modules of a caller's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import noise
from PIL import Image
from torch import Tensor, nn


def photos(root: Path, count: int = 12, side: int = 8) -> Path:
    """So many JPEGs of two classes."""
    for i in range(count):
        place = root / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, side, side, 3)).save(place / f"{i:04d}.jpg", quality=95)
    return root


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Photos:
    """A map-style data set that names a folder, and reads a file for every sample."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.files = sorted(str(path) for path in root.rglob("*.jpg"))
        self.reads = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        self.reads += 1
        with Image.open(self.files[i]) as image:
            return image.convert("RGB"), int("dog" in self.files[i])

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "files": self.files}


class Rows:
    """A map-style data set in memory: rows of values, and a label of each."""

    def __init__(self, count: int = 50, *shape: int, labels: Any = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, *(shape or (6,)), generator=generator)
        self.y = list(range(count)) if labels is None else labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.x[i], self.y[i]


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module with weights from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def convolution(seed: int = 0, side: int = 2) -> nn.Module:
    """From images to maps (4, side, side)."""
    with torch.random.fork_rng(devices=[]):
        parts = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(side)
    return drawn(nn.Sequential(*parts), seed)


def linear(inputs: int = 6, outputs: int = 5, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return drawn(nn.Linear(inputs, outputs), seed)
