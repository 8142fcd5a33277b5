"""Layers and auxiliary classifiers (paper Eq. 1 and 2), as modules with their own random generator.

    x_j     = ρ W_θ P x_{j-1}                     Layer
    C_γ x_j = L A ρW̃_{k-2} … ρW̃_0 x_j            Auxiliary, or Head where x_j is no map

P is the invertible downsampling of Dinh et al. (2017): each 2×2 block of pixels becomes 4 channels.
A averages over the four spatial quadrants. Initialisation is PyTorch's default, from a given seed.

For VGG (Sec. 4.3) P is max pooling, W̃_0 sees x_j averaged to half its resolution, and the last
classifier is VGG's own: max pooling and fully connected layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from strata.stages.network.block_source import block_modules, head_module
from strata.stages.network.blocks import AnyLayer, Block
from strata.stages.network.spec import AuxiliarySpec, LayerSpec


class Layer(nn.Module):
    """Layer j, from x_{j-1} (B, C, H, W) to x_j (B, width, H/2^p, W/2^p)."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        p = nn.PixelUnshuffle if spec.pool == "invertible" else nn.MaxPool2d
        self.downsample = nn.Sequential(*(p(2) for _ in range(spec.downsamplings)))
        self.convolution = nn.Conv2d(
            spec.convolved_channels, spec.width, 3, padding=1, bias=spec.bias
        )
        self.norm = nn.BatchNorm2d(spec.width) if spec.batch_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width h2 w2"]:
        # In place: what ρ overwrites, nobody needs, and half of a small layer's time is new memory.
        return torch.relu_(self.norm(self.convolution(self.downsample(x))))


class Auxiliary(nn.Module):
    """C_γ, from x_j (B, C, H, W) to logits z_j (B, classes)."""

    def __init__(self, spec: AuxiliarySpec) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs in spec.convolutions:
            blocks.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=spec.bias))
            blocks.append(nn.BatchNorm2d(outputs) if spec.batch_norm else nn.Identity())
            blocks.append(nn.ReLU(inplace=True))
        # Where a side is odd, its last average is of fewer pixels.
        self.halve = nn.AvgPool2d(2, ceil_mode=True) if spec.half_resolution else nn.Identity()
        self.convolutions = nn.Sequential(*blocks)
        self.average = nn.MaxPool2d(2) if spec.hidden else nn.AdaptiveAvgPool2d(2)
        *hidden, last = (nn.Linear(inputs, outputs) for inputs, outputs in spec.maps)
        relus = [part for one in hidden for part in (one, nn.ReLU(inplace=True))]
        self.linear = nn.Sequential(*relus, last) if hidden else last

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.linear(self.average(self.convolutions(self.halve(x))).flatten(1))


class Head(nn.Module):
    """C_γ of an x_j that is no map, from (B, token, F), (B, y, x, F), (B, F, time), (B, F, z, y, x)
    or (B, F) to logits z_j (B, classes), or (B, token, classes)."""

    def __init__(self, spec: AuxiliarySpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.Identity() if spec.sees == "vector" else nn.LayerNorm(spec.channels)
        *hidden, last = (nn.Linear(inputs, outputs) for inputs, outputs in spec.maps)
        relus = [part for one in hidden for part in (one, nn.ReLU(inplace=True))]
        self.linear = nn.Sequential(*relus, last)

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.sees == "vector":
            return self.linear(x)
        x = x.flatten(2).transpose(1, 2) if spec.sees == "places" else x.flatten(1, -2)
        if spec.pool == "class" and not spec.each:
            x = x[:, :1]
        with torch.autocast(x.device.type, enabled=False):  # as GPUs do it, whatever the compute
            x = self.norm(x.float())
        return self.linear(x if spec.each else x.mean(1))


class Problem(nn.Module):
    """The auxiliary problem at layer j: z_j = C_γ(ρ W_θ P x_{j-1})."""

    def __init__(self, layer: nn.Module, auxiliary: nn.Module) -> None:
        super().__init__()
        self.layer, self.auxiliary = layer, auxiliary

    @property
    def filters(self) -> int:
        """Number of filters of W_θ. The layer must be a :class:`Layer`."""
        assert isinstance(self.layer, Layer)
        return self.layer.convolution.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.auxiliary(self.layer(x))


def build(specs: Sequence[AnyLayer | AuxiliarySpec], seed: int | None) -> list[Any]:
    """Layers and classifiers, initialised one after another from one generator.

    The same seed gives the same weights on every machine; None, for weights to be loaded, draws
    nothing. Blocks of a named network are initialised as its own constructor does it. Raises
    UnusableNetwork where one is not the block that was read.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    blocks = [spec for spec in specs if isinstance(spec, Block)]
    made = block_modules(blocks, seed) if blocks else []
    return made + [_made(spec, generator) for spec in specs if not isinstance(spec, Block)]


def build_problem(layer: AnyLayer, auxiliary: AuxiliarySpec, seed: int | None) -> Problem:
    """One problem. Seed and errors as in :func:`build`."""
    return Problem(*build([layer, auxiliary], seed))


def _made(spec: LayerSpec | AuxiliarySpec, generator: torch.Generator | None) -> nn.Module:
    """A module with PyTorch's default initialisation: U(±1/√fan_in) for kernels and biases; or as
    a file's function makes it."""
    if isinstance(spec, AuxiliarySpec) and spec.head:
        seed = generator and int(torch.randint(2**63 - 1, (), generator=generator))
        return head_module(spec.head, seed)
    with torch.device("meta"):
        module = (
            Layer(spec)
            if isinstance(spec, LayerSpec)
            else (Auxiliary if spec.sees == "map" else Head)(spec)
        )
    module.to_empty(device="cpu")
    for part in module.modules() if generator else ():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(part.weight[0].numel())
            for values in (part.weight, part.bias):
                if values is not None:
                    nn.init.uniform_(values, -bound, bound, generator=generator)
        elif isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            part.reset_parameters()
    return module
