"""An exported network, loaded where this project is not, gives what `evaluate` has."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Place, made, tiny
from spoil import flip

from strata.pipeline.feed.features import frozen_layer
from strata.pipeline.results import plain_model
from strata.stages.solve.evaluate import ensemble
from strata.store.feature_store import Store
from strata.store.level.layout import LevelKey
from strata.store.level.level import Level

MODES = {
    "canvas": {},
    "fresh": {"views": 0},
    "fixed": {"views": 2, "precision": "uint8"},
}
BLOCK = 64
"""Rows of a forward pass in the recipe: with as many, kernels round alike."""
ELSEWHERE = """
import importlib.util, sys
packages, images, result, *exports = sys.argv[1:]
sys.path.append(packages)
ours = ("cli", "pipeline", "stages", "store")
assert all(importlib.util.find_spec(name) is None for name in ours)
import numpy, torch
x, found = torch.from_numpy(numpy.load(images)), {}
for export in exports:
    spec = importlib.util.spec_from_file_location("model", export + "/model.py")
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    forms = {"py": model.load(), "pt2": torch.export.load(export + "/model.pt2").module()}
    for form, network in forms.items():
        for rows in (1, 7, 64):
            with torch.no_grad():
                few = x if rows == 64 else x[: 2 * rows]
                z = torch.cat([network(part) for part in few.split(rows)])
            found[f"{export} {form} {rows}"] = z.numpy()
numpy.savez(result, **found)
"""


@dataclass(frozen=True)
class Exported:
    places: dict[str, Place]
    found: dict[str, np.ndarray]
    """Results of a process without this project, by directory, form and rows of a batch."""

    def results(self, directory: Path) -> dict[str, np.ndarray]:
        head = f"{directory} "
        return {k.removeprefix(head): v for k, v in self.found.items() if k.startswith(head)}


def level_of_tests(place: Place, depth: int) -> Level:
    run = place.overview().existing()
    name = run.nodes()[depth].fingerprint
    return Store(place.store).open(LevelKey(depth, name, "test", "clean"))


def images(place: Place) -> np.ndarray:
    level = level_of_tests(place, 0)
    return level.read(0, len(level))


def logits(place: Place, j: int) -> np.ndarray:
    return np.load(place.run / f"layer_{j}" / "test_logits.npy")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("exported")
    places, directories = {}, []
    for mode, changes in MODES.items():
        place = places[mode] = made(root / mode, 1, tiny(layers=2, epochs=1, **changes))
        assert place.do("train", "--layer", 2).rc == 0
        others = [["--ensemble"], ["--features", "--layer", 1]] if mode == "canvas" else []
        for more in [[], *others]:
            directories.append(place.root / "".join(["out", *map(str, more)]))
            done = place.do("export", "--to", directories[-1], *more)
            assert done.rc == 0, done.err
    np.save(root / "images.npy", images(places["canvas"]))
    packages = Path(torch.__file__).parent.parent
    command = [sys.executable, "-I", "-S", "-c", ELSEWHERE, packages, "images.npy", "z.npz"]
    subprocess.run([*command, *directories], cwd=root, check=True, timeout=200)
    return Exported(places, dict(np.load(root / "z.npz")))


@pytest.fixture
def place(exported: Exported, tmp_path: Path) -> Place:
    return exported.places["canvas"].copy(tmp_path / "place")


# ---- what it gives -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_evaluate(exported: Exported, mode: str) -> None:
    """To the bit in batches of the run's own size; in others, within what rounding explains."""
    place = exported.places[mode]
    expected, found = logits(place, 2), exported.results(place.root / "out")
    bound = json.loads((place.root / "out/export.json").read_text())["compared"]["bound"]
    assert bound < 0.05 * np.abs(expected).max()
    assert len(found) == 6
    for name, z in found.items():
        if name.endswith(str(BLOCK)):
            np.testing.assert_array_equal(z, expected, err_msg=name)
        np.testing.assert_allclose(z, expected[: len(z)], rtol=0, atol=bound, err_msg=name)


def test_features_are_the_rows_of_the_level(exported: Exported) -> None:
    place = exported.places["canvas"]
    level, found = level_of_tests(place, 1), exported.results(place.root / "out--features--layer1")
    stored = torch.from_numpy(level.read(0, len(level)).copy())
    codec = frozen_layer(place.overview().existing(), 1, torch.device("cpu")).stored
    expected = codec.decode(stored, stored.shape[-1]).numpy()
    for form in ("py", "pt2"):
        np.testing.assert_array_equal(found[f"{form} {BLOCK}"], expected)
        assert found[f"{form} 7"].shape == (14, *expected.shape[1:])


def test_the_ensemble_is_the_papers(exported: Exported) -> None:
    """Z = Σ_j 2^j z_j (Sec. 4), here divided by Σ_j 2^j."""
    place = exported.places["canvas"]
    expected = ensemble([logits(place, 1), logits(place, 2)])
    for name, z in exported.results(place.root / "out--ensemble").items():
        close = 1e-5 if name.endswith(str(BLOCK)) else 0.02
        np.testing.assert_allclose(z, expected[: len(z)], rtol=0, atol=close)
    said = json.loads((place.root / "out--ensemble/export.json").read_text())
    top1 = place.do("evaluate", "--json").json["layers"][1]["ensemble"]["logits"]["top1"]
    assert said["test"]["top1"] == top1


def test_the_description_says_what_it_is(exported: Exported) -> None:
    place = exported.places["canvas"]
    said = json.loads((place.root / "out/export.json").read_text())
    judged = place.do("evaluate", "--json").json["layers"][1]["test"]
    assert {name: said["test"][name] for name in judged} == judged
    assert said["classes"] == [str(digit) for digit in range(10)]
    assert (
        said["input"] | {"shape": ["n", 1, 8, 8], "dtype": "uint8", "mean": [0.3]} == said["input"]
    )
    assert said["compared"]["furthest"] <= said["compared"]["bound"]
    record = place.overview().existing().layer(2)
    assert record is not None
    assert said["trained"]["layers"][1]["weights"] == record["weights"]


def test_weights_have_plain_names(exported: Exported) -> None:
    network = plain_model.load(exported.places["canvas"].root / "out")
    assert {
        "layer_1.convolution.weight",
        "layer_2.norm.running_mean",
        "classifier_2.convolutions_0.weight",
        "classifier_2.linear.bias",
    } < set(network.state_dict())
    assert "classifier_1.linear.bias" not in network.state_dict()


def test_other_images_are_refused(exported: Exported) -> None:
    network = plain_model.load(exported.places["canvas"].root / "out")
    with pytest.raises(ValueError, match="not uint8"):
        network(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="12, 12"):
        network(torch.zeros(2, 1, 12, 12, dtype=torch.uint8))


# ---- what is refused -----------------------------------------------------------------------------


def test_a_damaged_weight_is_noticed_on_loading(exported: Exported, place: Place) -> None:
    flip(place.root / "out/weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        plain_model.load(place.root / "out")


def test_a_directory_that_exists_is_left_alone(place: Place) -> None:
    before = {p: p.read_bytes() for p in (place.root / "out").glob("*.*")}
    (place.root / "empty").mkdir()
    for name in ("out", "empty"):
        done = place.do("export", "--to", place.root / name)
        assert (done.rc, "Name a new directory" in done.error) == (2, True)
    assert {p: p.read_bytes() for p in (place.root / "out").glob("*.*")} == before


def test_a_layer_that_is_not_solved_is_named(place: Place) -> None:
    assert place.do("clean", "--layer", 2, "--yes").rc == 0
    done = place.do("export", "--to", place.root / "new")
    assert done.rc == 8
    assert "layer 2 is not solved" in done.error
    assert "train" in done.error
    assert "--layer 2" in done.error
    assert place.do("export", "--to", place.root / "new", "--layer", 3).rc == 2
    assert not (place.root / "new").exists()


@pytest.mark.parametrize(
    "name", ["layer_1/weights.safetensors", "layer_2/auxiliary.safetensors", "layer_2/layer.json"]
)
def test_damage_in_the_run_is_not_exported(place: Place, name: str) -> None:
    flip(place.run / name)
    before = set(place.root.iterdir())
    done = place.do("export", "--to", place.root / "new")
    assert (done.rc, Path(name).name in done.error) == (10, True)
    assert set(place.root.iterdir()) == before


def test_a_network_that_gives_something_else_is_not_exported(place: Place) -> None:
    path = place.run / "layer_2/test_logits.npy"
    np.save(path, np.roll(np.load(path), 1, axis=0))
    before = set(place.root.iterdir())
    done = place.do("export", "--to", place.root / "new")
    assert (done.rc, "rounding explains" in done.error) == (10, True)
    assert set(place.root.iterdir()) == before, "nothing is left behind"


def test_features_have_no_classifiers(place: Place) -> None:
    done = place.do("export", "--to", place.root / "new", "--features", "--ensemble")
    assert (done.rc, "leave out --ensemble" in done.error) == (2, True)
