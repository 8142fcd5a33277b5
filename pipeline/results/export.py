"""A trained network as files that load without this project.

    DIR/model.pt2             the network as one file, for torch.export.load
        weights.safetensors   its state dict: parameters and buffers by plain names
        model.onnx            the network in ONNX, where that is asked for
        export.json           what it is: input, classes, accuracies, digests

The directory appears whole or not at all, and only after the programs gave, on test images, what
`evaluate` has of them.
"""

from __future__ import annotations

import io
import json
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from strata.pipeline.errors import NotThereYet, OptionRange
from strata.pipeline.feed.features import frozen_layers, image_views, level_draws
from strata.pipeline.options import Options
from strata.pipeline.recipe.strict import did_you_mean
from strata.pipeline.results.exported import ExportedNetwork
from strata.pipeline.run import sweep_results, weights
from strata.pipeline.run.levels import keys_at
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import LOGITS, Run
from strata.pipeline.run.sweep_results import SweepResult
from strata.pipeline.train.evaluation import evaluate
from strata.stages.errors import UnusableNetwork
from strata.stages.foreign import first_line
from strata.stages.network.blocks import Block
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.solve.evaluate import ensemble as summed
from strata.store.errors import LevelDamaged, refusals
from strata.store.files.files import DISK
from strata.store.files.publish import TEMPORARY, make_directory, read_npy, replace
from strata.store.fingerprint import sha256

COMPARED, FEW = 256, 8
"""Test images on which an export is compared with the run, and its ONNX form with its program."""
BITS = {"float32": 17, "float16": 11, "bfloat16": 8, "uint8": 8, "uint4": 4}
"""A precision's step is 2^-bits of the largest value; float32's is what other orders of sums make
of it."""
WEIGHTS, PROGRAM, ONNX = "weights.safetensors", "model.pt2", "model.onnx"
DESCRIPTION = "export.json"


def export(found: Overview, options: Options) -> tuple[dict[str, Any], list[str]]:
    """Write layers 1 … ``layer`` of a run (None: all) and their classifier, those of all layers,
    none, or the final one of that name into a new directory; with ``onnx`` in ONNX, too.

    Returns:
        What export.json says, and lines for people.

    Raises:
        OptionRange: the flags exclude each other, the directory exists, or a package is missing.
        LayerRange, NotThereYet: there is no such layer, or it is not solved.
        LevelDamaged: weights or images are not what their records speak of, or the network does
            not give what `evaluate` has.
        UnusableNetwork: torch cannot export code of others.
    """
    place, ensemble, onnx = options.to, options.ensemble, options.onnx
    if onnx and (missing := [name for name in ("onnx", "onnxscript") if not find_spec(name)]):
        raise OptionRange(f"--onnx needs {' and '.join(missing)}: pip install 'strata[onnx]'")
    if place.exists():
        raise OptionRange(f"--to {place} exists already. Name a new directory, or remove it")
    if options.features and (ensemble or options.final):
        raise OptionRange("--features has no classifier: leave out --ensemble and --final")
    j = options.layer or len(found.recipe.layers)
    run = _solved(found, j)
    last = _final(run, j, options.final)
    if j <= run.recipe.given and not (options.features or last):
        raise OptionRange(
            f"layer {j} is given, and has no classifier: add --features"
            + " or --final NAME" * (j == run.layers)
        )
    judged = None if options.features else evaluate(run, found.store)
    layers = frozen_layers(run, range(1, j + 1), torch.device("cpu"))
    which: Any = {"features": options.features, "ensemble": ensemble, "final": last}
    network = ExportedNetwork(run, layers, **which)
    test = found.store.open(next(key for key in keys_at(run, 0) if key.split == "test"))
    images = torch.from_numpy(test.read(0, min(COMPARED, len(test))))
    expected = _expected(run, network, layers, last, images)
    value = _description(run, network, judged, list(expected.shape[1:]), ensemble, last)
    programs = _programs(run, network, images, onnx)
    names = [WEIGHTS, *programs]
    with _new_directory(place) as partial:
        weights.write(partial / WEIGHTS, network.state_dict())
        for name, data in programs.items():
            replace(partial, name, data)
        program = torch.export.load(partial / PROGRAM).module()
        with torch.no_grad():
            given = program(images)
        value["compared"] = said = _compared(run, given, expected, run.directory)
        if onnx:
            few = _run_onnx(partial / ONNX, images[:FEW])
            said["onnx"] = _compared(run, few, given[:FEW], Path(PROGRAM))
        value["files"] = {name: sha256((partial / name).read_bytes()) for name in names}
        replace(partial, DESCRIPTION, (json.dumps(value, indent=1) + "\n").encode())
    lines = [
        f"exported {value['what']} to {place}: {', '.join((*names, DESCRIPTION))}",
        f"on {said['images']} test images it is within {said['furthest']:.2g} of what the run has, "
        f"of values up to {said['largest']:.3g}",
    ]
    return value, lines


def _solved(found: Overview, j: int) -> Run:
    """The run, whose layers 1 … j must be solved."""
    found.check_layer(j)
    run = found.existing()
    if run.solved() < j:
        raise NotThereYet(
            f"layer {j} is not solved in {run.directory}. Run: strata train {found.name} "
            f"--layer {j}"
        )
    return run


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
    run: Run,
    network: ExportedNetwork,
    judged: dict[str, Any] | None,
    shape: list[int],
    ensemble: bool,
    final: SweepResult | None,
) -> dict[str, Any]:
    """What export.json says before anything is compared."""
    recipe, data, j = run.recipe, run.data(), network.depth
    assert data is not None
    tested = None
    if judged is not None:
        whose, every = (j, final and final["name"]), (*judged["layers"], *judged["finals"])
        accuracy = next(one for one in every if (one["layer"], one.get("name")) == whose)
        tested = accuracy["ensemble"]["logits"] if ensemble else accuracy["test"]
        tested = {"images": judged["samples"], **tested}
    own = f"the final classifier {final['name']}" if final else f"C_{j}"
    ending = f" with {f'all classifiers up to {own}' if ensemble else own}"
    what = f"layers 1 … {j}" if j > 1 else "layer 1"
    return {
        "what": what + (ending if network.powers else f", which give x_{j}"),
        "recipe": {"name": run.name, "seed": run.seed, **recipe.science()},
        "input": _input(run),
        "output": {"shape": ["n", *shape], "dtype": "float32", "weights": network.powers},
        "classes": data["classes"] if network.powers else None,
        "test": tested,
        "trained": {
            "data": data["digest"],
            "features": run.nodes()[j].fingerprint,
            "layers": [
                {name: (run.layer(i) or {}).get(name) for name in ("weights", "auxiliary")}
                for i in range(1, j + 1)
            ],
            "final": final and {k: final[k] for k in ("name", "auxiliary")},
        },
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _input(run: Run) -> dict[str, Any]:
    """What the network is given."""
    recipe, data = run.recipe, run.recipe.data
    found: dict[str, Any] = {"mean": list(data.mean), "std": list(data.std)}
    if data.shape:
        return {"shape": ["n", *data.shape], "dtype": data.dtype, **found}
    return {
        "shape": ["n", data.channels, "height", "width"],
        "resized to": data.size,
        "dtype": "uint8",
        **found,
        "padded to": recipe.canvas,
        "cropped to": recipe.augment.crop,
    }


def _programs(run: Run, network: ExportedNetwork, images: Tensor, onnx: bool) -> dict[str, bytes]:
    """The network as one file by torch.export, by its name, and if wanted another one in ONNX."""
    try:
        program, buffer = _traced(network, images), io.BytesIO()
        with warnings.catch_warnings():
            # Kernels that lie channels last are whole all the same (they are read back, compared);
            # torch and onnxscript use what newer versions of themselves will not.
            warnings.simplefilter("ignore")
            torch.export.save(program, buffer)
            found = {PROGRAM: buffer.getvalue()}
            if onnx:
                how: Any = {"output_names": ["result"], "verbose": False}
                made = torch.onnx.export(program, dynamo=True, **how)
                assert made is not None
                found[ONNX] = made.model_proto.SerializeToString()
        return found
    except Exception as error:
        if not isinstance(run.recipe.layers[0], Block):
            raise
        raise UnusableNetwork(
            f"network {run.recipe.network.said} cannot be exported: torch.export does not "
            f"take one of its blocks: {type(error).__name__}: {first_line(error)}"
        ) from error


def _traced(network: ExportedNetwork, images: Tensor) -> ExportedProgram:
    """The network by torch.export, for any number of images of any one size, or of arrays."""
    # Of one image, torch takes the number for a constant.
    some = images[:2].expand(2, *[-1] * (images.ndim - 1))
    size = {} if network.recipe.data.shape else {2: Dim("height"), 3: Dim("width")}
    shapes = ({0: Dim("n"), **size},)
    with torch.no_grad():
        program = torch.export.export(network, (some,), dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # which names files of this machine
    return program


# ---- does it give what the run has? --------------------------------------------------------------


def _expected(
    run: Run,
    network: ExportedNetwork,
    layers: Sequence[Frozen],
    final: SweepResult | None,
    images: Tensor,
) -> Tensor:
    """What the run has of these images: logits that were kept, or x_j, or C_j of it where logits of
    tokens were not kept. Raises OptionRange: of those an ensemble would need all."""
    places = [run.layer_directory(i) for i in network.own]
    if final:
        places.append(run.sweep_directory(network.depth + 1) / final["name"])
    kept = [place / LOGITS for place in places]
    if kept and all(path.exists() for path in kept):
        logits = [read_npy(path) for path in kept]
        joint = summed(logits) if len(network.powers) > 1 else logits[-1]
        return torch.from_numpy(joint[: len(images)].astype(np.float32))
    if len(kept) > 1:
        raise OptionRange("--ensemble: logits of so many tokens are not kept. Leave it out")
    x = image_views(run.recipe, images, level_draws(run.recipe, run.seed, "clean", len(images)))
    x = featurize(layers, x, block=run.recipe.cache.block, compute=torch.float32)
    x = x.to(torch.float32)
    if not kept:
        return x
    classifier = network.final if final else network.get_submodule(f"classifier_{network.depth}")
    with torch.no_grad():
        return classifier(x)  # pyright: ignore[reportOptionalCall]


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    """Results of a program in ONNX, by the reference that its makers give."""
    from onnx.reference import ReferenceEvaluator  # pyright: ignore[reportMissingImports]

    (result,) = ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})
    return torch.from_numpy(result)


def _compared(run: Run, given: Tensor, expected: Tensor, whose: Path) -> dict[str, Any]:
    """How far results of the first test images are from those that they should be.

    Args:
        whose: the latter are, for messages.

    Raises:
        LevelDamaged: further than the precisions of the run explain.
    """
    furthest = float((given - expected).abs().max())
    largest = float(expected.abs().max())
    bits = min(BITS[name] for name in (run.recipe.cache.precision, run.compute, "float32"))
    bound = max(8, 2 * run.layers) * largest * 2.0**-bits  # every layer rounds
    # With data.jpeg, the run saw other pixels: those that ffcv decodes.
    if not furthest <= bound and not (run.recipe.data.jpeg and whose == run.directory):
        raise LevelDamaged(
            f"the exported network is {furthest:.3g} away from what {whose} has, of values "
            f"up to {largest:.3g}; rounding explains {bound:.3g}"
        )
    return {"images": len(given), "furthest": furthest, "largest": largest, "bound": bound}
