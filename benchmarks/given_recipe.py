"""The recipe of given.py's runs, and what their records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPE = """
[data]
source = "npz:{images}"
classes = {classes}
channels = 3
size = {side}
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
train = {train}
test = {test}

[augment]
crop = {side}
views = {views}
{augment}

[network]
name = "{name}"
{given}

[auxiliary]
k = 1

[schedule]
kind = "one-cycle"
epochs = {epochs}
batch = 128
lr = 0.05
precision = "float32"

[cache]
precision = "{precision}"
"""
GIVEN = 'weights = "{}"\nfrozen = {}'


def recipe(place: Path, name: str, **facts: Any) -> Path:
    """A recipe in a file of its own; ``facts`` fill the text."""
    path, some = place / "given.toml", {"classes": 10, "augment": "flip = true", "epochs": 1}
    path.write_text(RECIPE.format(name=name, **some | facts), "utf-8")
    return path


def written(run: Path, j: int) -> float:
    """Seconds that all levels of x_j took."""
    found = json.loads((run / f"layer_{j}/features.json").read_text("utf-8"))
    return sum(level["seconds"] for level in found["body"]["levels"].values())
