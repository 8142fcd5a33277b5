"""`init`: what lies there becomes a recipe that can be planned and run as it is."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Result, noise, pets
from PIL import Image
from runs import inside

from strata.pipeline.commands.init import name_of, spec_of
from strata.pipeline.recipe.builtin import load


def recipe_of(said: Result) -> dict[str, Any]:
    """The recipe that was written, which is valid TOML."""
    assert said.rc == 0, said.out + said.err
    return tomllib.loads(json.loads(said.out)["recipe"])


def folder(root: Path, sides: tuple[int, int] = (40, 60), classes: str = "ab") -> Path:
    """Photos in class folders, without a split."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(noise(10 * label + i, *sides, 3)).save(root / name / f"{i}.png")
    return root


def arrays(path: Path, shape: tuple[int, ...], dtype: str = "float32", **labels: Any) -> Path:
    draw = np.random.default_rng(0)
    x = (draw.standard_normal((40, *shape)) * 50).astype(dtype)
    np.savez(path, x=x, y=labels.get("y", np.arange(40) % 4))
    return path


# ---- from nothing to a run -----------------------------------------------------------------------


def test_a_folder_of_photos_becomes_a_run(tmp_path: Path) -> None:
    folder(tmp_path / "photos", (10, 12))
    said = inside(tmp_path, "init", "photos")
    assert said.out.splitlines()[-1] == "wrote photos.toml; next: strata plan photos.toml"
    text = (tmp_path / "photos.toml").read_text()
    assert text in said.out
    assert "classes = 2                     # a, b" in text.splitlines()
    assert inside(tmp_path, "plan", "photos.toml").rc == 0
    (tmp_path / "photos.toml").write_text(text.replace("epochs = 30", "epochs = 1"))
    assert inside(tmp_path, "run", "photos.toml").rc == 0


def test_what_is_known_is_written_out(tmp_path: Path) -> None:
    pets(tmp_path / "pets")
    found = recipe_of(inside(tmp_path, "init", "imagefolder:pets", "--json"))
    data = found["data"]
    assert {k: data[k] for k in ("source", "classes", "train", "test", "channels", "size")} == {
        **{"source": "imagefolder:pets", "classes": 2, "train": 8, "test": 4},
        **{"channels": 3, "size": 12},
    }
    assert [len(data[key]) for key in ("mean", "std")] == [3, 3]
    assert found["claim"] == {"text": ""}
    _, recipe = load(str(tmp_path / "pets.toml"))
    recipe.check_layers()
    assert (recipe.data.mean, recipe.data.std) == (tuple(data["mean"]), tuple(data["std"]))


def test_data_without_a_split_get_one(tmp_path: Path) -> None:
    folder(tmp_path / "photos")
    assert recipe_of(inside(tmp_path, "init", "photos", "--json"))["data"]["split"] == 0.2
    said = inside(tmp_path, "init", "photos", "--split", 0.5, "--to", "sub/b.toml", "--json")
    assert recipe_of(said)["data"]["split"] == 0.5
    assert json.loads(said.out)["next"] == "strata plan sub/b.toml"
    assert (tmp_path / "sub/b.toml").exists()


@pytest.mark.parametrize("sides", [(8, 8), (9, 30), (28, 28), (33, 47), (63, 64), (130, 120)])
def test_images_of_any_size_get_a_network_that_fits(tmp_path: Path, sides: tuple[int, int]) -> None:
    folder(tmp_path / "photos", sides)
    found = recipe_of(inside(tmp_path, "init", "photos", "--json"))
    size = found["data"]["size"]
    assert min(96, min(sides)) - 7 <= size <= min(96, max(8, min(sides)))
    assert found["augment"]["crop"] == size
    assert inside(tmp_path, "plan", "photos.toml").rc == 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((20,), "float32"),
        ((3, 50), "float16"),
        ((12, 16, 20), "uint16"),
        ((1, 6, 6, 6), "float32"),
        ((5, 7, 9), "float32"),
        ((300,), "float64"),
    ],
)
def test_arrays_of_any_shape_become_a_layer(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    arrays(tmp_path / "a.npz", shape, dtype)
    found = recipe_of(inside(tmp_path, "init", "a.npz", "--json"))
    assert tuple(found["data"]["shape"]) == shape
    assert "augment" not in found
    text = (tmp_path / "a.toml").read_text()
    (tmp_path / "a.toml").write_text(text.replace("epochs = 30", "epochs = 1"))
    said = inside(tmp_path, "train", "a.toml", "--layer", 1)
    assert said.rc == 0, said.err
    assert (tmp_path / "a_blocks.py").exists() is (len(shape) != 3)


@pytest.mark.parametrize(
    ("labels", "name", "classes"),
    [
        (np.linspace(-3, 3, 40), "mse", 1),
        (np.linspace(-3, 3, 80).reshape(40, 2), "mse", 2),
        ((np.arange(160).reshape(40, 4) % 3 == 0).astype("f4"), "bce", 4),
    ],
)
def test_labels_that_are_no_classes_get_their_loss(
    tmp_path: Path, labels: np.ndarray, name: str, classes: int
) -> None:
    arrays(tmp_path / "a.npz", (20,), y=labels)
    found = recipe_of(inside(tmp_path, "init", "a.npz", "--json"))
    assert (found["loss"], found["data"]["classes"]) == ({"name": name}, classes)
    text = (tmp_path / "a.toml").read_text()
    (tmp_path / "a.toml").write_text(text.replace("epochs = 30", "epochs = 1"))
    said = inside(tmp_path, "train", "a.toml", "--layer", 1)
    assert said.rc == 0, said.err


def test_transformers_are_trained_by_adamw(tmp_path: Path) -> None:
    folder(tmp_path / "photos")
    said = inside(tmp_path, "init", "photos", "--network", "torchvision:vit_b_16", "--json")
    found = recipe_of(said)
    assert found["schedule"]["optimizer"] == "adamw"
    assert (found["schedule"]["kind"], found["data"]["size"]) == ("cosine", 224)


def test_a_pretrained_network_is_given_what_it_was_trained_with(tmp_path: Path) -> None:
    folder(tmp_path / "photos")
    names = ("--network", "torchvision:resnet18", "--weights", "r18.safetensors", "--frozen", "8")
    found = recipe_of(inside(tmp_path, "init", "photos", *names, "--json"))
    assert found["network"] == {
        **{"name": "torchvision:resnet18", "weights": "r18.safetensors", "frozen": 8},
    }
    assert (found["data"]["size"], found["data"]["mean"]) == (224, [0.485, 0.456, 0.406])
    assert found["augment"] == {"crop": 224, "views": 1}


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    folder(tmp_path / "photos")
    code = "from torch import nn\ndef net():\n    return [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)]\n"
    (tmp_path / "net.py").write_text(code)
    found = recipe_of(inside(tmp_path, "init", "photos", "--network", "net.py:net", "--json"))
    assert found["network"] == "net.py:net"
    assert found["data"]["size"] == 40
    assert found["auxiliary"] == {"k": 1}


# ---- what is refused -----------------------------------------------------------------------------


def test_nothing_is_written_over(tmp_path: Path) -> None:
    arrays(tmp_path / "a.npz", (20,))
    (tmp_path / "a.toml").write_text("mine")
    said = inside(tmp_path, "init", "a.npz")
    assert (said.rc, (tmp_path / "a.toml").read_text()) == (2, "mine")
    assert "a.toml exists already: name another file with --to, or remove it" in said.error
    (tmp_path / "b_blocks.py").write_text("mine")
    said = inside(tmp_path, "init", "a.npz", "--to", "b.toml")
    assert (said.rc, (tmp_path / "b_blocks.py").read_text()) == (2, "mine")
    assert not (tmp_path / "b.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing"], 4, "unknown data source 'nothing'"),
        (["imagefolder:nothing"], 4, "nothing"),
        (["photos", "--to", "a.yaml"], 2, "--to a.yaml must end in .toml"),
        (["a\nb"], 2, "has characters that a recipe cannot hold"),
        (["tokens.npz"], 2, "a network must embed them: name one with --network"),
        (["photos", "--network", "gone.py:net"], 3, "gone.py"),
        (["photos", "--network", "torchvision:vit_b_16", "--frozen", "99"], 3, "99"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_no_recipe(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    folder(tmp_path / "photos")
    np.savez(tmp_path / "tokens.npz", x=np.zeros((9, 16), np.int64), y=np.zeros((9, 16), np.int64))
    found = inside(tmp_path, "init", *arguments)
    assert found.rc == code
    assert said in found.error
    assert list(tmp_path.glob("*.toml")) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("imagefolder:~/My Photos.tar.xz", "my-photos"),
        ("digits", "digits"),
        ("python:sets/my.py:make", "my"),
        ("hf:some/beans", "beans"),
        ("torchvision:CIFAR10", "cifar10"),
    ],
)
def test_a_recipe_is_named_by_its_data(source: str, name: str) -> None:
    assert name_of(source) == name


def test_a_path_is_understood(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for file in ("a.npz", "b.csv", "c.tar"):
        (tmp_path / file).touch()
    kinds = {"photos": "imagefolder", "a.npz": "npz", "b.csv": "csv", "c.tar": "imagefolder"}
    for file, kind in kinds.items():
        assert spec_of(str(tmp_path / file)) == f"{kind}:{tmp_path / file}"
    assert spec_of("npz:a.npz") == "npz:a.npz"
    for file, kind in {"dataset_dict.json": "hf", "train.parquet": "hf", "x.npy": "npz"}.items():
        (tmp_path / file / file).mkdir(parents=True)
        assert spec_of(str(tmp_path / file)) == f"{kind}:{tmp_path / file}"
