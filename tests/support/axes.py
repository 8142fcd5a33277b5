"""A network whose x_1 … x_5 are samples of every other form than maps, and a run of it."""

from __future__ import annotations

from pathlib import Path

from networks import beside, named

FORMS_CODE = '''
"""Images as tokens, as a grid of them, as a volume, as a series, as a vector: a block each."""

import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(1, 12, 2, stride=2), nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(self.patches(x).flatten(2).transpose(1, 2))


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 9), nn.LayerNorm(9)

    def forward(self, x):
        return torch.relu(self.norm(self.linear(x))).unflatten(1, (4, 4))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv3d(3, 6, 3, padding=1), nn.BatchNorm3d(6)

    def forward(self, x):
        return torch.relu(self.norm(self.convolution(x.permute(0, 3, 1, 2).unflatten(1, (3, 3)))))


class Series(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(6, 7, 3, stride=2), nn.BatchNorm1d(7)

    def forward(self, x):
        return torch.relu(self.norm(self.convolution(x.flatten(2))))


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 11)

    def forward(self, x):
        return torch.relu(self.linear(x.mean(2)))


def blocks():
    return [Tokens(), Grid(), Volume(), Series(), Vector()]
'''
AXES = {
    1: ((16, 12), ("token", "feature")),
    2: ((4, 4, 9), ("height", "width", "channel")),
    3: ((6, 3, 4, 4), ("channel", "depth", "height", "width")),
    4: ((7, 23), ("channel", "time")),
    5: ((11,), ("feature",)),
}
"""Shape of x_j and names of its axes."""


def forms(place: Path, precision: str, **changes: object) -> str:
    """TOML of a recipe of that network, whose file is written beside."""
    beside(place, FORMS_CODE, "forms.py")
    changes = {"views": 4, "epochs": 1, "precision": precision} | changes
    return named('"forms.py:blocks"', **changes)
