# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The Strata authors
"""A trained network in plain PyTorch. It needs torch and safetensors, and nothing else.

    import model                       # with its directory on sys.path
    network = model.load()             # in eval mode, on the CPU
    result = network(images)           # uint8 (n, channels, y, x), pixels as they were decoded

weights.safetensors has the weights. export.json has the rest: the parts of every block, the order
in which a forward pass goes from block to block, the classes, and where all of it comes from.
model.pt2 is the same network as one file, for ``torch.export.load``, without this one.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 pixels to float32 (pixel / 255 - mean) / std, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            along = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1)
            self.register_buffer(name, along, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.to(torch.float32) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)


class Crop(nn.Module):
    """A window of ``size`` × ``size``, its corner ``offset`` pixels from the top and the left."""

    def __init__(self, offset: int, size: int) -> None:
        super().__init__()
        self.window = slice(offset, offset + size)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., self.window, self.window]
        return x.contiguous(memory_format=torch.channels_last)


class Round(nn.Module):
    """What is left of float32 in a smaller dtype: the next layer was trained on that."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = getattr(torch, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(torch.float32)


class Codes(nn.Module):
    """What is left of float32 in codes 0 … ``levels``, with a scale and a zero per channel."""

    scale: Tensor
    zero: Tensor

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero", torch.zeros(channels, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.scale.view(-1, 1, 1), self.zero.to(torch.float32).view(-1, 1, 1)
        codes = ((x / scale).round() + zero).clamp(0, self.levels)
        return (codes - zero) * scale


OWN = {kind.__name__: kind for kind in (Normalise, Crop, Round, Codes)}


class Network(nn.Module):
    """Blocks, and the steps from one to the next."""

    def __init__(
        self, description: Mapping[str, Any], own: Mapping[str, nn.Module] | None = None
    ) -> None:
        """
        Args:
            description: the object in export.json.
            own: by ``block.part``, modules that are not made from it.
        """
        super().__init__()
        for name, parts in description["blocks"].items():
            modules = ((p["name"], (own or {}).get(f"{name}.{p['name']}")) for p in parts)
            whole = [(n, m or _made(p)) for (n, m), p in zip(modules, parts, strict=True)]
            self.add_module(name, nn.Sequential(OrderedDict(whole)))
        self.steps: list[tuple[str, str, str]] = [tuple(step) for step in description["steps"]]
        self.output: dict[str, float] = description["output"]["weights"]
        self.expected: tuple[int, ...] = tuple(description["input"]["shape"][1:])

    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: uint8 (n, channels, y, x).

        Returns:
            float32: logits (n, classes), or features (n, channels, y, x).

        Raises:
            ValueError: the images have another dtype or shape.
        """
        found = tuple(images.shape[1:])
        if images.dtype != torch.uint8 or found != self.expected:
            raise ValueError(
                f"images are {images.dtype} (n, {found}), not uint8 (n, {self.expected})"
            )
        values = {"images": images}
        for result, block, argument in self.steps:
            values[result] = self.get_submodule(block)(values[argument])
        if len(self.output) == 1:
            return values[next(iter(self.output))]
        weighted = [weight * values[name] for name, weight in self.output.items()]
        return torch.stack(weighted).sum(0)


def _made(part: Mapping[str, Any]) -> nn.Module:
    arguments = {key: value for key, value in part.items() if key not in ("name", "kind")}
    kind = OWN.get(part["kind"]) or getattr(nn, part["kind"])
    return kind(**arguments)


def build(
    description: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    own: Mapping[str, nn.Module] | None = None,
) -> Network:
    """The network in eval mode, on the CPU. Nothing is drawn from a random generator."""
    with torch.device("meta"):
        network = Network(description, own)
    network.load_state_dict(weights, assign=True)
    # Convolutions add up in another order where kernels lie in another one: as when trained.
    return network.eval().to(memory_format=torch.channels_last)  # pyright: ignore


def load(directory: Path | str | None = None) -> Network:
    """The network that was exported to a directory, by default that of this file.

    Raises:
        ValueError: the weights are not those that export.json names.
    """
    place = Path(directory or Path(__file__).parent)
    description = json.loads((place / "export.json").read_text("utf-8"))
    name = "weights.safetensors"
    data = (place / name).read_bytes()
    found, expected = hashlib.sha256(data).hexdigest(), description["files"][name]
    if found != expected:
        raise ValueError(
            f"{place / name} is damaged: its sha256 is {found[:12]}…, export.json says "
            f"{expected[:12]}…. Copy it again"
        )
    return build(description, tensors_of(data))
