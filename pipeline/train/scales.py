"""Scales of x_j, chosen when layer j is solved, from what a level of x_j will hold.

They are part of x_j as the weights are: its fingerprint names them, and they are kept in the run,
so that a level that was removed is made again with the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from strata.pipeline.feed.features import Features, features, level_draws, naming_rows
from strata.pipeline.plan.costs import SCALE_ROWS
from strata.pipeline.recipe import augmentation
from strata.pipeline.run import record, weights
from strata.pipeline.run.rundir import QUANTISER
from strata.pipeline.run.session import Session
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Floats, needs_scales
from strata.stages.network.featurize import Frozen
from strata.store.read.order import cut, generator
from strata.store.read.rows import Rows

REPORT = "quantiser.json"


def keep(
    session: Session, j: int, layer: nn.Module, below: Features | None = None
) -> dict[str, Any]:
    """Choose the scales of x_j, keep them in the run, and say how good they are.

    Args:
        layer: layer j as solved, on the device, in eval mode.
        below: x_{j-1} of the training images; None: they are opened if they are needed.

    Returns:
        For the layer's record: ``scales``, their digest, and ``quantiser``, a summary of their
        quality; None for a precision that needs none.

    Raises:
        NotFinite: names row, sample and channel.
    """
    cache = session.run.recipe.cache
    if not needs_scales(cache.precision):
        return {"scales": None, "quantiser": None}
    axis = session.geometry(j, "train").axis
    below = below or features(session, j - 1, "train")
    found = calibrate(_maps(session, j, layer, below), cache.precision, cache.percentile, axis)
    directory = session.run.layer_directory(j)
    weights.write(directory / QUANTISER, found.quantiser.tensors())
    record.write(directory / REPORT, {"channels": found.as_json()})
    session.report.say(f"x_{j} as {found.text}")
    return {"scales": weights.digest(found.quantiser.tensors()), "quantiser": found.summary()}


def _maps(session: Session, j: int, layer: nn.Module, below: Features) -> Iterator[Tensor]:
    """x_j before rounding, of a fixed part of the training rows, as the first view holds it: a
    whole canvas in canvas mode; in fresh mode, which has no view, the centre crop."""
    recipe, seed = session.run.recipe, session.run.seed
    ids = session.images()["train"].array("sample_id")
    view = (*augmentation.train_views(recipe), "clean")[0]
    draws = level_draws(recipe, seed, view, int(ids.max()) + 1)
    exact = dataclasses.replace(below, layers=[*below.layers, Frozen(layer, Floats("float32"))])
    chosen = np.sort(generator("calibration rows", seed).permutation(len(ids))[:SCALE_ROWS])
    lengths = cut(len(chosen), recipe.cache.block)
    label = f"x_{j} train" if view == "clean" else f"x_{j} train.{view}"
    with below.delivery([view], once=True) as delivery:
        parts = np.split(chosen, np.cumsum(lengths)[:-1])
        for rows, stored in zip(parts, delivery.batches(Rows.of(chosen), lengths), strict=True):
            with naming_rows(label, "train", rows, ids):
                x = exact.values(stored, draws.of(ids[rows]))
            yield x
