"""The small twins of the paper's recipes: of the same form, and each runs from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import noise
from runs import Place

from strata.pipeline.plan.plan import make_plan
from strata.pipeline.recipe.builtin import load, text_of
from strata.pipeline.recipe.recipe import Recipe
from strata.store.feature_store import open_level

TWINS = {
    "cifar10-k1": "cifar10-k1-small",
    "cifar10-k2": "cifar10-k2-small",
    "cifar10-k3": "cifar10-k3-small",
    "cifar10-k3-compress": "cifar10-k3-compress-small",
    "imagenet-k3": "imagenet-small",
    "separability-k1-m64": "separability-small",
    "vgg11": "vgg11-small",
}


def form(recipe: Recipe) -> tuple[object, ...]:
    """What widths, sizes and schedules have no part in."""
    n: Any = recipe.network
    a = recipe.auxiliary
    relative = [layer.width / n.width for layer in recipe.layers]
    return (
        *(n.layers, n.downsample, n.pool, n.batch_norm, n.bias, relative),
        *(a.k, a.batch_norm, a.bias, a.half_resolution, len(a.final_hidden)),
        recipe.compress and (recipe.compress.keep, recipe.compress.rounds),
    )


@pytest.mark.parametrize(("large", "small"), TWINS.items())
def test_a_twin_has_the_form_of_the_paper(large: str, small: str) -> None:
    (_, paper), (_, twin) = load(large), load(small)
    assert form(twin) == form(paper)
    widths: list[Any] = [twin.network, paper.network]
    assert widths[0].width < widths[1].width
    assert make_plan(twin).total < 10e9
    assert twin.schedule.epochs <= 6


@pytest.mark.parametrize("name", TWINS.values())
def test_a_twin_runs(tmp_path: Path, name: str) -> None:
    """Solved, written, evaluated on a few images, with as many bytes as planned."""
    _, recipe = load(name)
    images = noise(0, 36, recipe.data.size, recipe.data.size, 3)
    labels = np.arange(36) % 10
    parts = {"x_train": images[:24], "y_train": labels[:24]}
    np.savez(tmp_path / "few.npz", **parts, x_test=images[24:], y_test=labels[24:])
    text = text_of(name)[1].replace(f"epochs = {recipe.schedule.epochs}", "epochs = 1")
    (tmp_path / "tiny.toml").write_text(text)
    place, depth = Place(tmp_path), len(recipe.layers)
    said = place.do("run", "--data", f"npz:{tmp_path / 'few.npz'}", "--accept-data")
    assert said.rc == 0, said.err
    assert len(place.do("evaluate", "--json").json["layers"]) == depth
    planned = make_plan(recipe, {"train": 24, "test": 12}).depths
    for d in planned[1:-1]:
        for level, nbytes in d.levels.items():
            found = open_level(place.level(d.depth, level))
            assert found.geometry.sample == d.shape
            assert found.nbytes == nbytes
    assert not list(place.store.glob(f"x_{depth}-*")), "no problem reads it"
