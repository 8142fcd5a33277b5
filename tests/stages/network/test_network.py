"""The architecture (paper Eq. 1 and 2): arithmetic in spec.py against the modules themselves."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import examples
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from strata.pipeline.recipe.builtin import load, names
from strata.pipeline.recipe.network import AuxiliaryTable, NetworkTable
from strata.stages.network.blocks import scale_at
from strata.stages.network.network import Layer, build, build_problem, compared
from strata.stages.network.spec import AuxiliarySpec, LayerSpec

ON_META = [pytest.param(name, id=name) for name in names() if name != "digits-vit"]
"""Classifiers of tokens turn autocast off, which there is none of on meta."""


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=examples(25), deadline=None)
def test_p_is_a_bijection_that_keeps_every_value(times: int, channels: int, side: int) -> None:
    """P reorganises channels into decimated copies (Dinh et al. 2017): nothing is lost."""
    with torch.device("meta"):
        p = Layer(LayerSpec(1, channels, 4, times, False, True)).downsample
    x = seeded(2, channels, side * 2**times, side * 2**times)
    y = p(x)
    assert y.shape == (2, channels * 4**times, side, side)
    back = y
    for _ in range(times):
        back = nn.functional.pixel_shuffle(back, 2)
    assert torch.equal(back, x)


def test_p_gives_the_four_decimated_copies() -> None:
    """The first of the four copies of a channel is every other pixel from the first."""
    with torch.device("meta"):
        p = Layer(LayerSpec(1, 3, 4, 1, False, True)).downsample
    x = seeded(1, 3, 8, 8)
    copies = p(x).view(1, 3, 4, 4, 4)
    for n, (dy, dx) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(copies[:, :, n], x[:, :, dy::2, dx::2])


@pytest.mark.parametrize("side", [2, 3, 7, 8, 14])
def test_a_averages_the_four_quadrants(side: int) -> None:
    """A x is 2×2 whatever the size; for even sizes each value is the mean of one quadrant."""
    auxiliary = build([AuxiliarySpec(3, 1, 0, 10, False, True)], None)[0]
    x = seeded(2, 3, side, side)
    averaged = auxiliary.average(x)
    assert averaged.shape == (2, 3, 2, 2)
    if side % 2 == 0:
        half = side // 2
        expected = x[:, :, :half, half:].mean((2, 3))
        torch.testing.assert_close(averaged[:, :, 0, 1], expected)


@pytest.mark.parametrize("name", ON_META)
def test_planned_shapes_and_parameters_are_the_modules(name: str) -> None:
    _, recipe = load(name)
    for size in (recipe.augment.crop, recipe.canvas):
        x = torch.empty(2, recipe.data.channels, size, size, device="meta")
        for j, (spec, aux) in enumerate(zip(recipe.layers, recipe.auxiliaries, strict=True), 1):
            layer = build([spec], None)[0].to("meta")
            auxiliary = build([aux], None)[0].to("meta")
            x = layer(x)
            assert tuple(x.shape[1:]) == recipe.shape(j, size)
            if size == recipe.augment.crop or not aux.hidden:
                assert auxiliary(x).shape == (2, recipe.data.classes)
            assert sum(p.numel() for p in layer.parameters()) == spec.parameters
            assert sum(p.numel() for p in auxiliary.parameters()) == aux.parameters


@pytest.mark.parametrize("name", ON_META)
def test_planned_operations_are_what_torch_counts(name: str) -> None:
    _, recipe = load(name)
    for j, (spec, aux) in enumerate(zip(recipe.layers, recipe.auxiliaries, strict=True), 1):
        inputs = recipe.shape(j - 1, recipe.augment.crop)
        problem = build_problem(spec, aux, None).to("meta").eval()
        with FlopCounterMode(display=False) as counter:
            x = torch.empty(2, *inputs, device="meta")
            compared(problem, x, torch.zeros(2, dtype=torch.int64, device="meta"))
        planned = spec.operations(inputs) + aux.operations(spec.output(inputs))
        between_samples = 2 * (aux.inputs + aux.classes) * 2 if aux.similarity else 0
        assert counter.get_total_flops() == 2 * (2 * planned + between_samples)


def test_numbering_is_the_papers() -> None:
    """downsample = [2, 3]: x_2 and x_3 are downsampled, so layers 3 and 4 begin with P and double.

    CIFAR-10, k = 1: widths 256, 256, 512, 1024, 1024 at 32, 32, 16, 8, 8 pixels.
    """
    _, recipe = load("cifar10-k1")
    assert [layer.width for layer in recipe.layers] == [256, 256, 512, 1024, 1024]
    assert [recipe.shape(j, 32)[1] for j in range(1, 6)] == [32, 32, 16, 8, 8]
    layers: tuple[Any, ...] = recipe.layers
    assert [layer.downsamplings for layer in layers] == [0, 0, 1, 1, 0]
    assert [scale_at(recipe.layers, depth) for depth in range(6)] == [1, 1, 1, 2, 4, 4]


def test_auxiliary_width_doubles_with_the_layers_and_the_last_can_differ() -> None:
    layers = NetworkTable(3, 128, downsample=(1,), batch_norm=True, bias=False).specs((3, 32, 32))
    table = AuxiliaryTable(k=3, width=256, final_width=64, batch_norm=True)
    specs = table.specs(layers, classes=10, side=16)
    assert [s.width for s in specs] == [256, 512, 64]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_identity_layer_starts_at_the_previous_risk(k: int) -> None:
    """Prop. 3.1: with P = Id and θ̃ = identity, z_{j+1} = z_j, because ρ(x) = x for x ≥ 0."""
    first, second = NetworkTable(layers=2, width=8).specs((3, 8, 8))
    aux = AuxiliarySpec(8, k, 8, 10, False, True)
    before, after = build_problem(first, aux, 1).eval(), build_problem(second, aux, 2).eval()
    assert isinstance(after.layer, Layer)
    assert after.layer.convolution.bias is not None
    nn.init.dirac_(after.layer.convolution.weight)
    nn.init.zeros_(after.layer.convolution.bias)
    after.auxiliary.load_state_dict(before.auxiliary.state_dict())
    with torch.inference_mode():
        x1 = before.layer(seeded(16, 3, 8, 8))
        assert torch.equal(after.layer(x1), x1)
        assert torch.equal(after(x1), before.auxiliary(x1))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    layer, aux = LayerSpec(1, 3, 16, 0, True, True), AuxiliarySpec(16, 2, 16, 10, True, True)
    one, same, other = (build_problem(layer, aux, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["layer.convolution.weight"], other["layer.convolution.weight"])


@pytest.mark.global_rng
def test_initial_weights_are_distributed_as_pytorchs() -> None:
    """Same bound and same spread as nn.Conv2d's own initialisation."""
    layer, aux = LayerSpec(1, 8, 2048, 0, False, True), AuxiliarySpec(2048, 1, 0, 10, False, True)
    ours: Any = build_problem(layer, aux, 0).layer.convolution
    theirs = nn.Conv2d(8, 2048, 3)
    assert ours.bias is not None
    assert theirs.bias is not None
    for a, b in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.01)
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.1)
