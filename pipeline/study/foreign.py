"""Features that another program wrote, as they lie in its files, and what they should be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strata.pipeline.errors import OptionRange
from strata.pipeline.feed.features import frozen, image_views
from strata.pipeline.materialize.images import ImageShards
from strata.pipeline.plan.costs import level_geometry
from strata.pipeline.progress import Reporter
from strata.pipeline.recipe.augmentation import centre_draws
from strata.pipeline.recipe.named_network import NamedNetwork
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import weights
from strata.stages.data.labels import SPLIT_WORDS
from strata.stages.data.sources import LABEL_NAMES, Source, short_reason
from strata.stages.errors import DataError
from strata.stages.network.blocks import PACKAGES
from strata.stages.network.featurize import run_layer

KINDS = (".npy", ".npz", ".safetensors")
NEAR = 0.1
"""Distance of two rows, relative to their length, up to which they are of one sample."""
Form = tuple[int, str]
"""Depth, and what people do to x_j before they keep it."""


# ---- what lies there -----------------------------------------------------------------------------


def arrays_in(path: Path) -> Mapping[str, Any]:
    """The arrays of a file by name, mapped where they can be; None: objects. Raises nearly
    anything."""
    if path.suffix == ".npy":
        return {path.stem: np.load(path, mmap_mode="c")}
    if path.suffix == ".npz":
        found = dict[str, Any]()
        with path.open("rb") as file, np.load(file) as arrays:
            for name in arrays:
                with suppress(ValueError):  # it would have to run code
                    found[name] = None
                    found[name] = arrays[name]
        return found
    from safetensors.torch import load_file

    return load_file(path)


@dataclass(frozen=True)
class Table:
    """What a folder has of one split, or of both."""

    parts: list[Tensor] = field(default_factory=list)
    """Features, (rows, …): pieces of one array, in their order."""
    labels: list[Tensor] = field(default_factory=list)
    first: int = 0
    """The row of the split's first sample."""
    shared: bool = False
    """Does the table hold both splits?"""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Some rows, float32 (rows, value)."""
        ends = np.cumsum([len(part) for part in self.parts])
        pairs = zip(rows, np.searchsorted(ends, rows, side="right"), strict=True)
        found = [self.parts[p][int(row) - int(ends[p]) + len(self.parts[p])] for row, p in pairs]
        return torch.stack(found).flatten(1).float()


def tables_in(folder: Path, source: Source) -> tuple[dict[str, Table], list[str]]:
    """The tables of a folder by split, and what is left out of it, and why.

    Arrays named ``labels``, ``y`` or alike are labels, others of two axes or more features; the
    name of the file or the array says the split, and where none does, the number of rows.

    Raises:
        DataError: there are no features, or of several shapes, or a file cannot be read.
    """
    found, left_out = dict[str, Table](), list[str]()
    order = lambda path: [(len(w), w) for w in re.findall(r"\d+|\D+", path.name)]  # noqa: E731
    for path in sorted((path for path in folder.glob("*") if path.suffix in KINDS), key=order):
        try:
            arrays = arrays_in(path)
        except Exception as error:  # whatever the file holds
            raise DataError(f"{path} cannot be read: {short_reason(error)}") from error
        for name in arrays:
            words = {*re.findall("[a-z]+", name.lower())}
            here = SPLIT_WORDS.keys() & (words | {*re.findall("[a-z]+", path.stem.lower())})
            split = {"": "", "train": "train"}.get(SPLIT_WORDS[here.pop()] if here else "", "test")
            try:
                array = torch.as_tensor(arrays[name])
            except (TypeError, ValueError, RuntimeError):
                left_out.append(f"{name} in {path.name} is left out: it holds no numbers")
                continue
            if words & {*LABEL_NAMES}:
                found.setdefault(split, Table()).labels.append(array)
            elif array.ndim > 1 and array.is_floating_point():
                found.setdefault(split, Table()).parts.append(array)
            else:
                left_out.append(f"{name} in {path.name} is left out: it has no rows of features")
    loose = [one for table in found.values() if not table.parts for one in table.labels]
    found = {split: table for split, table in found.items() if table.parts}
    for table in found.values() if len(found) == 1 else ():
        table.labels.extend(loose if not table.labels else ())
    shapes = {"×".join(map(str, p.shape[1:])) for table in found.values() for p in table.parts}
    if len(shapes) != 1:
        said = f"rows of several shapes ({', '.join(sorted(shapes))})" if shapes else "no features"
        more = f" ({'; '.join(left_out)})" if left_out else f" in files {', '.join(KINDS)}"
        raise DataError(f"{folder} has {said}{more}: give it one array of features for each split")
    if table := found.pop("", None):
        counts = {split: source.count(split) for split in source.splits}
        found["test" if len(table) == counts.get("test") != counts["train"] else "train"] = table
        if len(table) == sum(counts.values()) and "test" in counts:
            found["train"] = replace(table, shared=True)
            found["test"] = replace(table, shared=True, first=counts["train"])
    kept = {split: found[split] for split in source.splits if split in found}
    left_out += [f"{split} is left out: the data have it not" for split in found.keys() - kept]
    if not kept:
        raise DataError(f"{folder} has rows of {', '.join(found)} only, which the data have not")
    return kept, left_out


# ---- what should lie there -----------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network with its weights, in eval mode and float32."""

    recipe: Recipe
    layers: Sequence[nn.Module]
    device: torch.device

    @torch.no_grad()
    def forms(self, x: Tensor, depths: Sequence[int]) -> dict[Form, Tensor]:
        """What people keep of x_j for inputs as layer 1 sees them: (row, value)."""
        found, x = dict[Form, Tensor](), x.to(self.device)
        for j in range(1, max(depths) + 1):
            axis = level_geometry(self.recipe, j - 1, 1).axis
            x = run_layer(self.layers[j - 1], x, torch.float32, axis)
            if j not in depths:
                continue
            found[j, f"x_{j}"] = x
            if x.ndim > 2:
                last = x.movedim(level_geometry(self.recipe, j, 1).axis, -1).flatten(1, -2)
                found[j, f"x_{j}, averaged over all places"] = last.mean(1)
                found[j, f"x_{j}, channels last"] = last
                found[j, f"x_{j}, the first token"] = last[:, 0]
        return {key: one.flatten(1).float().cpu() for key, one in found.items()}

    def form(self, key: Form, x: Tensor) -> Tensor:
        """One of them, for any number of inputs."""
        blocks = x.split(self.recipe.cache.block)
        return torch.cat([self.forms(some, key[:1])[key] for some in blocks])

    def chosen(self, x: Tensor, rows: Tensor, layer: int | None) -> Form:
        """What rows are, by their size: a form that is near, or else the deepest. Raises
        OptionRange: none has that size."""
        depths = range(len(self.layers), 0, -1) if layer is None else [layer]
        every = self.forms(x, depths)
        apart = {k: distance(rows, one) for k, one in every.items() if one.shape == rows.shape}
        if not apart:
            known = ", ".join(f"{name} ({one.shape[1]:,})" for (_, name), one in every.items())
            raise OptionRange(
                f"a row of --features has {rows.shape[1]:,} values, and none of these has: {known}"
            )
        near = min(apart, key=lambda key: apart[key])
        return near if apart[near] <= NEAR else max(apart, key=lambda key: key[0])


def network_of(
    recipe: Recipe, device: torch.device, report: Reporter, *, download: bool
) -> Network:
    """The recipe's network. Raises OptionRange: it has no weights before it is trained."""
    named = recipe.network
    if not isinstance(named, NamedNetwork) or not (
        named.weights or not named.name.startswith(PACKAGES)
    ):
        raise OptionRange(
            "--features is compared with what a trained network gives: name it with --network and "
            "--weights, or give a recipe that has them under [network]"
        )
    whole = replace(recipe, network=replace(named, frozen="all"))
    whole, states = weights.begin_with(whole, 0, report, download=download)
    pairs = zip(whole.layers, states, strict=True)
    layers = [frozen(spec, state, device) for spec, state in pairs]
    return Network(whole, layers, device)


def distance(found: Tensor, expected: Tensor) -> float:
    """How far rows are off, relative to their length: the median."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-20)).median())


def inputs(recipe: Recipe, source: Source, split: str, samples: np.ndarray) -> Tensor:
    """Samples as layer 1 sees them, un-augmented."""
    images = ImageShards(recipe, source, split, samples, level_geometry(recipe, 0, len(samples)))
    pixels = torch.from_numpy(np.stack([images.pixels(sample) for sample in samples]))
    return image_views(recipe, pixels, centre_draws(recipe, len(samples)))
