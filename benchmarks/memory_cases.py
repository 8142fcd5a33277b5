"""Peak bytes of training one network in several ways: what memory.py and its GPU twin compare.

A case takes two steps of ``strata.stages.solve.solve.Solver``, since momentum is there from the
second on. Tensors are real, or have a shape and no content (torch's FakeTensorMode): then a peak
costs no memory and no arithmetic. tests/house/test_memory_cases.py shows that both count the same,
to the byte.

A step of 128 images in micro-batches of 1 has the peak that two micro-batches have, as long as the
other 126 rows lie beside them: so two are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import checkout  # noqa: F401
from strata.pipeline.recipe.network import AuxiliaryTable, NetworkTable
from strata.pipeline.recipe.recipe import Recipe
from strata.stages.memory import watched
from strata.stages.network.blocks import shape_at
from strata.stages.network.network import Auxiliary, Layer, Problem
from strata.stages.network.spec import AuxiliarySpec, LayerSpec
from strata.stages.solve.baseline import EndToEnd
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Batches, Solver

SIDE, CLASSES, STEPS = 32, 10, 2
STORED = torch.float16
"""Of a cached level's rows, which lie beside the batch that is made of them."""


@dataclass(frozen=True)
class Case:
    """One way to train."""

    layer: int | None
    """Greedy, layer j; None: end to end."""
    checkpointing: bool
    batch: int
    micro: int
    swapped: bool = False
    """End to end with gradients that go straight into the momentum, as layers are solved; or a
    layer with torch.optim.SGD, by which networks are trained end to end."""

    @property
    def straight(self) -> bool:
        return (self.layer is not None) != self.swapped

    @property
    def name(self) -> str:
        what = "end to end" if self.layer is None else f"greedy, layer {self.layer}"
        how = ", checkpointing" * self.checkpointing
        by = (", straight" if self.straight else ", torch.optim.SGD") * self.swapped
        return f"{what}{how}, {self.micro} of {self.batch}{by}"


@dataclass(frozen=True)
class Net:
    """A network, its auxiliary classifiers, and how much of a canvas a cached level holds."""

    layers: tuple[LayerSpec, ...]
    auxiliaries: tuple[AuxiliarySpec, ...]
    canvas: int = SIDE
    """Side of what is cached, in pixels of x_0."""

    @property
    def parameters(self) -> int:
        """Of what is trained end to end, and of what a greedy run ends with."""
        return sum(layer.parameters for layer in self.layers) + self.auxiliaries[-1].parameters


def net_of(recipe: Recipe) -> Net:
    return Net(recipe.layers, recipe.auxiliaries, recipe.canvas)


@dataclass(frozen=True)
class Family:
    """VGG-like networks: 3×3 layers in stages, twice as wide from stage to stage.

    No batch norm, as in `cifar10-k1`: so that a step in micro-batches is the same step.
    """

    stages: tuple[int, ...]
    """Layers of each stage; where depth grows, they are multiplied."""
    k: int
    width: int | None = None
    """Of the first stage; None: it grows, in eights."""

    @property
    def name(self) -> str:
        if self.width is not None:
            return f"depth grows, {len(self.stages)} stages of width {self.width}, k = {self.k}"
        return f"width grows, {'+'.join(map(str, self.stages))} layers, k = {self.k}"

    def net(self, size: int) -> Net:
        """The network of this size: eights of the first width, or multiples of the depth."""
        times, width = (1, 8 * size) if self.width is None else (size, self.width)
        ends = list(accumulate(times * each for each in self.stages))
        layers = NetworkTable(ends[-1], width, downsample=tuple(ends[:-1])).specs((3, SIDE, SIDE))
        side = shape_at(layers, len(layers), (3, SIDE, SIDE))[1]
        return Net(layers, AuxiliaryTable(self.k, width).specs(layers, CLASSES, side))


# ---- the peak of one case ------------------------------------------------------------------------


def peak_of_steps(solver: Solver[Any], batches: Batches) -> int:
    """Peak bytes of tensors while a solver takes steps: weights, gradients, momentum, activations,
    and the batches with what comes to light of their making."""
    solver.problem.train()
    with watched(solver.device, solver.tensors().values()) as found:
        for x, y in batches:
            solver.step(x, y)
    return found.nbytes


def peak(net: Net, case: Case, *, device: torch.device, fake: bool, micro_batches: int = 2) -> int:
    """Peak bytes of tensors over two steps, of which so many micro-batches are computed."""
    rows = min(case.batch, micro_batches * case.micro)
    if not fake:
        return _peak(net, case, device, rows)
    with FakeTensorMode(), Answers():
        return _peak(net, case, device, rows)


def _peak(net: Net, case: Case, device: torch.device, rows: int) -> int:
    depth = (case.layer or 1) - 1
    with torch.device(device):
        network = _network(net, case)
    schedule = SGDSchedule(
        "step", 1, rows, 0.0, 0.9, 5e-4, accumulate=-(-rows // case.micro)
    )  # a rate of 0: what is counted does not depend on it, and nothing diverges
    solver = Solver(network, schedule, device, torch.float32, straight=case.straight)
    return peak_of_steps(solver, _batches(net, depth, rows, device))


def _network(net: Net, case: Case) -> nn.Module:
    if case.layer is None:
        layers = [Layer(spec) for spec in net.layers]
        auxiliary = Auxiliary(net.auxiliaries[-1])
        network: nn.Module = EndToEnd(layers, auxiliary, checkpointing=case.checkpointing)
    else:
        spec, auxiliary = net.layers[case.layer - 1], net.auxiliaries[case.layer - 1]
        network = Problem(Layer(spec), Auxiliary(auxiliary))
    for part in network.modules():
        if isinstance(part, nn.Conv2d):  # as Solver does; fake weights cannot be moved
            kernels = part.weight.detach().contiguous(memory_format=torch.channels_last)
            part.weight = nn.Parameter(kernels)
    network.to = lambda *_, **__: network
    return network


@dataclass(frozen=True)
class Made:
    """Rows of x_depth that are made a micro-batch at a time, as `ProblemFeed` makes them: what is
    cut from stored rows becomes float32, and then only that lives on."""

    net: Net
    depth: int
    rows: int
    device: torch.device

    def split(self, rows: int) -> Iterator[Tensor]:
        shape = shape_at(self.net.layers, self.depth, (3, SIDE, SIDE))
        stored_shape = shape_at(self.net.layers, self.depth, (3, *[self.net.canvas] * 2))
        kept = STORED if self.depth else torch.uint8
        place: dict[str, Any] = {"device": self.device}
        for _ in range(0, self.rows, rows):
            stored = torch.zeros(
                rows, *(stored_shape if self.depth else shape), dtype=kept, **place
            )
            cut = torch.zeros(rows, *shape, dtype=kept, **place)
            x = torch.zeros(rows, *shape, **place)
            del stored, cut
            yield x.as_strided(x.shape, _channels_last(x.shape))
            del x


def _batches(
    net: Net, depth: int, rows: int, device: torch.device
) -> Iterator[tuple[Made, Tensor]]:
    """Batches of which ``rows`` are computed."""
    for _ in range(STEPS):
        yield Made(net, depth, rows, device), torch.zeros(rows, dtype=torch.int64, device=device)


def _channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides."""
    _, channels, height, width = shape
    return channels * height * width, 1, channels * width, channels


class Answers(TorchDispatchMode):
    """Says 1 where a tensor without content is asked for its value."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


def greedy_peak(net: Net, case: Case, measure: Callable[[Net, Case], int]) -> tuple[int, int]:
    """The highest peak of the layers, and the layer that has it. Equal problems are asked once."""
    known: dict[Any, int] = {}
    peaks = []
    for j, (layer, auxiliary) in enumerate(zip(net.layers, net.auxiliaries, strict=True), start=1):
        shape = shape_at(net.layers, j - 1, (3, SIDE, SIDE))
        same = (replace(layer, index=0), auxiliary, shape, j == 1)
        if same not in known:
            known[same] = measure(net, replace(case, layer=j))
        peaks.append(known[same])
    highest = max(peaks)
    return highest, peaks.index(highest) + 1


# ---- the largest network under a cap -------------------------------------------------------------


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest size from 1 to ``most`` that fits, if all smaller ones do; 0: none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
