"""Layers and auxiliary classifiers (paper Eq. 1 and 2), as modules with their own random generator.

    x_j     = ρ W_θ P x_{j-1}                     Layer
    C_γ x_j = L A ρW̃_{k-2} … ρW̃_0 x_j            Auxiliary, or Head where x_j is no map

P is the invertible downsampling of Dinh et al. (2017): each 2×2 block of pixels becomes 4 channels.
A averages over the four spatial quadrants. Initialisation is PyTorch's default, from a given seed.

For VGG (Sec. 4.3) P is max pooling, W̃_0 sees x_j averaged to half its resolution, and the last
classifier is VGG's own: max pooling and fully connected layers. What may be around a classifier
while layer j is trained, and is not kept above it, is an AuxiliaryNetwork:

    layers of a window   trained from x_j along with layer j; the next window goes on from them
    copies               of later layers, with weights of their own (AugLocal: Ma et al. 2024)
    patches              parts of a map are seen one after another (HPFF: Su et al. 2024)
    similarity           of samples in x_j, compared with that of labels (Nokland, Eidnes 2019)
    context              earlier features, seen by C beside x_j (ContSup: Yu et al. 2023)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from strata.stages.network.block_source import block_modules, head_module
from strata.stages.network.blocks import AnyLayer, Block
from strata.stages.network.spec import AuxiliarySpec, LayerSpec

NORMS = nn.modules.batchnorm._BatchNorm  # pyright: ignore


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


class AuxiliaryNetwork(nn.Module):
    """Layers ahead, a classifier, and the convolution whose output is compared, if any: from x_j
    to logits."""

    def __init__(
        self,
        spec: AuxiliarySpec,
        ahead: Sequence[nn.Module],
        classifier: nn.Module,
        similar: nn.Module | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.above = nn.ModuleList(ahead[: len(spec.above)])
        self.patched = nn.Sequential(*ahead[len(spec.above) :], classifier)
        self.similar = similar

    @staticmethod
    def is_meant(spec: AuxiliarySpec) -> bool:
        """Is there anything around the classifier?"""
        return bool(spec.ahead or spec.patches > 1 or spec.similarity or spec.context)

    @staticmethod
    def classifier_of(spec: AuxiliarySpec) -> AuxiliarySpec:
        """The classifier alone."""
        return replace(spec, above=(), copies=(), patches=1, similarity=0.0, context=0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits from x_j (B, C, H, W), and from features beside it, of any size."""
        for layer in self.above:
            x = layer(x)
        if context is not None:
            *copies, classifier = self.patched
            for layer in copies:
                x = layer(x)
            context = F.adaptive_avg_pool2d(context, (x.shape[-2], x.shape[-1]))
            return classifier(torch.cat([x, context.to(x.dtype)], 1))
        if (count := self.spec.patches) == 1:
            return self.patched(x)
        # In training, one patch at a time is there: backward computes each again.
        again = torch.is_grad_enabled() and x.requires_grad
        draws = self.spec.draws
        patches = [part for rows in x.chunk(count, -2) for part in rows.chunk(count, -1)]
        seen = (
            checkpointed(self.patched, part, draws=draws) if again else self.patched(part)
            for part in patches
        )
        return sum(seen, start=x.new_zeros(())) / len(patches)

    def dissimilarity(self, x: Tensor, labels: Int[Tensor, " b"], classes: int) -> Tensor:
        """By how much samples are alike in x_j otherwise than in their labels, a mean over pairs:
        ‖S(deviation of W x_j over places) - S(one-hot labels)‖² / n² (predsim's Eq. 1 and 2)."""
        assert self.similar is not None
        seen = self.similar(x).flatten(2).float()
        wanted = F.one_hot(labels, classes).float()
        return F.mse_loss(_alike(seen.std(2)), _alike(wanted))


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
        return self.seen(x)[1]

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x_j and logits, of x_{j-1}, whose last channels may be context."""
        auxiliary = self.auxiliary
        if isinstance(auxiliary, AuxiliaryNetwork) and (count := auxiliary.spec.context):
            x, context = x[:, :-count], x[:, -count:]
            x = self.layer(x)
            return x, auxiliary(x, context)
        x = self.layer(x)
        return x, auxiliary(x)


def compared(
    problem: nn.Module, x: Tensor, labels: Tensor
) -> tuple[Tensor, tuple[Tensor, float] | None]:
    """Logits; and, where similarity has a share in the loss, by how much samples are alike
    otherwise in x_j than in their labels, and that share."""
    around = problem.auxiliary if isinstance(problem, Problem) else None
    if not (isinstance(around, AuxiliaryNetwork) and around.spec.similarity):
        return problem(x), None
    assert isinstance(problem, Problem)
    x, logits = problem.seen(x)
    apart = around.dissimilarity(x, labels, logits.shape[-1])
    return logits, (apart, around.spec.similarity)


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
    if isinstance(spec, AuxiliarySpec) and AuxiliaryNetwork.is_meant(spec):
        classifier = _made(AuxiliaryNetwork.classifier_of(spec), generator)
        ahead = build(spec.ahead, _drawn(generator))
        similar = None
        if spec.similarity:
            similar = nn.Conv2d(spec.inputs, spec.inputs, 3, padding=1, device="meta")
            similar = _begun(similar.to_empty(device="cpu"), generator)
        return AuxiliaryNetwork(spec, ahead, classifier, similar)
    if isinstance(spec, AuxiliarySpec) and spec.head:
        return head_module(spec.head, _drawn(generator))
    with torch.device("meta"):
        module = (
            Layer(spec)
            if isinstance(spec, LayerSpec)
            else (Auxiliary if spec.sees == "map" else Head)(spec)
        )
    return _begun(module.to_empty(device="cpu"), generator)


def _drawn(generator: torch.Generator | None) -> int | None:
    """A seed from a generator; None without one."""
    return generator and int(torch.randint(2**63 - 1, (), generator=generator))


def _begun(module: nn.Module, generator: torch.Generator | None) -> nn.Module:
    """A module with weights of PyTorch's default initialisation; without a generator as it is."""
    for part in module.modules() if generator else ():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(part.weight[0].numel())
            for values in (part.weight, part.bias):
                if values is not None:
                    nn.init.uniform_(values, -bound, bound, generator=generator)
        elif isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            part.reset_parameters()
    return module


def _alike(x: Float[Tensor, "b f"]) -> Float[Tensor, "b b"]:
    """Cosines of the angles between samples, each less its own mean."""
    x = F.normalize(x - x.mean(1, keepdim=True))
    return x @ x.T


def checkpointed(layer: nn.Module, x: Tensor, *, draws: bool) -> Any:
    """``layer(x)``, of which only x is kept until backward asks for the rest.

    Args:
        draws: it draws random numbers, which must be the same again.
    """
    return checkpoint(
        layer,
        x,
        use_reentrant=False,
        preserve_rng_state=draws,
        context_fn=lambda: (nullcontext(), _running_statistics_stay(layer)),
    )


@contextmanager
def _running_statistics_stay(layer: nn.Module) -> Iterator[None]:
    """Batch norm normalises by its batch as before, and counts it not a second time.

    With momentum 0 the running statistics are multiplied by 1. Taking them away instead would
    change what is saved for backward, and checkpointing insists on the same.
    """
    norms = [part for part in layer.modules() if isinstance(part, NORMS)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
