"""A trained network as files that load without this project.

    DIR/weights.safetensors   parameters and buffers, by plain names
        model.py              builds the network from them: a copy of plain_model.py
        model.pt2             the same as one file, for torch.export.load
        export.json           what it is: input, classes, blocks and steps, accuracies, digests

The directory appears whole or not at all, and only after both forms gave, on test images, what
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

from strata.pipeline.errors import NotThereYet, OptionRange
from strata.pipeline.feed.features import image_views, level_draws
from strata.pipeline.recipe.strict import did_you_mean
from strata.pipeline.results import plain_model
from strata.pipeline.results.assembling import Assembly, Final, assemble, frozen_layers
from strata.pipeline.run import sweep_results, weights
from strata.pipeline.run.levels import keys_at
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import LOGITS, Run
from strata.pipeline.train.evaluation import evaluate
from strata.stages.errors import UnusableNetwork
from strata.stages.network.block_source import first_line
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.network.spec import AuxiliarySpec
from strata.stages.solve.evaluate import ensemble
from strata.store.errors import LevelDamaged, refusals
from strata.store.files.files import DISK
from strata.store.files.publish import TEMPORARY, make_directory, replace
from strata.store.fingerprint import sha256

COMPARED = 256
"""Test images on which an export is compared with the run."""
UNIT = {"float32": 2.0**-17, "float16": 2.0**-11, "bfloat16": 2.0**-8, "uint8": 2.0**-8}
UNIT |= {"uint4": 2.0**-4}
"""The step of a precision, against the largest value; float32's is what other orders of sums make
of it."""
WEIGHTS, PROGRAM, CODE = "weights.safetensors", "model.pt2", "model.py"
DESCRIPTION = "export.json"


@dataclass(frozen=True)
class Wanted:
    """What is to be exported."""

    found: Overview
    run: Run
    j: int
    """Layers 1 … j."""
    features: bool
    ensemble: bool
    final: sweep_results.SweepResult | None
    """The classifier that replaces that of layer j, which is the last."""

    @property
    def text(self) -> str:
        layers = f"layers 1 … {self.j}" if self.j > 1 else "layer 1"
        if self.features:
            return f"{layers}, which give x_{self.j}"
        own = f"the final classifier {self.final['name']}" if self.final else f"C_{self.j}"
        return f"{layers} with {f'all classifiers up to {own}' if self.ensemble else own}"


def wanted(
    found: Overview, *, layer: int | None, features: bool, ensemble: bool, final: str | None
) -> Wanted:
    """What flags ask for.

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
    judged = evaluate(wanted.run, wanted.found.store)
    layers = frozen_layers(wanted.run, wanted.j)
    made = assemble(
        wanted.run,
        layers,
        features=wanted.features,
        ensemble=wanted.ensemble,
        final=_classifier(wanted),
    )
    images = _images(wanted)
    expected = _expected(wanted, layers, images)
    with _appearing(place) as partial:
        weights.write(partial / WEIGHTS, made.tensors())
        value = _description(wanted, made, judged, list(expected.shape[1:]))
        network = plain_model.build(value, weights.read(partial / WEIGHTS)[0], made.modules())
        with _named(wanted, made):
            _trace(network, images, partial / PROGRAM)
        if not made.modules():
            replace(partial, CODE, Path(plain_model.__file__).read_bytes())
        program = torch.export.load(partial / PROGRAM).module()
        value["compared"] = _compared(wanted, [network, program], images, expected)
        names = [name for name in (WEIGHTS, PROGRAM, CODE) if (partial / name).exists()]
        files = {name: sha256((partial / name).read_bytes()) for name in names}
        value["files"] = files
        replace(partial, DESCRIPTION, (json.dumps(value, indent=1) + "\n").encode())
    said = f"exported {wanted.text} to {place}: {', '.join((*files, DESCRIPTION))}"
    return value, [said, *_left_out(made), _said(value["compared"])]


def _final(run: Run, j: int, name: str | None) -> sweep_results.SweepResult | None:
    """The final classifier of that name. Raises OptionRange if it is not to be had."""
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


def _classifier(wanted: Wanted) -> Final | None:
    one = wanted.final
    if one is None:
        return None
    path = (
        sweep_results.place(wanted.run, wanted.run.layers + 1, one["name"])
        / sweep_results.AUXILIARY
    )
    return Final(AuxiliarySpec(**one["made_of"]["auxiliary"]), path, one["auxiliary"])


@contextmanager
def _appearing(place: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name once the block is through, and else goes."""
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
    wanted: Wanted, made: Assembly, judged: dict[str, Any], shape: list[int]
) -> dict[str, Any]:
    run, recipe, j = wanted.run, wanted.run.recipe, wanted.j
    data = run.data()
    assert data is not None
    side = recipe.data.size
    accuracy = judged["layers"][j - 1]
    if wanted.final:
        accuracy = next(one for one in judged["finals"] if one["name"] == wanted.final["name"])
    tested = accuracy["ensemble"]["logits"] if wanted.ensemble else accuracy["test"]
    return {
        "what": wanted.text,
        "recipe": {"name": run.name, "seed": run.seed, **recipe.science()},
        "input": {
            "shape": ["n", recipe.data.channels, side, side],
            "dtype": "uint8",
            "mean": list(recipe.data.mean),
            "std": list(recipe.data.std),
            "padded to": recipe.canvas,
            "cropped to": recipe.augment.crop,
        },
        "output": {"shape": ["n", *shape], "dtype": "float32", "weights": made.output},
        "classes": None if wanted.features else data["classes"],
        "test": None if wanted.features else {"images": judged["samples"], **tested},
        "trained": {
            "data": data["digest"],
            "features": run.nodes()[j].fingerprint,
            "layers": [_digests(run, i) for i in range(1, j + 1)],
            "final": wanted.final and {k: wanted.final[k] for k in ("name", "auxiliary")},
        },
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **made.as_json(),
    }


def _digests(run: Run, j: int) -> dict[str, str]:
    record = run.layer(j)
    assert record is not None
    return {name: record[name] for name in ("weights", "auxiliary")}


def _trace(network: torch.nn.Module, images: Tensor, path: Path) -> None:
    """The network by torch.export, for any number of images."""
    some = images[:2]
    if len(some) < 2:  # of one image, torch takes the number for a constant
        some = some.expand(2, -1, -1, -1)
    shapes = ({0: torch.export.Dim("n")},)
    with torch.no_grad():
        program = torch.export.export(network, (some,), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Kernels that lie channels last are whole all the same; they are read back and compared.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, buffer)
    replace(path.parent, path.name, buffer.getvalue())


@contextmanager
def _named(wanted: Wanted, made: Assembly) -> Iterator[None]:
    """Say of code of others that torch.export does not take it."""
    try:
        yield
    except Exception as error:
        if not made.modules():
            raise
        network, why = wanted.run.recipe.network.said, first_line(error)
        raise UnusableNetwork(
            f"network {network} cannot be exported: torch.export does not take one of its blocks: "
            f"{type(error).__name__}: {why}"
        ) from error


def _left_out(made: Assembly) -> list[str]:
    """For people: why there is no model.py."""
    names = [
        parts[0].arguments["name_in_code"] for parts in made.blocks.values() if parts[0].module
    ]
    if not names:
        return []
    return [f"no {CODE}: it cannot make {names[0]}, which is no chain of torch's own modules"]


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
            places[-1] = sweep_results.place(run, run.layers + 1, wanted.final["name"])
        logits = [np.load(place / LOGITS) for place in places]
        kept = ensemble(logits) if wanted.ensemble else logits[-1]
        return torch.from_numpy(kept[: len(images)].astype(np.float32))
    draws = level_draws(run.recipe, run.seed, "clean", len(images))
    block = run.recipe.cache.block
    x = image_views(run.recipe, images, draws)
    return featurize(layers, x, block=block, compute=torch.float32).to(torch.float32)


@torch.no_grad()
def _compared(
    wanted: Wanted, forms: Sequence[Callable[[Tensor], Tensor]], images: Tensor, expected: Tensor
) -> dict[str, Any]:
    """How far the results are from those of the run, on the first test images.

    Raises:
        LevelDamaged: further than the precisions of the run explain.
    """
    found = [form(images) for form in forms]
    furthest = max(float((z - expected).abs().max()) for z in found)
    largest = float(expected.abs().max())
    run = wanted.run
    bound = 8 * largest * max(UNIT[run.recipe.cache.precision], UNIT[run.compute], UNIT["float32"])
    # With data.jpeg, the run saw other pixels: those that ffcv decodes.
    if not furthest <= bound and not run.recipe.data.jpeg:
        raise LevelDamaged(
            f"the exported network is {furthest:.3g} away from what {run.directory} has, of values "
            f"up to {largest:.3g}; rounding explains {bound:.3g}"
        )
    return {"images": len(images), "furthest": furthest, "largest": largest, "bound": bound}


def _said(compared: dict[str, Any]) -> str:
    return (
        f"on {compared['images']} test images both forms are within {compared['furthest']:.2g} of "
        f"what the run has, of values up to {compared['largest']:.3g}"
    )
