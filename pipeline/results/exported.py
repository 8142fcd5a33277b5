"""A run's layers and classifiers as one module of plain torch, from decoded images to the result.

It goes the way of a test image (pipeline/feed/problem_feed.py:clean_batches): the image is resized,
padded and normalised; after every layer but the last, values are rounded to what the level would
hold. In canvas mode layers 1 … j - 1 see the whole canvas, and the centre is cut out before layer
j, whose classifier follows. So in an ensemble a layer runs twice: on the canvas for the layers
above it, and on the crop for its own classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from strata.pipeline.recipe import augmentation
from strata.pipeline.run import weights
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.sweep_results import AUXILIARY, SweepResult
from strata.stages.data import augment
from strata.stages.features.quantise import FLOATS, Codec, Floats, memory_format
from strata.stages.network.blocks import scale_at
from strata.stages.network.featurize import Frozen, placed
from strata.stages.network.network import build
from strata.stages.network.spec import AuxiliarySpec


class Rounding(nn.Module):
    """What a level keeps of float32 values, for example (n, C, H, W), as float32.

    ``encode`` of a codec does the same, and looks at every value first: that cannot be traced.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.dtype = FLOATS[codec.precision] if isinstance(codec, Floats) else None
        self.levels = 0 if isinstance(codec, Floats) else codec.levels
        self.axis = codec.axis
        for name, tensor in codec.tensors().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype is not None:
            return x.to(self.dtype).to(torch.float32)
        along = -1, *(1,) * (x.ndim - 1 - self.axis % x.ndim)
        scale, zero = self.scale.view(along), self.zero.to(torch.float32).view(along)
        codes = ((x / scale).round() + zero).clamp(0, self.levels)
        return (codes - zero) * scale


class ExportedNetwork(nn.Module):
    """Layers 1 … j, and the classifiers that follow some of them.

    Modules are named as in the paper: ``layer_1``, ``classifier_1``, ``stored_1``, …, ``final``.
    """

    def __init__(
        self,
        run: Run,
        layers: Sequence[Frozen],
        *,
        features: bool = False,
        ensemble: bool = False,
        final: SweepResult | None = None,
    ) -> None:
        """Layers 1 … j of a run, and what follows them: C_j if nothing else is asked for.

        Args:
            features: nothing follows: the result is x_j as its level ``test`` holds it.
            ensemble: the classifiers of all layers follow, weighted by 2^j (Sec. 4).
            final: a classifier of x_J as it is stored, trained with layer J frozen, follows in
                place of layer j's own; layer j must be the last.

        Raises:
            LevelDamaged: the weights of a classifier are not those that its record speaks of.
        """
        super().__init__()
        self.recipe, self.depth, self.final = run.recipe, len(layers), None
        self.canvas = augmentation.mode(run.recipe) == "canvas"
        first, end = run.recipe.given + 1 if ensemble else self.depth, self.depth + (final is None)
        self.own = [] if features else list(range(first, end))
        if final:
            head = run.recipe.auxiliaries[-1].head  # a file's is the same in every variant
            spec = AuxiliarySpec(**final["made_of"]["auxiliary"], head=head)
            place = run.sweep_directory(self.depth + 1) / final["name"]
            self.final = _classifier(spec, place, final["auxiliary"])
        for j, frozen in enumerate(layers, 1):
            self.add_module(f"layer_{j}", frozen.layer)
            if j < self.depth or final or features:
                self.add_module(f"stored_{j}", Rounding(frozen.stored))
        for j in self.own:
            spec, known = run.recipe.auxiliaries[j - 1], (run.layer(j) or {})["auxiliary"]
            self.add_module(f"classifier_{j}", _classifier(spec, run.layer_directory(j), known))
        # Convolutions add up in another order where kernels lie in another one: as when trained.
        placed(self.requires_grad_(False).eval(), torch.device("cpu"))

    @property
    def powers(self) -> dict[str, float]:
        """Weights of the logits z_j in the result: 2^j, divided by their sum."""
        scores = [*self.own, *([self.depth] if self.final else [])]
        return {f"z_{j}": 2.0**j / sum(2.0**i for i in scores) for j in scores}

    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: uint8 (n, channels, height, width), all of one size, of any; or arrays of the
                shape and dtype that the recipe gives.

        Returns:
            float32: logits (n, classes) or (n, token, classes), or features (n, channels, y, x) or
            as the last layer gives them.
        """
        recipe, scores = self.recipe, []
        x = self._seen(images)
        x = x.contiguous(memory_format=memory_format(x))  # x_0 as layer 1 sees it
        context = x
        for j in range(1, self.depth + 1):
            layer, y = self.get_submodule(f"layer_{j}"), None
            if recipe.auxiliary.context == j - 1:
                context = self._trained_on(x, j - 1)
            if j in self.own:
                seen, beside = self._trained_on(x, j - 1), list[Tensor]()
                y = layer(seen)
                if recipe.context_of(j) is not None:
                    beside = [adaptive_avg_pool2d(context, (seen.shape[-2], seen.shape[-1]))]
                scores.append(self.get_submodule(f"classifier_{j}")(y, *beside))
            if j < self.depth or self.final or not self.own:
                y = layer(x) if y is None or self.canvas else y
                x = self.get_submodule(f"stored_{j}")(y)
        if self.final:
            scores.append(self.final(self._trained_on(x, self.depth)))
        if len(scores) < 2:
            return scores[0] if scores else x
        weighted = zip(self.powers.values(), scores, strict=True)
        return torch.stack([weight * z for weight, z in weighted]).sum(0)

    def _seen(self, images: Tensor) -> Tensor:
        """Images, or arrays, as layer 1 sees them."""
        data = self.recipe.data
        if data.shape:
            return augment.standardise(images, data.mean, data.std)
        x = augment.pad(resized(images, data.size), self.recipe.augment.pad)
        x = x if self.canvas else self._centre(x, 0)
        return augment.normalise(x, data.mean, data.std)

    def _trained_on(self, x: Tensor, depth: int) -> Tensor:
        """x_depth as the problem above it sees it: of a canvas, the centre."""
        return self._centre(x, depth) if self.canvas else x

    def _centre(self, x: Tensor, depth: int) -> Tensor:
        """The centre crop of a whole canvas of x_depth."""
        scale = scale_at(self.recipe.layers, depth)
        first, side = self.recipe.centre // scale, self.recipe.augment.crop // scale
        x = x[..., first : first + side, first : first + side]
        return x.contiguous(memory_format=torch.channels_last)


def resized(images: Tensor, size: int) -> Tensor:
    """float32 (n, C, size, size) of uint8 images, as stages/data/images.py:pixels does it: the
    shorter side is resized to ``size`` and the centre of the longer one cut out. What has that size
    already keeps its pixels; elsewhere a pixel may differ from Pillow's by one step of 255."""
    sides = [images.new_ones(side, dtype=torch.float64).sum() for side in images.shape[2:]]
    short = torch.minimum(*sides)
    rows, columns = (
        _bilinear(side, count, short, size)
        for side, count in zip(sides, images.shape[2:], strict=True)
    )
    x = (images.to(torch.float32) @ columns.T + 0.5).floor().clamp(0, 255)
    return (rows @ x + 0.5).floor().clamp(0, 255)


def _bilinear(side: Tensor, count: int, short: Tensor, size: int) -> Tensor:
    """Weights (size, count) of Pillow's bilinear filter, of one side of an image.

    Args:
        side, short: float64 scalars, pixels of this side and of the shorter one.
    """
    new = (side * size / short).round().clamp(min=size)
    scale = side / new
    along = torch.arange(size, dtype=torch.float64, device=side.device)
    centres = (((new - size) / 2).floor() + along + 0.5) * scale
    pixels = torch.arange(count, dtype=torch.float64, device=side.device) + 0.5
    found = (1 - (pixels - centres[:, None]).abs() / scale.clamp(min=1)).clamp(min=0)
    return (found / found.sum(1, keepdim=True)).to(torch.float32)


def _classifier(spec: AuxiliarySpec, directory: Path, digest: str) -> nn.Module:
    """A classifier from its weights, which must have that digest."""
    module = build([spec], None)[0]
    module.load_state_dict(weights.read_checked(directory / AUXILIARY, digest))
    return module
