"""Runs of a named network: every command, the cache, and what the run keeps of the network."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import RESIDUAL, beside, named
from runs import Place, here, open_run
from spoil import flip

from strata.pipeline.feed.features import frozen_layer
from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.recipe.named_network import NamedNetwork
from strata.pipeline.run.levels import inventory
from strata.pipeline.train import algorithm
from strata.pipeline.train.train import solve
from strata.stages.network.spec import described
from strata.store.feature_store import Store
from strata.store.level.layout import LevelKey

LOOKS = """
import sys
from strata import cli
try:
    cli.main(sys.argv[1:])
finally:
    print([name for name in ("torch", "torchvision") if name in sys.modules], file=sys.stderr)
"""
ELSEWHERE = """
import importlib.util, sys
packages, images, result, export = sys.argv[1:]
sys.path.append(packages)
assert importlib.util.find_spec("stages") is None
import numpy, torch
x, network = torch.from_numpy(numpy.load(images)), torch.export.load(export).module()
with torch.no_grad():
    numpy.save(result, torch.cat([network(part) for part in x.split(64)]).numpy())
"""


def run_of(root: Path, text: str = "") -> Place:
    """Three blocks solved, and x_1 and x_2 written."""
    beside(root)
    (root / "tiny.toml").write_text(text or named(epochs=1))
    place = Place(root)
    assert place.do("run").rc == 0
    return place


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Not to be changed."""
    return run_of(tmp_path_factory.mktemp("residual") / "place")


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ['"canvas"', "2", "0"])
@pytest.mark.parametrize("precision", ["float16", "uint8"])
def test_cache_equals_recompute(tmp_path: Path, views: str, precision: str) -> None:
    """Residual blocks with batch norm: every batch, and so the weights, to the bit."""
    text = named(views=views, precision=precision, epochs=1)
    places = [beside(tmp_path / name) for name in ("cached", "recomputed")]
    cached, recomputed = (open_run(place, text) for place in places)
    algorithm.make(cached, solve=3)
    for j in (1, 2, 3):
        solve(recomputed, j, cached=False)
    assert not inventory(recomputed.run, recomputed.store).written
    with ProblemFeed(cached, 2) as one, ProblemFeed(recomputed, 2, cached=False) as other:
        assert (one.features.base, other.features.base) == (2 if views != "0" else 0, 0)
        for (x, y), (again, labels) in zip(one.epoch(5), other.epoch(5), strict=True):
            assert torch.equal(x, again)
            assert torch.equal(y, labels)
    for j in (1, 2, 3):
        mine, theirs = cached.run.layer(j), recomputed.run.layer(j)
        assert mine is not None
        assert theirs is not None
        for name in ("weights", "auxiliary", "scales", "train", "test"):
            assert mine[name] == theirs[name], (j, name)


def test_frozen_blocks_stay_as_they_are(tmp_path: Path) -> None:
    """Batch norm in eval mode: what batch a row is in makes no difference, nor do later steps."""
    session = open_run(beside(tmp_path / "place"), named(epochs=1))
    algorithm.make(session, solve=2)
    before = (session.run.layer(1) or {})["weights"]
    algorithm.make(session, solve=3, write=3)
    assert (session.run.layer(1) or {})["weights"] == before
    layer = frozen_layer(session.run, 2, session.device).layer
    x = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x)[3:5], layer(x.roll(-3, 0))[:2])


def test_a_levels_intent_has_the_blocks_digest(sound: Place) -> None:
    run = sound.overview().existing()
    intent = run.nodes()[2].intent
    assert intent["layer"] == described(run.recipe.layers[1])
    assert len(intent["layer"]["digest"]) == 64


# ---- what the run keeps --------------------------------------------------------------------------


def looked(place: Place, *arguments: object) -> str:
    """Names of heavy libraries that a command has imported, as it says itself."""
    line = [sys.executable, "-c", LOOKS, *map(str, arguments)]
    done = subprocess.run(line, cwd=place.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["status", "run", "plan"])
def test_looking_at_a_run_makes_no_block(sound: Place, command: str) -> None:
    assert looked(sound, command, *sound.options) == "[]"


def test_the_recipes_are_listed_without_making_blocks(sound: Place) -> None:
    assert looked(sound, "recipes") == "[]"


def test_another_file_is_another_recipe(sound: Place, tmp_path: Path) -> None:
    place = sound.copy(tmp_path / "place")
    beside(place.root, RESIDUAL.replace("2 * width", "3 * width"))
    done = place.do("status")
    assert (done.rc, "network.code" in done.error, "another recipe" in done.error) == (
        8,
        True,
        True,
    )


def test_a_run_goes_on_with_its_own_copy(sound: Place, tmp_path: Path) -> None:
    """The recipe in the run's directory names the file beside it."""
    place = sound.copy(tmp_path / "place")
    assert (place.run / "residual.py").read_text() == RESIDUAL
    (place.root / "residual.py").unlink()
    assert (place.root / "tiny.toml").exists()
    assert place.do("status").rc == 3
    assert place.do("clean", "--layer", 3, "--yes").rc == 3
    options = ("--run", place.run, "--store", place.store)
    own = place.run / "recipe.toml"
    assert here("clean", own, *options, "--layer", 3, "--yes").rc == 0
    before = (sound.run / "layer_3/weights.safetensors").read_bytes()
    assert here("run", own, *options).rc == 0
    assert (place.run / "layer_3/weights.safetensors").read_bytes() == before


def test_an_edited_copy_is_refused(sound: Place, tmp_path: Path) -> None:
    place = sound.copy(tmp_path / "place")
    beside(place.run, RESIDUAL + "\n")
    done = place.do("status")
    assert (done.rc, "a file it names, was edited" in done.error) == (8, True)


def test_a_damaged_record_of_blocks_is_named_and_mended(sound: Place, tmp_path: Path) -> None:
    place = sound.copy(tmp_path / "place")
    whole = (place.run / "network.json").read_bytes()
    flip(place.run / "network.json", 100)
    found = place.do("verify")
    assert (found.rc, "network.json" in found.out) == (10, True)
    assert place.do("verify", "--repair").rc == 0
    assert (place.run / "network.json").read_bytes() == whole


def test_damaged_weights_of_a_block_are_solved_again(sound: Place, tmp_path: Path) -> None:
    place = sound.copy(tmp_path / "place")
    path = place.run / "layer_2/weights.safetensors"
    flip(path)
    assert place.do("verify", "--deep").rc == 10
    assert place.do("verify", "--deep", "--repair").rc == 0
    assert path.read_bytes() == (sound.run / "layer_2/weights.safetensors").read_bytes()


def test_blocks_of_another_torchvision_are_not_used(sound: Place, tmp_path: Path) -> None:
    """What a run has recorded does not fit what the source makes today."""
    session = open_run(beside(tmp_path / "place"), named(epochs=1))
    network = session.run.recipe.network
    assert isinstance(network, NamedNetwork)
    other = tuple(replace(block, digest="0" * 64) for block in session.run.recipe.layers)
    recipe = replace(session.run.recipe, network=replace(network, known=other))
    session = replace(session, run=replace(session.run, recipe=recipe))
    with pytest.raises(Exception, match="another version of torchvision"):
        solve(session, 1)


# ---- commands ------------------------------------------------------------------------------------


def test_plan_says_which_blocks_there_are(sound: Place) -> None:
    said = sound.do("plan", "--json").json
    assert [block["name"] for block in said["blocks"]] == [
        "blocks[0] (Sequential)",
        "blocks[1] (Residual)",
        "blocks[2] (Residual)",
    ]
    assert [depth["shape"] for depth in said["depths"][1:]] == [
        [8, 12, 12],
        [8, 12, 12],
        [16, 6, 6],
    ]
    assert all(depth["memory_bytes"] > 0 for depth in said["depths"][1:])
    assert "3 blocks, each a layer: 1 blocks[0] (Sequential)" in " ".join(
        sound.do("plan").out.split()
    )


def test_micro_batches_are_chosen_for_blocks(sound: Place) -> None:
    peaks = [depth["memory_bytes"] for depth in sound.do("plan", "--json").json["depths"][1:]]
    cap = f"{max(peaks) * 0.7 / 1e6:.3f}MB"
    said = sound.do("plan", "--json", "--gpu-memory", cap).json["accumulate"]
    assert [n > 1 for n in said] == [peak > max(peaks) * 0.7 for peak in peaks]


def test_other_commands_work_on_blocks(sound: Place, tmp_path: Path) -> None:
    place = sound.copy(tmp_path / "place")
    assert place.do("materialize", "--layer", 3).rc == 0
    assert place.do("baseline", "--checkpointing").rc == 0
    assert place.do("probe").rc == 0
    assert place.do("probe", "--of", "baseline", "--layer", 3).rc == 0
    assert place.do("report").rc == 0
    swept = place.do("sweep", "--layer", 2, "--vary", "schedule.lr=0.05,0.1", "--json")
    assert swept.rc == 0
    weights = [place.run / "sweep_2" / f"lr={lr}/weights.safetensors" for lr in ("0.05", "0.1")]
    solved = (place.run / "layer_2/weights.safetensors").read_bytes()
    assert [path.read_bytes() == solved for path in weights] == [False, True]
    done = place.do("sweep", "--layer", 2, "--vary", "width=4")
    assert (done.rc, "block of residual.py:blocks" in done.error) == (2, True)
    assert place.do("verify", "--deep").rc == 0


def images_of(place: Place, depth: int = 0) -> np.ndarray:
    run = place.overview().existing()
    level = Store(place.store).open(
        LevelKey(depth, run.nodes()[depth].fingerprint, "test", "clean")
    )
    return level.read(0, len(level))


def test_an_export_of_residual_blocks_loads_without_strata(sound: Place, tmp_path: Path) -> None:
    place = sound.copy(tmp_path / "place")
    done = place.do("export", "--to", tmp_path / "out")
    assert done.rc == 0, done.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.pt2",
        "weights.safetensors",
        "export.json",
    }
    np.save(tmp_path / "images.npy", images_of(place))
    packages = Path(torch.__file__).parent.parent
    given = [packages, "images.npy", "z.npy", tmp_path / "out/model.pt2"]
    command = [sys.executable, "-I", "-S", "-c", ELSEWHERE, *map(str, given)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=200)
    expected = np.load(place.run / "layer_3/test_logits.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), expected)
    said = json.loads((tmp_path / "out/export.json").read_text())
    assert said["recipe"]["network"]["name"] == "residual.py:blocks"


PAINTED = """
[data]
source = "npz:{place}"
classes = 3
channels = 3
size = 64
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
train = 24
test = 9
[augment]
crop = 64
views = {views}
allow_single_view = true
[auxiliary]
k = 2
width = 4
[schedule]
kind = "one-cycle"
epochs = 1
batch = 8
lr = 0.01
precision = "float32"
[cache]
precision = "float16"
block = 16
"""


@pytest.mark.parametrize(
    ("name", "views", "blocks"),
    [
        ("resnet18", '"canvas"', 9),
        ("mobilenet_v3_small", "1", 13),
        ("vgg11_bn", '"canvas"', 8),
    ],
)
@pytest.mark.slow
def test_models_of_torchvision(tmp_path: Path, name: str, views: str, blocks: int) -> None:
    """Solved block by block, cached, evaluated and exported: no weight is pretrained."""
    generator = np.random.default_rng(0)
    arrays = {
        f"{what}_{split}": array
        for split, count in (("train", 24), ("test", 9))
        for what, array in {
            "x": generator.integers(0, 255, (count, 64, 64, 3), np.uint8),
            "y": np.arange(count) % 3,
        }.items()
    }
    np.savez(tmp_path / "images.npz", **arrays)
    text = f'network = "torchvision:{name}"\n' + PAINTED.format(
        place=tmp_path / "images.npz", views=views
    )
    (tmp_path / "tiny.toml").write_text(text)
    place = Place(tmp_path)
    done = place.do("run", "--json")
    assert done.rc == 0, done.err
    assert f"solve layer {blocks}" in done.json["done"]
    assert len(place.do("evaluate", "--json").json["layers"]) == blocks
    assert place.do("export", "--to", tmp_path / "out").rc == 0
    z = torch.export.load(tmp_path / "out/model.pt2").module()(torch.from_numpy(images_of(place)))
    logits = np.load(place.run / f"layer_{blocks}/test_logits.npy")
    np.testing.assert_allclose(z.detach().numpy(), logits, atol=0.01 * np.abs(logits).max())
