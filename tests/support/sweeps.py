"""A run to sweep: layer 1 is solved, and variants of layer 2 are what is asked for."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from runs import Place, tiny

from strata.pipeline.recipe.recipe import parse
from strata.store.files.publish import replace, sealed, unseal

TEXT = tiny(layers=2, precision="uint8")
SOLVED = ("weights.safetensors", "auxiliary.safetensors", "test_logits.npy")
MANY = ("lr=0.1,0.3", "k=1,2", "epochs=1,2", "keep=last,best")


def sweep(place: Place, *vary: str, j: int = 2, options: tuple[Any, ...] = ()) -> Any:
    every = itertools.chain.from_iterable(("--vary", text) for text in vary)
    return place.do("sweep", "--layer", j, *every, *options)


def variant(place: Place, name: str, j: int = 2) -> Path:
    return place.run / f"sweep_{j}" / name


def solved(directory: Path) -> dict[str, Any]:
    """What must not depend on who solved it with whom."""
    lines = [json.loads(line) for line in (directory / "epochs.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return {name: (directory / name).read_bytes() for name in SOLVED} | {"curve": curve}


def trained(base: Place, root: Path, j: int = 2, **changes: Any) -> Path:
    """The directory of layer j, solved by ``train`` with a recipe of other settings, on the same
    layers below: a copied run whose recipe says that it was made so."""
    text = TEXT
    for key, value in changes.items():
        lines = text.splitlines()
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"{key} = ")] or [None]
        if at is None:
            lines.insert(at := lines.index("[schedule]") + 1, "")
        lines[at] = f"{key} = {json.dumps(value)}"
        text = "\n".join(lines)
    place = base.copy(root)
    for path in (place.root / "tiny.toml", place.run / "recipe.toml"):
        path.write_text(text)
    facts = unseal(place.run / "run.json")
    facts["science"] = parse(text, "tiny").science()
    replace(place.run, "run.json", sealed(facts))
    if j == 1:
        shutil.rmtree(place.run / "layer_1")
    done = place.do("train", "--layer", j)
    assert f"solved layer {j}" in done.err
    return place.run / f"layer_{j}"
