"""An exported network, loaded where this project is not, gives what `evaluate` has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import texts
import torch
from drawn import pixels
from PIL import Image
from runs import Place, made, tiny
from safetensors.torch import load_file
from spoil import flip

from strata.pipeline.feed.features import frozen_layer
from strata.pipeline.results.exported import resized
from strata.stages.solve.evaluate import ensemble
from strata.store.feature_store import Store, open_level
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
assert importlib.util.find_spec("strata") is None
import numpy, torch
x, found = torch.from_numpy(numpy.load(images)), {}
for export in exports:
    network = torch.export.load(export + "/model.pt2").module()
    for rows in (1, 7, 64):
        with torch.no_grad():
            few = x if rows == 64 else x[: 2 * rows]
            z = torch.cat([network(part) for part in few.split(rows)])
        found[f"{export} {rows}"] = z.numpy()
numpy.savez(result, **found)
"""


@dataclass(frozen=True)
class Exported:
    places: dict[str, Place]
    found: dict[str, np.ndarray]
    """Results of a process without this project, by directory and rows of a batch."""

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
    assert len(found) == 3
    for name, z in found.items():
        if name.endswith(str(BLOCK)):
            np.testing.assert_array_equal(z, expected, err_msg=name)
        np.testing.assert_allclose(z, expected[: len(z)], rtol=0, atol=bound, err_msg=name)


def test_features_are_the_rows_of_the_level(exported: Exported) -> None:
    place = exported.places["canvas"]
    level, found = level_of_tests(place, 1), exported.results(place.root / "out--features--layer1")
    stored = torch.from_numpy(level.read(0, len(level)).copy())
    codec = frozen_layer(place.overview().existing(), 1, torch.device("cpu")).stored
    expected = codec.decode(stored, stored.shape[1]).numpy()
    np.testing.assert_array_equal(found[str(BLOCK)], expected)
    assert found["7"].shape == (14, *expected.shape[1:])


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
    assert said["input"] | {"resized to": 8, "dtype": "uint8", "mean": [0.3]} == said["input"]
    assert said["compared"]["furthest"] <= said["compared"]["bound"]
    record = place.overview().existing().layer(2)
    assert record is not None
    assert said["trained"]["layers"][1]["weights"] == record["weights"]


def test_weights_have_plain_names(exported: Exported) -> None:
    state = load_file(exported.places["canvas"].root / "out/weights.safetensors")
    assert {
        "layer_1.convolution.weight",
        "layer_2.norm.running_mean",
        "classifier_2.convolutions.0.weight",
        "classifier_2.linear.bias",
    } < state.keys()
    assert "classifier_1.linear.bias" not in state


@pytest.mark.parametrize("shape", [(8, 8), (12, 12), (31, 20), (9, 40), (5, 7)])
def test_images_of_any_size_are_resized_as_a_run_does_it(shape: tuple[int, int]) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = pixels(Image.fromarray(drawn), 8, 3).astype(np.float32)
    found = resized(torch.from_numpy(drawn.transpose(2, 0, 1).copy())[None], 8)[0].numpy()
    if shape == (8, 8):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1)
    assert (found != expected).mean() < 0.05  # in steps of 255, at ties


def test_the_program_takes_images_of_another_size(exported: Exported) -> None:
    place = exported.places["canvas"]
    small = images(place)[:5]
    drawn = [Image.fromarray(one[0]).resize((24, 17)) for one in small]
    large = torch.from_numpy(np.stack([np.asarray(one)[None] for one in drawn]))
    again = np.stack([pixels(one, 8, 1) for one in drawn])
    program = torch.export.load(place.root / "out/model.pt2").module()
    with torch.no_grad():
        found, expected = program(large), program(torch.from_numpy(again))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=0.1)


# ---- in ONNX -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_onnx_gives_the_logits_of_the_program(exported: Exported, mode: str) -> None:
    """For any number of images of any size, but where a pixel falls on the other side of a step."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    place, more = exported.places[mode], ["--ensemble"] if mode == "canvas" else []
    out = place.root / "in-onnx"
    done = place.do("export", "--to", out, "--onnx", *more)
    assert done.rc == 0, done.err
    said = json.loads((out / "export.json").read_text())
    bound = said["compared"]["bound"]
    assert said["compared"]["onnx"]["furthest"] <= said["compared"]["onnx"]["bound"]
    assert set(said["files"]) == {"model.pt2", "weights.safetensors", "model.onnx"}
    for name in ("model.pt2", "model.onnx"):
        assert b"site-packages" not in (out / name).read_bytes()
    session = runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(out / "model.pt2").module()
    small = images(place)[:BLOCK]
    large = np.random.default_rng(0).integers(0, 256, (5, 1, 17, 24), dtype=np.uint8)
    for some in (small, small[:1], small[:7], large):
        (found,) = session.run(None, {"images": some})
        with torch.no_grad():
            expected = program(torch.from_numpy(some)).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
        np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_onnx_without_its_packages_is_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strata.pipeline.results.export.find_spec", lambda name: None)
    before = set(place.root.iterdir())
    done = place.do("export", "--to", place.root / "new", "--onnx")
    assert (done.rc, "pip install 'strata[onnx]'" in done.error) == (2, True)
    assert set(place.root.iterdir()) == before


# ---- what is refused -----------------------------------------------------------------------------


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


# ---- what is no image ---------------------------------------------------------------------------


def arrays(place: Path) -> str:
    """A recipe for 5 bands of 8×8 float32, and its data."""
    random = np.random.default_rng(0)
    found = {f"x_{s}": random.normal(size=(n, 5, 8, 8)).astype("f4") for s, n in SIZES.items()}
    found |= {f"y_{s}": np.arange(n) % 10 for s, n in SIZES.items()}
    np.savez(place / "bands.npz", **found)  # pyright: ignore[reportArgumentType]
    text = tiny(epochs=1, layers=2)
    data, rest = text[: text.index("[augment]")], text[text.index("[network]") :]
    for key in ("channels", "size", "mean", "std", "train", "test"):
        data = re.sub(rf"(?m)^{key} = .*\n", "", data)
    data = data.replace(
        '"digits"', f'"npz:{place}/bands.npz"\nshape = [5, 8, 8]\ndtype = "float32"'
    )
    return data + rest


SIZES = {"train": 128, "test": 40}
TEXTS = {"tokens": lambda place: texts.written(place, depth=2, epochs=1), "bands": arrays}


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("flags", [(), ("--features",)])
def test_arrays_and_tokens(tmp_path: Path, what: str, flags: tuple[str, ...]) -> None:
    (tmp_path / "tiny.toml").write_text(TEXTS[what](tmp_path))
    place = Place(tmp_path)
    assert place.do("run").rc == 0
    done = place.do("export", "--to", tmp_path / "net", "--json", *flags)
    assert done.rc == 0, done.err
    told = json.loads((tmp_path / "net/export.json").read_text())
    assert told["input"]["dtype"] == ("int32" if what == "tokens" else "float32")
    network = torch.export.load(tmp_path / "net/model.pt2").module()
    (level,) = (tmp_path / "store").glob("x_0-*/test")
    x = torch.from_numpy(open_level(level).read(0, 3))
    with torch.no_grad():
        given = network(x)
    assert list(given.shape[1:]) == told["output"]["shape"][1:]
    assert told["compared"]["furthest"] <= told["compared"]["bound"]
