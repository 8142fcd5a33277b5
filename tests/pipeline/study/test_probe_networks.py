"""Probes of a network trained end to end, of any network on other images, and curves over runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import noise
from PIL import Image
from runs import Place, here, open_run, tiny
from spoil import TEXT, flip

from strata.pipeline.feed.problem_feed import clean_batches
from strata.pipeline.results import figures, separability
from strata.pipeline.run import probe_results, weights
from strata.pipeline.run.probe_results import Kind
from strata.stages.solve.baseline import build_end_to_end
from strata.store.files.publish import replace, sealed, unseal

SIDES = (8, 11, 16)


def draw(folder: Path, *, classes: int = 4, mode: str = "L", train: int = 12) -> Path:
    """Class folders of noise with one bright quadrant each, in several sizes."""
    for split, count in (("train", train), ("test", 6)):
        for label in range(classes):
            (folder / split / f"quadrant {label}").mkdir(parents=True)
            for i in range(count):
                side = SIDES[i % 3]
                image = noise(1000 * label + 10 * i + len(split), side, side) // 4
                y, x = (side // 2 * n for n in divmod(label, 2))
                image[y : y + side // 2, x : x + side // 2] += 150
                picture = Image.fromarray(image).convert(mode)
                picture.save(folder / split / f"quadrant {label}" / f"{i}.png")
    return folder


def shuffled(folder: Path, seed: int, size: int) -> Path:
    """The same sort of images, and labels that have nothing to do with them."""
    draw_, arrays = np.random.default_rng(seed), {}
    for split in ("train", "test"):
        images = draw_.integers(0, 64, (size, 8, 8), dtype=np.uint8)
        for i, quadrant in enumerate(draw_.integers(0, 4, size)):
            y, x = (4 * n for n in divmod(quadrant, 2))
            images[i, y : y + 4, x : x + 4] += 150
        arrays |= {f"x_{split}": images, f"y_{split}": draw_.integers(0, 4, size)}
    np.savez(folder / "shuffled.npz", **arrays)
    return folder / "shuffled.npz"


@pytest.fixture(scope="module")
def shown(sound: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Path]:
    """A run whose two layers were shown four quadrants, with their levels written, and probed."""
    place = sound.copy(tmp_path_factory.mktemp("shown") / "place")
    folder = draw(place.root / "quadrants")
    assert place.do("probe", "--transfer", f"imagefolder:{folder}", "--materialize").rc == 0
    return place, folder


@pytest.fixture
def place(shown: tuple[Place, Path], tmp_path: Path) -> Place:
    """A copy; the folder is where it was, so that it is the same source."""
    return shown[0].copy(tmp_path / "place")


def replica(place: Place) -> Path:
    (found,) = (place.run / "transfer").iterdir()
    return found


# ---- other images --------------------------------------------------------------------------------


def test_quadrants_are_told_apart_from_features_of_digits(shown: tuple[Place, Path]) -> None:
    place, folder = shown
    told = place.do("probe", "--transfer", f"imagefolder:{folder}", "--json").json
    assert told["done"] == []
    assert told["images"] == f"imagefolder:{folder}"
    assert [one["layer"] for one in told["probes"]] == [1, 2]
    for one in told["probes"]:
        assert (one["train"]["top1"], one["test"]["top1"]) == (1.0, 1.0)
    tensors, _ = weights.read(replica(place) / "probe_2/linear/weights.safetensors")
    assert tensors["classes"].tolist() == [0, 1, 2, 3], "not the ten of the digits"
    assert tensors["weight"].shape == (4, 4 * 16)


def test_a_cnn_tells_them_apart_too(place: Place, shown: tuple[Place, Path]) -> None:
    source = f"imagefolder:{shown[1]}"
    kind = ("--layer", 2, "--kind", "cnn", "--json")
    one = place.do("probe", "--transfer", source, *kind).json["probes"][-1]
    assert (one["kind"], one["made_of"]["classifier"]["classes"]) == ("cnn-1", 4)
    assert one["test"]["top1"] >= 0.25


def test_labels_that_have_nothing_to_do_with_the_images_are_guessed(place: Place) -> None:
    """200 test images, 4 classes: four standard deviations of chance are 0.12."""
    source = f"npz:{shuffled(place.root, 0, 200)}"
    told = place.do("probe", "--transfer", source, "--layer", 2, "--json").json
    assert abs(told["probes"][0]["test"]["top1"] - 0.25) < 0.12


def test_their_features_are_levels_of_their_own_that_the_run_uses(place: Place) -> None:
    run = place.overview().existing()
    other = next(n for n in probe_results.networks(run) if n.origins)
    own, theirs = run.nodes(), other.nodes()
    assert len(theirs) == 3
    assert not {n.fingerprint for n in own} & {n.fingerprint for n in theirs}
    for node in theirs:
        (directory,) = place.store.glob(f"x_{node.depth}-{node.fingerprint[:12]}")
        assert {p.name for p in directory.iterdir() if p.is_dir()} == (
            {"train.plain", "test"} if node.depth else {"train", "test"}
        )
    assert [n.intent["weights"] for n in theirs[1:]] == [n.intent["weights"] for n in own[1:]]
    assert place.do("verify", "--deep").rc == 0


def test_gc_leaves_them_alone(shown: tuple[Place, Path]) -> None:
    told = here("gc", "--store", shown[0].store)
    assert told.out == "nothing to collect: runs refer to every level\n"


def test_other_images_in_the_same_place_are_probed_again(
    place: Place, shown: tuple[Place, Path]
) -> None:
    folder = place.root / "moved"
    shutil.copytree(shown[1], folder)
    source = ("--transfer", f"imagefolder:{folder}", "--layer", 1, "--json")
    assert place.do("probe", *source).json["done"] == ["linear probe of x_1"]
    assert place.do("probe", *source).json["done"] == []
    shutil.rmtree(folder)
    draw(folder, classes=3)
    told = place.do("probe", *source).json
    assert told["done"] == ["linear probe of x_1"]
    assert place.do("probe", *source).json["done"] == []


def test_a_damaged_copy_or_level_is_named_and_mended(
    place: Place, shown: tuple[Place, Path]
) -> None:
    copy = replica(place) / "layer_2/weights.safetensors"
    other = next(n for n in probe_results.networks(place.overview().existing()) if n.origins)
    (level,) = place.store.glob(f"x_2-{other.nodes()[2].fingerprint[:12]}/train.plain")
    shard = next(level.glob("x/c.*"))
    good = copy.read_bytes(), shard.read_bytes()
    flip(shard, 100)
    told = place.do("verify", "--deep", "--repair")
    assert told.rc == 0
    assert f"mended x_2 train.plain: x/{shard.name} (the same values as before)" in told.out
    flip(copy)
    assert f"{copy}: it is not what layer.json says" in place.do("verify").out
    assert place.do("verify", "--repair").rc == 0
    assert not copy.exists()
    source = f"imagefolder:{shown[1]}"
    assert place.do("probe", "--transfer", source, "--json").json["done"] == []
    assert place.do("probe", "--transfer", source, "--kind", "cnn", "-l", 2).rc == 0
    assert (copy.read_bytes(), shard.read_bytes()) == good


@pytest.mark.parametrize(
    ("drawn", "spoil", "words"),
    [
        ({"classes": 1}, None, "the data set has one class, quadrant 0"),
        ({"mode": "RGB"}, None, "has colour (RGB), and the network was trained on 1 channel"),
        ({}, "test", "has no folder test/ or val/"),
        ({"train": 1}, None, "every class has a single training image"),
    ],
)
def test_images_that_cannot_be_probed_are_one_line(
    place: Place, drawn: dict[str, Any], spoil: str | None, words: str
) -> None:
    folder = draw(place.root / "other", **drawn)
    if spoil:
        shutil.rmtree(folder / spoil)
    told = place.do("probe", "--transfer", f"imagefolder:{folder}", "--layer", 1)
    assert told.rc == 4
    assert words in told.error


# ---- end to end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A greedy run and its network trained end to end, in uint8; both probed, and a second seed."""
    root = tmp_path_factory.mktemp("pair")
    (root / "tiny.toml").write_text(tiny(layers=2, epochs=1, precision="uint8"))
    place = Place(root, "runs/0")
    assert place.do("run").rc == 0
    assert place.do("baseline").rc == 0
    assert place.do("probe").rc == 0
    assert place.do("probe", "--of", "baseline").rc == 0
    other = Place(root, "runs/1", seed=1)
    assert other.do("run").rc == 0
    assert other.do("probe").rc == 0
    return place


def test_the_layers_of_the_network_trained_end_to_end_are_probed(pair: Place) -> None:
    """x_2 of its replica is that of the whole network, up to the codes in which it is stored: of
    crops, as it was trained, though the greedy layers were trained on crops of canvases."""
    told = pair.do("probe", "--of", "baseline", "--json").json
    assert (told["of"], told["done"]) == ("end to end, plain", [])
    network = probe_results.end_to_end(pair.overview().existing())
    session = dataclasses.replace(open_run(pair.root / "other", TEXT), run=network)
    session = dataclasses.replace(session, store=pair.overview().store)
    recipe = network.recipe
    whole = build_end_to_end(recipe.layers, recipe.auxiliaries[-1], 0).eval()
    whole.load_state_dict(weights.read(pair.run / "baseline/plain/weights.safetensors")[0])
    exact = torch.cat(list(clean_batches(session, 0)))
    with torch.inference_mode():
        for layer in whole.layers:
            exact = layer(exact)
    found = torch.cat(list(clean_batches(session, 2)))
    assert (found - exact).norm() < 0.02 * exact.norm()  # x_1 and x_2 are rounded to 254 steps
    assert found.shape[1:] == (16, 4, 4)


def test_a_replica_of_other_weights_is_not_believed(pair: Place, tmp_path: Path) -> None:
    place = pair.copy(tmp_path / "place")
    inside = place.run / "baseline/plain/network"
    path = inside / "layer_2/layer.json"
    replace(path.parent, path.name, sealed({**unseal(path), "origin": "of another training"}))
    network = probe_results.end_to_end(place.overview().existing())
    assert network.solved() == 1
    assert [one["layer"] for one in probe_results.results(network)] == [1]
    (inside / "probe_2/linear/result.json").unlink()
    told = place.do("probe", "--of", "baseline", "--json").json
    assert told["done"] == ["linear probe of x_2"]
    shutil.rmtree(place.run / "baseline")
    assert place.do("probe", "--of", "baseline").rc == 8


# ---- curves over runs ----------------------------------------------------------------------------


def test_the_report_has_curves_with_their_spread_over_seeds(pair: Place) -> None:
    told = pair.do("report", "--json").json["probes"]
    assert [(one["of"], one["kind"]) for one in told] == [
        ("greedy", "linear"),
        ("end to end, plain", "linear"),
    ]
    tests = [
        unseal(pair.root / f"runs/{seed}/probe_2/linear/result.json")["test"]["top1"]
        for seed in (0, 1)
    ]
    last = told[0]["points"][-1]
    assert (last["depth"], last["runs"]) == (2, 2)
    assert last["test"] == pytest.approx(np.mean(tests))
    assert last["spread"] == pytest.approx(np.std(tests, ddof=1))
    assert told[1]["points"][0]["runs"] == 1
    assert told[1]["points"][0]["spread"] is None
    page = (pair.run / "report.html").read_text("utf-8")
    assert "Separability against depth" in page
    assert "end to end, plain" in page


def test_another_recipe_beside_it_is_another_experiment(pair: Place, tmp_path: Path) -> None:
    place = pair.copy(tmp_path / "place")
    facts = place.root / "runs/1/run.json"
    body = unseal(facts)
    (facts.parent / "recipe.toml").write_text(tiny(layers=2, epochs=2, precision="uint8"))
    body["science"]["schedule"]["epochs"] = 2
    replace(facts.parent, facts.name, sealed(body))
    told = separability.curves(place.overview().existing(), [])
    assert {point["runs"] for one in told for point in one["points"]} == {1}


def _report(*kinds: str) -> dict[str, Any]:
    points = [
        {"depth": j, "test": 0.5 + 0.1 * j, "train": 0.9, "spread": 0.01, "runs": 3} for j in (1, 2)
    ]
    of = {"of": "greedy", "images": "imagefolder:$x^2", "metric": "top1", "points": points}
    return {"probes": [{**of, "kind": kind} for kind in kinds]}


@pytest.mark.parametrize("kinds", [["linear"], ["cnn-1", "cnn-2"], ["linear", "cnn-1"]])
def test_the_figure_speaks_its_values(kinds: list[str]) -> None:
    svg = figures.draw(separability.probes, _report(*kinds))
    assert svg.startswith("<svg")
    assert svg.count("x_1 60.0 %, x_2 70.0 %") == len(kinds)
    assert figures.draw(separability.probes, {"probes": []}) == ""


def test_kinds_are_in_the_order_of_their_hidden_layers() -> None:
    names = ["cnn-10", "cnn-2", "linear", "cnn-1"]
    assert [kind.name for kind in sorted(map(Kind.of, names))] == [
        "linear",
        "cnn-1",
        "cnn-2",
        "cnn-10",
    ]
