"""What made a level, field by field, and the fingerprint that names it.

A fingerprint chains to that of the level below, so one changed weight, image byte or constant gives
every level above it another name. What could not change the values is left out: paths, dates,
machine names, the number of views (a view can be added without touching the others).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.named_function import said
from strata.pipeline.recipe.network import DRAWS, without_later_defaults
from strata.pipeline.recipe.recipe import Recipe
from strata.stages.network.spec import described
from strata.store.fingerprint import fingerprint

IMAGES_VERSION = 1
"""Raise when the same files give other x_0 bytes (decoding, resizing, order of rows)."""
FEATURES_VERSION = 1
"""Raise when the same weights and x_{j-1} give other x_j bytes."""


@dataclass(frozen=True)
class Node:
    """One depth of a lineage."""

    depth: int
    intent: dict[str, Any]
    """Every input of the fingerprint, readable."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.intent)


def images_node(recipe: Recipe, data_digest: str) -> Node:
    """x_0: the images, decoded, resized, or other arrays, in the order of rows that every level
    above keeps."""
    data = recipe.data
    form: dict[str, Any] = {"size": data.size, "channels": data.channels}
    if data.shape:
        form = {"shape": list(data.shape), "dtype": data.dtype}
    return Node(0, {"depth": 0, "data": data_digest, **form, "code": IMAGES_VERSION})


def feature_node(
    recipe: Recipe, seed: int, compute: str, parent: Node, weights: str, scales: str | None
) -> Node:
    """x_j from x_{j-1}.

    Args:
        compute: dtype of the convolutions, e.g. ``float32``.
        weights: digest of layer j's state, buffers included.
        scales: digest of x_j's quantiser; None for a precision that has none.
    """
    depth = parent.depth + 1
    intent = {
        "depth": depth,
        "parent": parent.fingerprint,
        "layer": described(recipe.layers[depth - 1]),
        "weights": weights,
        "precision": recipe.cache.precision,
        "scales": scales,
        "numeric": {"compute": compute, "block": recipe.cache.block},
        "code": FEATURES_VERSION,
    }
    if depth == 1:
        intent["preprocessing"] = _preprocessing(recipe, seed)
    return Node(depth, intent)


def _preprocessing(recipe: Recipe, seed: int) -> dict[str, Any]:
    a, mode = recipe.augment, augmentation.mode(recipe)
    common: dict[str, Any] = {"mean": list(recipe.data.mean), "std": list(recipe.data.std)}
    if recipe.data.shape:
        return common
    common |= {"pad": a.pad, "mode": mode}
    if recipe.data.jpeg:
        common["jpeg"] = recipe.data.jpeg
    if mode == "canvas":
        return common
    crops = common | {"crop": a.crop, "flip": a.flip, "seed": seed if mode == "fixed" else None}
    if mode == "fixed":  # a view is named by its number; its draws follow from the seed, and these
        crops |= {k: v for k, v in without_later_defaults(a).items() if k in DRAWS}
        return crops | ({"transform": said(a.transform)} if a.transform else {})
    return crops
