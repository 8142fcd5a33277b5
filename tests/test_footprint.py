"""The arithmetic of peak memory against tensors that were counted."""

from __future__ import annotations

import pytest
import torch

from pipeline.recipe import Recipe, parse
from pipeline.recipes import text_of
from stages.featurize import Frozen, featurize
from stages.footprint import applying, solving
from stages.memory import watched
from stages.network import build_problem
from stages.quantise import Floats
from stages.solve import WATCHED_STEPS, Schedule, Solver

CPU = torch.device("cpu")


def narrowed(name: str, width: int) -> Recipe:
    """A recipe's network with fewer channels."""
    _, text = text_of(name)
    before = f"width = {parse(text, name).network.width}"
    return parse(text.replace(before, f"width = {width}"), name)


def stepped(recipe: Recipe, j: int, batch: int, accumulate: int, compute: torch.dtype) -> int:
    """Peak bytes of two steps, as a run measures them."""
    schedule = Schedule("step", 2, batch, 0.1, 0.9, 5e-4, accumulate=accumulate)
    problem = build_problem(recipe.layers[j - 1], recipe.auxiliaries[j - 1], 0)
    solver = Solver(problem, schedule, CPU, compute)
    shape = recipe.shape(j - 1, recipe.augment.crop)
    generator = torch.Generator().manual_seed(0)

    def batches():
        for _ in range(WATCHED_STEPS):
            x = torch.randn(batch, *shape, generator=generator)
            yield x.contiguous(memory_format=torch.channels_last), torch.zeros(batch).long()

    peaks = []
    solver.run_epoch(batches(), WATCHED_STEPS, lambda n: peaks.append(solver.progress.peak_bytes))
    return peaks[-1]


@pytest.mark.parametrize(
    ("name", "width", "batch", "accumulate", "compute"),
    [
        ("cifar10-small", 64, 128, 1, "float32"),  # activations count most
        ("cifar10-k1", 64, 4, 1, "float32"),  # weights count most
        ("cifar10-k3", 64, 16, 4, "float32"),
        ("cifar10-k2", 32, 8, 2, "bfloat16"),
        ("digits", 16, 64, 1, "float32"),
    ],
)
def test_a_step_takes_what_was_predicted(
    name: str, width: int, batch: int, accumulate: int, compute: str
) -> None:
    recipe = narrowed(name, width)
    for j, (layer, auxiliary) in enumerate(
        zip(recipe.layers, recipe.auxiliaries, strict=True), start=1
    ):
        measured = stepped(recipe, j, batch, accumulate, getattr(torch, compute))
        shape = recipe.shape(j - 1, recipe.augment.crop)
        micro = -(-batch // accumulate)
        found = solving(layer, auxiliary, shape, batch=batch, micro=micro, compute=compute)
        assert found == pytest.approx(measured, rel=0.04), f"layer {j}"


@pytest.mark.parametrize(("name", "width"), [("cifar10-small", 64), ("cifar10-k1", 32)])
def test_a_forward_pass_takes_what_was_predicted(name: str, width: int) -> None:
    recipe, block = narrowed(name, width), 64
    stored = Floats("float16")
    layers = [
        Frozen(build_problem(layer, auxiliary, 0).layer.eval(), stored)
        for layer, auxiliary in zip(recipe.layers, recipe.auxiliaries, strict=True)
    ]
    for first in range(len(layers)):
        shape = recipe.shape(first, 40)
        x = torch.zeros(block, *shape)
        for last in range(first, len(layers)):
            some = layers[first : last + 1]
            weights = [p for frozen in some for p in frozen.layer.parameters()]
            with watched(CPU, weights) as peak:
                featurize(some, x, block=block, compute=torch.float32)
            found = applying(recipe.layers[first : last + 1], shape, block=block)
            assert found == pytest.approx(peak.nbytes, rel=0.04), f"x_{first} to x_{last + 1}"
