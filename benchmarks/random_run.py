"""Runs of built-in recipes on random images, one epoch per layer: real levels, soon made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import CPU

from checkout import ROOT
from strata.pipeline.options import Options
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.run import device as devices
from strata.pipeline.run import rundir
from strata.pipeline.run.session import Session
from strata.store.feature_store import Store

RECIPES = ROOT / "pipeline/recipe/builtin"


def make_run(
    place: Path,
    name: str,
    *,
    train: int,
    test: int,
    canvas: bool = False,
    device: torch.device = CPU,
    tier: str = "auto",
    width: int | None = None,
) -> Session:
    """
    Args:
        train, test: numbers of images.
        canvas: cached canvases, as the recipe may say; False draws afresh, and writes test features
            alone.
        width: of the network, if not the recipe's.
    """
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 10
    np.savez(place / "images.npz", **arrays)
    text = (RECIPES / f"{name}.toml").read_text("utf-8")
    if not canvas:
        text = text.replace('views = "canvas"', "views = 0")
    if width:
        text = text.replace(f"\nwidth = {parse(text, name).network.width} ", f"\nwidth = {width} ")
    epochs = f"epochs = {parse(text, name).schedule.epochs}"
    text = text.replace(epochs, "epochs = 1")
    facts = {"compute": "float32", **devices.facts(device)}
    run = rundir.create(place / "run", name, text, 0, f"npz:{place / 'images.npz'}", facts)
    return Session(
        run, Store(place / "store"), device, options=Options(tier=tier, accept_data=True)
    )
