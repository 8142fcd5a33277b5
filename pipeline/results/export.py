"""A trained network as files that load without this project.

    DIR/model.pt2             the network as one file, for torch.export.load
        weights.safetensors   its state dict: parameters and buffers by plain names
        export.json           what it is: input, classes, accuracies, digests

The directory appears whole or not at all, and only after the program gave, on test images, what
`evaluate` has of them.
"""

from __future__ import annotations

import io
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from strata.pipeline.errors import NotThereYet, OptionRange
from strata.pipeline.feed.features import frozen_layer, image_views, level_draws
from strata.pipeline.recipe.strict import did_you_mean
from strata.pipeline.results.exported import ExportedNetwork, assemble
from strata.pipeline.run import sweep_results, weights
from strata.pipeline.run.levels import keys_at
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import LOGITS, Run
from strata.pipeline.run.sweep_results import SweepResult
from strata.pipeline.train.evaluation import evaluate
from strata.stages.errors import UnusableNetwork
from strata.stages.network.block_source import first_line
from strata.stages.network.blocks import Block
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.solve.evaluate import ensemble
from strata.store.errors import LevelDamaged, refusals
from strata.store.files.files import DISK
from strata.store.files.publish import TEMPORARY, make_directory, replace
from strata.store.fingerprint import sha256

COMPARED = 256
"""Test images on which an export is compared with the run."""
BITS = {"float32": 17, "float16": 11, "bfloat16": 8, "uint8": 8, "uint4": 4}
"""A precision's step is 2^-bits of the largest value; float32's is what other orders of sums make
of it."""
WEIGHTS, PROGRAM = "weights.safetensors", "model.pt2"
DESCRIPTION = "export.json"


@dataclass(frozen=True)
class Wanted:
    """The part of a network that is to be exported."""

    found: Overview
    run: Run
    j: int
    """Layers 1 … j."""
    features: bool
    ensemble: bool
    final: SweepResult | None
    """Classifier that replaces that of layer j, which is the last."""

    @property
    def text(self) -> str:
        """What it is, for people."""
        layers = f"layers 1 … {self.j}" if self.j > 1 else "layer 1"
        if self.features:
            return f"{layers}, which give x_{self.j}"
        own = f"the final classifier {self.final['name']}" if self.final else f"C_{self.j}"
        return f"{layers} with {f'all classifiers up to {own}' if self.ensemble else own}"


def wanted(
    found: Overview, *, layer: int | None, features: bool, ensemble: bool, final: str | None
) -> Wanted:
    """The part of a network that flags ask for.

    Raises:
        OptionRange: the flags exclude each other.
        LayerRange, NotThereYet: there is no such layer, or it is not solved.
    """
    if features and (ensemble or final):
        raise OptionRange("--features has no classifier: leave out --ensemble and --final")
    j = layer or len(found.recipe.layers)
    found.check_layer(j)
    run = found.existing()
    if run.solved() < j:
        raise NotThereYet(
            f"layer {j} is not solved in {run.directory}. Run: strata train {found.name} "
            f"--layer {j}"
        )
    return Wanted(found, run, j, features, ensemble, _final(run, j, final))


def export(wanted: Wanted, place: Path) -> tuple[dict[str, Any], list[str]]:
    """Write what is wanted into a new directory.

    Returns:
        What export.json says, and lines for people.

    Raises:
        OptionRange: the directory exists.
        LevelDamaged: weights or images are not what their records speak of, or the network does
            not give what `evaluate` has.
    """
    if place.exists():
        raise OptionRange(f"--to {place} exists already. Name a new directory, or remove it")
    run = wanted.run
    judged = evaluate(run, wanted.found.store)
    layers = [frozen_layer(run, j, torch.device("cpu")) for j in range(1, wanted.j + 1)]
    network = assemble(
        run,
        layers,
        features=wanted.features,
        ensemble=wanted.ensemble,
        final=wanted.final,
    )
    images = _images(wanted)
    expected = _expected(wanted, layers, images)
    with _new_directory(place) as partial:
        weights.write(partial / WEIGHTS, network.state_dict())
        replace(partial, PROGRAM, _traced(wanted, network, images))
        program = torch.export.load(partial / PROGRAM).module()
        value = _description(wanted, network, judged, list(expected.shape[1:]))
        value["compared"] = said = _compared(wanted, program, images, expected)
        files = {name: sha256((partial / name).read_bytes()) for name in (WEIGHTS, PROGRAM)}
        value["files"] = files
        replace(partial, DESCRIPTION, (json.dumps(value, indent=1) + "\n").encode())
    lines = [
        f"exported {wanted.text} to {place}: {', '.join((*files, DESCRIPTION))}",
        f"on {said['images']} test images it is within {said['furthest']:.2g} of what the run has, "
        f"of values up to {said['largest']:.3g}",
    ]
    return value, lines


def _final(run: Run, j: int, name: str | None) -> SweepResult | None:
    """The result of the final classifier of that name. Raises OptionRange if there is none."""
    if name is None:
        return None
    if j < run.layers:
        raise OptionRange(f"--final {name}: it follows x_{run.layers}; leave out --layer {j}")
    found = sweep_results.finals(run)
    state, one = found.get(name, ("not there", None))
    if one is None:
        others = [other for other in found if other != name]
        near = did_you_mean(name, others) if others else ""
        raise OptionRange(f"--final {name!r} is {state}: `final` trains it{near}")
    return one


@contextmanager
def _new_directory(place: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name at the end of the block; an error removes it."""
    parent = make_directory(place.absolute().parent)
    partial = make_directory(parent / f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield partial
        with refusals(place):
            DISK.sync_directory(partial)
            partial.rename(place)
            DISK.sync_directory(parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- what it is ----------------------------------------------------------------------------------


def _description(
    wanted: Wanted, network: ExportedNetwork, judged: dict[str, Any], shape: list[int]
) -> dict[str, Any]:
    run, recipe, j = wanted.run, wanted.run.recipe, wanted.j
    data = run.data()
    assert data is not None
    accuracy = judged["layers"][j - 1]
    if wanted.final:
        accuracy = next(one for one in judged["finals"] if one["name"] == wanted.final["name"])
    tested = accuracy["ensemble"]["logits"] if wanted.ensemble else accuracy["test"]
    return {
        "what": wanted.text,
        "recipe": {"name": run.name, "seed": run.seed, **recipe.science()},
        "input": {
            "shape": ["n", recipe.data.channels, "height", "width"],
            "resized to": recipe.data.size,
            "dtype": "uint8",
            "mean": list(recipe.data.mean),
            "std": list(recipe.data.std),
            "padded to": recipe.canvas,
            "cropped to": recipe.augment.crop,
        },
        "output": {"shape": ["n", *shape], "dtype": "float32", "weights": network.powers},
        "classes": None if wanted.features else data["classes"],
        "test": None if wanted.features else {"images": judged["samples"], **tested},
        "trained": {
            "data": data["digest"],
            "features": run.nodes()[j].fingerprint,
            "layers": [
                {name: (run.layer(i) or {})[name] for name in ("weights", "auxiliary")}
                for i in range(1, j + 1)
            ],
            "final": wanted.final and {k: wanted.final[k] for k in ("name", "auxiliary")},
        },
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _traced(wanted: Wanted, network: ExportedNetwork, images: Tensor) -> bytes:
    """The network by torch.export, for any number of images of any one size.

    Raises:
        UnusableNetwork: torch.export does not take code of others.
    """
    some = images[:2].expand(2, -1, -1, -1)  # of one image, torch takes the number for a constant
    shapes = ({0: Dim("n"), 2: Dim("height"), 3: Dim("width")},)
    buffer = io.BytesIO()
    try:
        with torch.no_grad():
            program = torch.export.export(network, (some,), dynamic_shapes=shapes)
        with warnings.catch_warnings():
            # Kernels that lie channels last are whole all the same; they are read back, compared.
            warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
            torch.export.save(program, buffer)
    except Exception as error:
        if not isinstance(wanted.run.recipe.layers[0], Block):
            raise
        raise UnusableNetwork(
            f"network {wanted.run.recipe.network.said} cannot be exported: torch.export does not "
            f"take one of its blocks: {type(error).__name__}: {first_line(error)}"
        ) from error
    return buffer.getvalue()


# ---- does it give what the run has? --------------------------------------------------------------


def _images(wanted: Wanted) -> Tensor:
    """The first test images as they are stored, uint8 (n, C, y, x)."""
    key = next(key for key in keys_at(wanted.run, 0) if key.split == "test")
    level = wanted.found.store.open(key)
    return torch.from_numpy(level.read(0, min(COMPARED, len(level))).copy())


def _expected(wanted: Wanted, layers: Sequence[Frozen], images: Tensor) -> Tensor:
    """What the run has of these images: logits that were kept, or x_j."""
    run, j = wanted.run, wanted.j
    if not wanted.features:
        places = [run.layer_directory(i) for i in range(1, j + 1)]
        if wanted.final:
            places[-1] = run.sweep_directory(j + 1) / wanted.final["name"]
        logits = [np.load(place / LOGITS) for place in places]
        kept = ensemble(logits) if wanted.ensemble else logits[-1]
        return torch.from_numpy(kept[: len(images)].astype(np.float32))
    x = image_views(run.recipe, images, level_draws(run.recipe, run.seed, "clean", len(images)))
    x = featurize(layers, x, block=run.recipe.cache.block, compute=torch.float32)
    return x.to(torch.float32)


@torch.no_grad()
def _compared(
    wanted: Wanted, program: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor
) -> dict[str, Any]:
    """How far the results are from those of the run, on the first test images.

    Raises:
        LevelDamaged: further than the precisions of the run explain.
    """
    furthest = float((program(images) - expected).abs().max())
    largest = float(expected.abs().max())
    run = wanted.run
    bits = min(BITS[name] for name in (run.recipe.cache.precision, run.compute, "float32"))
    bound = 8 * largest * 2.0**-bits
    # With data.jpeg, the run saw other pixels: those that ffcv decodes.
    if not furthest <= bound and not run.recipe.data.jpeg:
        raise LevelDamaged(
            f"the exported network is {furthest:.3g} away from what {run.directory} has, of values "
            f"up to {largest:.3g}; rounding explains {bound:.3g}"
        )
    return {"images": len(images), "furthest": furthest, "largest": largest, "bound": bound}
