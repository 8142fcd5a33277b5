"""A run's layers and classifiers as one network, from the image as decoded to the result.

It goes the way of a test image (pipeline/feed/problem_feed.py:clean_batches): the image is padded
and normalised; after every layer but the last, values are rounded to what the level would hold. In
canvas mode layers 1 … j - 1 see the whole canvas, and the centre is cut out before layer j, whose
classifier follows. So in an ensemble a layer runs twice: on the canvas for the layers above it, and
on the crop for its own classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strata.pipeline.recipe import augmentation
from strata.pipeline.run import sweep_results, weights
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.sweep_results import AUXILIARY, SweepResult
from strata.stages.errors import StageError
from strata.stages.network.blocks import Block
from strata.stages.network.chain import Part, chain, rounding, whole
from strata.stages.network.featurize import Frozen
from strata.stages.network.network import blank_auxiliary
from strata.stages.network.spec import AuxiliarySpec, scale_at


@dataclass
class Assembly:
    """A network as blocks and steps; ``plain_model.py`` builds it."""

    blocks: dict[str, list[Part]] = field(default_factory=dict)
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    """(name of the result, block, name of its argument); ``images`` is the first argument."""
    output: dict[str, float] = field(default_factory=dict)
    """Weights, by the names of results, of the sum that is the network's result."""

    def call(self, result: str, block: str, argument: str, parts: Sequence[Part]) -> str:
        """Let a block follow; returns the name of what it gives. One without parts is left out."""
        if not parts:
            return argument
        self.blocks[block] = list(parts)
        self.steps.append((result, block, argument))
        return result

    def as_json(self) -> dict[str, Any]:
        blocks = {name: [part.as_json() for part in parts] for name, parts in self.blocks.items()}
        return {"blocks": blocks, "steps": self.steps}

    def modules(self) -> dict[str, nn.Module]:
        """The parts that only code of others can make, by their names in the network."""
        return {
            f"{block}.{part.name}": part.module
            for block, parts in self.blocks.items()
            for part in parts
            if part.module is not None
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer, by the name that the network has for it."""
        return {
            f"{block}.{part.name}.{name}": tensor
            for block, parts in self.blocks.items()
            for part in parts
            for name, tensor in part.state.items()
        }


def assemble(
    run: Run,
    layers: Sequence[Frozen],
    *,
    features: bool = False,
    ensemble: bool = False,
    final: SweepResult | None = None,
) -> Assembly:
    """Layers 1 … j, all of ``layers``, and what follows them: C_j if nothing else is asked for.

    Args:
        features: nothing follows; the result is x_j as its level ``test`` holds it.
        ensemble: the classifiers of all layers follow, weighted by 2^j (Sec. 4).
        final: a classifier of x_J, trained with layer J frozen, follows in place of layer j's own;
            layer j must be the last.

    Raises:
        LevelDamaged: the weights of a classifier are not those that its record speaks of.
        StageError: a module is no chain of known parts.
    """
    made, last, canvas = Assembly(), len(layers), augmentation.mode(run.recipe) == "canvas"
    x = made.call("x", "image", "images", _image(run))
    for j, frozen in enumerate(layers, 1):
        own = not features and (ensemble or j == last) and not (final and j == last)
        goes_on = j < last or features or final is not None
        layer = _layer(run, j, frozen.layer)
        y = x
        if own:
            y = made.call("y", f"crop_{j - 1}", x, _centre(run, j - 1) if canvas else [])
            y = made.call("y", f"layer_{j}", y, layer)
            spec, digest = run.recipe.auxiliaries[j - 1], (run.layer(j) or {})["auxiliary"]
            classifier = _classifier(run, j, spec, run.layer_directory(j), digest)
            made.call(f"z_{j}", f"classifier_{j}", y, classifier)
        if goes_on:
            if canvas or not own:
                y = made.call("x", f"layer_{j}", x, layer)
            x = made.call("x", f"stored_{j}", y, rounding(frozen.stored))
    if final:
        y = made.call("y", f"crop_{last}", x, _centre(run, last) if canvas else [])
        spec = AuxiliarySpec(**final["made_of"]["auxiliary"])
        place = sweep_results.place(run, last + 1, final["name"])
        made.call(f"z_{last}", "final", y, _classifier(run, last, spec, place, final["auxiliary"]))
    scores = [name for name, *_ in made.steps if name.startswith("z_")] or [x]
    powers = [2.0 ** int(name[2:]) if len(scores) > 1 else 1.0 for name in scores]
    made.output = {n: power / sum(powers) for n, power in zip(scores, powers, strict=True)}
    return made


def _layer(run: Run, j: int, module: nn.Module) -> list[Part]:
    """The parts of a layer; a block that is no chain of torch's own modules is one part."""
    spec = run.recipe.layers[j - 1]
    try:
        return chain(module, run.recipe.shape(j - 1, run.recipe.augment.crop))
    except StageError:
        if isinstance(spec, Block):
            return whole(module, spec.name)
        raise


def _image(run: Run) -> list[Part]:
    """The way of an image to x_0 as layer 1 sees it."""
    recipe, border = run.recipe, run.recipe.augment.pad
    padded = [Part("canvas", "ZeroPad2d", {"padding": border})] if border else []
    crop = [] if augmentation.mode(recipe) == "canvas" else _centre(run, 0)
    colour = {"mean": list(recipe.data.mean), "std": list(recipe.data.std)}
    return [*padded, *crop, Part("normalise", "Normalise", colour)]


def _centre(run: Run, depth: int) -> list[Part]:
    """The centre crop of a whole canvas of x_depth."""
    recipe, scale = run.recipe, scale_at(run.recipe.layers, depth)
    if recipe.canvas == recipe.augment.crop:
        return []
    window = {"offset": recipe.centre // scale, "size": recipe.augment.crop // scale}
    return [Part("centre", "Crop", window)]


def _classifier(run: Run, j: int, spec: AuxiliarySpec, directory: Path, digest: str) -> list[Part]:
    """A classifier of x_j from its weights."""
    module = blank_auxiliary(spec)
    module.load_state_dict(weights.read_checked(directory / AUXILIARY, digest))
    return chain(module.eval(), run.recipe.shape(j, run.recipe.augment.crop))
