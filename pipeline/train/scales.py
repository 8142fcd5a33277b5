"""Scales of x_j, chosen when layer j is solved, from what a level of x_j will hold.

They are part of x_j as the weights are: its fingerprint names them, and they are kept in the run,
so that a level that was removed is made again with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from strata.pipeline.feed.features import Features, features, level_draws, naming_rows
from strata.pipeline.plan.costs import SCALE_ROWS, level_geometry
from strata.pipeline.recipe import augmentation
from strata.pipeline.run import record, weights
from strata.pipeline.run.device import available_memory
from strata.pipeline.run.rundir import QUANTISER
from strata.pipeline.run.session import Session
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Floats, needs_scales
from strata.stages.network.featurize import Frozen, featurize
from strata.store.read.order import generator, parts
from strata.store.read.rows import Rows

REPORT = "quantiser.json"
SHARE = 0.25
"""Of the memory that is free, for what a chain of layers is calibrated on."""
Held = dict[int, list[Tensor]]
"""The calibration rows of one depth, as they are stored, in the host's memory."""


def keep(
    session: Session,
    j: int,
    layer: nn.Module,
    below: Features | None = None,
    held: Held | None = None,
) -> dict[str, Any]:
    """Choose the scales of x_j, keep them in the run, and say how good they are.

    Args:
        layer: layer j as solved, on the device, in eval mode.
        below: x_{j-1} of the training images; None: they are opened if they are needed.
        held: kept from one layer of a chain to the next, so that n layers without levels in
            between take 2 · n passes, not n² / 2; empty at first.

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
    maps = _maps(session, layer, below, held)
    found = calibrate(maps, cache.precision, cache.percentile, axis)
    directory = session.run.layer_directory(j)
    weights.write(directory / QUANTISER, found.quantiser.tensors())
    record.write(directory / REPORT, {"channels": found.as_json()})
    session.report.say(f"x_{j} as {found.text}")
    return {"scales": weights.digest(found.quantiser.tensors()), "quantiser": found.summary()}


def _maps(
    session: Session, layer: nn.Module, below: Features, held: Held | None
) -> Iterator[Tensor]:
    """x_j before rounding, of a fixed part of the training rows, as the first view holds it: a
    whole canvas in canvas mode; in fresh mode, which has no view, the centre crop."""
    recipe, exact = session.run.recipe, Frozen(layer, Floats("float32"))
    ids = session.images()["train"].array("sample_id")
    view, depth = (*augmentation.train_views(recipe), "clean")[0], below.base + len(below.layers)
    chosen = generator("calibration rows", session.run.seed).permutation(len(ids))[:SCALE_ROWS]
    blocks = parts(np.sort(chosen), recipe.cache.block)
    label = f"x_{depth + 1} train" if view == "clean" else f"x_{depth + 1} train.{view}"
    room = SHARE * (session.options.memory_budget or available_memory())
    fits = level_geometry(recipe, depth, len(chosen)).nbytes <= room
    kept: list[Tensor] = []
    for rows, x in zip(blocks, _inputs(below, view, blocks, ids, held or {}), strict=True):
        with naming_rows(label, "train", rows, ids):
            yield featurize([exact], x, block=recipe.cache.block, compute=session.compute)
        if held is not None and below.layers and fits:
            kept.append(below.layers[-1].stored.encode(x).cpu())
    if held is not None and kept:
        held.clear()
        held[depth] = kept


def _inputs(
    below: Features, view: str, blocks: list[np.ndarray], ids: np.ndarray, held: Held
) -> Iterator[Tensor]:
    """x_{j-1} of blocks of rows: from the depth that is held, or from a level above it."""
    session, base = below.session, below.base
    recipe = session.run.recipe
    if at := next((d for d in held if base < d <= base + len(below.layers)), 0):
        features = level_geometry(recipe, at, 1).features
        for stored in held[at]:
            x = below.layers[at - base - 1].stored.decode(stored.to(session.device), features)
            above = below.layers[at - base :]
            yield featurize(above, x, block=recipe.cache.block, compute=session.compute)
        return
    draws = level_draws(recipe, session.run.seed, view, int(ids.max()) + 1)
    lengths = [len(rows) for rows in blocks]
    with below.delivery([view], once=True) as delivery:
        batches = delivery.batches(Rows.of(np.concatenate(blocks)), lengths)
        for rows, stored in zip(blocks, batches, strict=True):
            yield below.values(stored, draws.of(ids[rows]))
