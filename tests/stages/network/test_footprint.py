"""The arithmetic of peak memory against tensors that were counted."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from footprints import CPU, coded, stepped

from strata.pipeline.recipe.augmentation import cached_size
from strata.pipeline.recipe.builtin import text_of
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.stages.memory import watched
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.network.footprint import applying, solving
from strata.stages.network.network import build, build_problem
from strata.stages.network.spec import AuxiliarySpec, LayerSpec


def narrowed(name: str, width: int) -> Recipe:
    """A recipe's network with fewer channels."""
    _, text, _ = text_of(name)
    network: Any = parse(text, name).network
    before = f"width = {network.width}"
    return parse(text.replace(before, f"width = {width}"), name)


@pytest.mark.parametrize(
    ("name", "width", "batch", "accumulate", "compute"),
    [
        ("cifar10-small", 64, 128, 1, "float32"),  # activations count most
        ("cifar10-k1", 64, 4, 1, "float32"),  # weights count most
        ("cifar10-k3", 64, 16, 4, "float32"),
        ("cifar10-k2", 32, 8, 2, "bfloat16"),
        ("digits", 16, 64, 1, "float32"),
        ("vgg11-small", 16, 16, 1, "float32"),
        ("vgg11-small", 16, 4, 1, "bfloat16"),
    ],
)
def test_a_step_takes_what_was_predicted(
    name: str, width: int, batch: int, accumulate: int, compute: str
) -> None:
    recipe = narrowed(name, width)
    for j, (layer, auxiliary) in enumerate(
        zip(recipe.layers, recipe.auxiliaries, strict=True), start=1
    ):
        shape = recipe.shape(j - 1, recipe.augment.crop)
        problem = build_problem(layer, auxiliary, 0)
        measured = stepped(problem, shape, batch, accumulate, getattr(torch, compute))
        micro = -(-batch // accumulate)
        found = solving(
            layer,
            auxiliary,
            shape,
            batch=batch,
            micro=micro,
            divided=accumulate > 1,
            compute=compute,
        )
        assert found == pytest.approx(measured, rel=0.04), f"layer {j}"


@pytest.mark.parametrize(("name", "accumulate"), [("cifar10-k3", 1), ("digits", 2)])
def test_a_classifier_alone_takes_what_was_predicted(name: str, accumulate: int) -> None:
    recipe, batch = narrowed(name, 32), 16
    auxiliary = recipe.auxiliaries[-1]
    shape = recipe.shape(len(recipe.layers), recipe.augment.crop)
    problem = build([auxiliary], 0)[0]
    measured = stepped(problem, shape, batch, accumulate, torch.float32)
    micro, divided = -(-batch // accumulate), accumulate > 1
    found = solving(None, auxiliary, shape, batch=batch, micro=micro, divided=divided)
    assert found == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_p_several_times_holds_two_of_its_outputs(times: int) -> None:
    """As in a stem: x, and what one P gives the next; more than the narrow convolution makes."""
    layer, auxiliary = (
        LayerSpec(1, 3, 8, times, False, True),
        AuxiliarySpec(8, 1, 0, 10, False, True),
    )
    shape, rows = (3, 64, 64), 16
    measured = stepped(build_problem(layer, auxiliary, 0), shape, rows, 1, torch.float32)
    step = solving(layer, auxiliary, shape, batch=rows, micro=rows, divided=False)
    assert step == pytest.approx(measured, rel=0.04)
    frozen = Frozen(build_problem(layer, auxiliary, 0).layer.eval(), coded("float32", 8))
    x = torch.zeros(rows, *shape)
    with watched(CPU, [x, *frozen.layer.parameters()]) as peak:
        featurize([frozen], x, block=rows, compute=torch.float32, encode=True)
    found = applying([layer], shape, block=rows, images=True)
    assert found == pytest.approx(peak.nbytes, rel=0.04)


@pytest.mark.parametrize("precision", ["float32", "float16", "uint8"])
@pytest.mark.parametrize(
    ("name", "width", "count"),
    [("cifar10-small", 32, 3), ("cifar10-k1", 16, 5), ("vgg11-small", 16, 4)],
)
def test_a_forward_pass_takes_what_was_predicted(
    name: str, width: int, count: int, precision: str
) -> None:
    recipe, block = narrowed(name, width), 64
    layers = [
        Frozen(build_problem(layer, auxiliary, 0).layer.eval(), coded(precision, layer.width))
        for layer, auxiliary in zip(recipe.layers, recipe.auxiliaries, strict=True)
    ]
    for first, last in combinations(range(count + 1), 2):
        some, shape = layers[first:last], recipe.shape(first, cached_size(recipe))
        weights = [p for frozen in some for p in frozen.layer.parameters()]
        x = stored = torch.zeros(block, *shape)
        if first:
            stored = layers[first - 1].stored.encode(x)
            x = layers[first - 1].stored.decode(stored, shape[0])
        with watched(CPU, [stored, x, *weights]) as peak:
            featurize(some, x, block=block, compute=torch.float32, encode=True)
        specs = recipe.layers[first:last]
        found = applying(specs, shape, block=block, precision=precision, images=first == 0)
        assert found == pytest.approx(peak.nbytes, rel=0.15), f"x_{first} to x_{last}"
