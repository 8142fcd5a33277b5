"""`audit --features`: caches that other programs wrote, right and wrong in the ways that happen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Result
from PIL import Image
from runs import inside
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TRAIN, TEST, SIDE = 60, 30, 12
FILE = """
from torch import nn

def blocks():
    return [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    ]
"""
RECIPE = f"""
[network]
name = "net.py:blocks"
weights = "net.safetensors"
frozen = "all"
[data]
source = "npz:data.npz"
classes = 4
train = {TRAIN}
test = {TEST}
channels = 3
size = {SIDE}
mean = {list(MEAN)}
std = {list(STD)}
[augment]
crop = {SIDE}
views = 1
[auxiliary]
k = 1
[schedule]
kind = "one-cycle"
epochs = 1
batch = 16
lr = 0.1
"""


class Theirs:
    """What somebody else has: images, labels, a network, and a folder for features."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "cache"
        namespace: dict[str, Any] = {}
        exec(FILE, namespace)
        with torch.random.fork_rng():
            self.network = nn.Sequential(*namespace["blocks"]()).eval()
        self.network.load_state_dict(torch.load(root / "net.pth"))
        found = np.load(root / "data.npz")
        self.images = {s: found[f"x_{s}"] for s in ("train", "test")}
        self.labels = {s: found[f"y_{s}"] for s in ("train", "test")}

    def prepared(self, split: str = "train") -> Tensor:
        x = torch.from_numpy(self.images[split]).movedim(-1, 1).float() / 255
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    @torch.no_grad()
    def maps(self, x: Tensor | None = None) -> np.ndarray:
        """x_2 of the training images, or of others."""
        return self.network(self.prepared() if x is None else x).numpy()

    def pooled(self, x: Tensor | None = None) -> np.ndarray:
        return self.maps(x).mean((2, 3))

    def save(self, name: str, array: np.ndarray) -> None:
        np.save(self.folder / name, array)

    def audit(self, *arguments: object) -> Result:
        return inside(
            self.root, "audit", "theirs.toml", "--features", "cache", "--rows", 100, *arguments
        )

    def wrong(self, *arguments: object) -> dict[str, Any]:
        """What is found of the training split, which is not what it should be."""
        said = self.audit("--json", *arguments)
        assert said.rc == 10, said.out + said.err
        assert "cache is not what net.py:blocks gives for the data" in said.error
        found = json.loads(said.out)["levels"][0]
        assert all(reason in said.error for reason in found["why"])
        return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign") / "home"
    (root / "cache").mkdir(parents=True)
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", TRAIN), ("test", TEST)):
        small = draw.integers(0, 256, (n, 4, 4, 3))
        arrays[f"x_{split}"] = small.repeat(3, 1).repeat(3, 2).astype(np.uint8)
        arrays[f"y_{split}"] = np.arange(n) * 7 % 4
    np.savez(root / "data.npz", **arrays)
    namespace: dict[str, Any] = {}
    exec(FILE, namespace)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(*namespace["blocks"]())
        network(torch.randn(64, 3, SIDE, SIDE))  # batch norms have statistics
    torch.save(network.state_dict(), root / "net.pth")
    save_file(network.state_dict(), root / "net.safetensors")
    (root / "net.py").write_text(FILE)
    (root / "theirs.toml").write_text(RECIPE)
    return root


@pytest.fixture
def theirs(tmp_path: Path, home: Path) -> Theirs:
    shutil.copytree(home, tmp_path / "home")
    return Theirs(tmp_path / "home")


# ---- what is right -------------------------------------------------------------------------------

Written = Callable[[Theirs], None]


def npy(they: Theirs) -> None:
    for split in ("train", "test"):
        they.save(f"features_{split}", they.pooled(they.prepared(split)))
        they.save(f"labels_{split}", they.labels[split])


def npz(they: Theirs) -> None:
    for split, name in (("train", "train"), ("test", "val")):
        arrays = {"x": they.maps(they.prepared(split)), "y": they.labels[split]}
        np.savez(they.folder / name, paths=np.array(["a.jpg"] * len(arrays["y"])), **arrays)


def safetensors_in_parts(they: Theirs) -> None:
    """Parts 9 and 10 in their order, which is not that of their names; half precision."""
    maps = torch.from_numpy(they.maps()).movedim(1, -1).half()
    for part, rows in ((9, slice(0, 25)), (10, slice(25, None))):
        tensors = {"features": maps[rows], "targets": torch.from_numpy(they.labels["train"][rows])}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, they.folder / f"part-{part}.safetensors")


def both_splits_in_one(they: Theirs) -> None:
    rows = [they.pooled(they.prepared(split)) for split in ("train", "test")]
    they.save("embeddings", np.concatenate(rows).astype(np.float64))
    they.save("y", np.eye(4)[np.concatenate([*they.labels.values()])])  # one-hot


@pytest.mark.parametrize(
    ("written", "form", "rows"),
    [
        (npy, "x_2, averaged over all places", [TRAIN, TEST]),
        (npz, "x_2", [TRAIN, TEST]),
        (safetensors_in_parts, "x_2, channels last", [TRAIN]),
        (both_splits_in_one, "x_2, averaged over all places", [TRAIN, TEST]),
    ],
)
def test_what_is_right_is_found_equal(
    theirs: Theirs, written: Written, form: str, rows: list[int]
) -> None:
    written(theirs)
    said = theirs.audit("--json")
    assert said.rc == 0, said.out + said.err
    found = said.json["levels"]
    assert [one["rows"] for one in found] == rows
    assert [one["level"] for one in found] == [f"{s}, {form}" for s in ("train", "test")][
        : len(rows)
    ]
    lines = theirs.audit().out.splitlines()
    assert lines[0] == (
        f"train, {form}: {TRAIN} of {TRAIN} equal: these are all rows; labels of all rows are right"
    )
    assert any("paths in train.npz is left out" in line for line in lines) is (written is npz)


def test_a_layer_below_is_named_and_the_bound_is_told(theirs: Theirs) -> None:
    with torch.no_grad():
        theirs.save("train", theirs.network[0](theirs.prepared()).numpy())
    said = theirs.audit("--layer", 1, "--rows", 20)
    assert said.rc == 0
    assert said.out.splitlines() == [
        "train, x_1: 20 of 20 equal: with 95 % confidence fewer than 13.92 % of rows differ"
    ]


def test_a_network_and_data_that_are_named_need_no_recipe(theirs: Theirs) -> None:
    """With the mean and std of the data, as `init` writes them."""
    x = torch.from_numpy(theirs.images["train"]).movedim(-1, 1).float() / 255
    mean, std = (f(x.double(), (0, 2, 3)).view(3, 1, 1).float() for f in (torch.mean, torch.std))
    theirs.save("train", theirs.pooled((x - mean) / std))
    names = ["--network", "net.py:blocks", "--weights", "net.safetensors", "--data", "npz:data.npz"]
    said = inside(theirs.root, "audit", "--features", "cache", *names)
    assert said.rc == 0, said.out + said.err
    assert f"{TRAIN} of {TRAIN} equal" in said.out


# ---- what is wrong -------------------------------------------------------------------------------


def test_a_value_that_differs_is_named(theirs: Theirs) -> None:
    rows = theirs.pooled()
    rows[17, 3] += 1
    theirs.save("train", rows)
    found = theirs.wrong()
    assert found["different"] == [17]
    first = found["first"]
    assert (first["row"], first["value"], first["name"]) == (17, 3, "train/17")
    assert first["stored"] == pytest.approx(first["expected"] + 1)
    assert "row 17 (sample 17, train/17), value 3: " in theirs.audit().out


def test_rows_in_another_order(theirs: Theirs) -> None:
    order = np.random.default_rng(1).permutation(TRAIN)
    theirs.save("train", theirs.pooled()[order])
    (reason,) = theirs.wrong()["why"]
    where = int(np.flatnonzero(order == found)[0]) if (found := first_sample(reason)) >= 0 else -1
    assert f"sample {found} in row {where}, " in reason
    assert "off" not in reason


def first_sample(reason: str) -> int:
    return int(reason.split("sample ")[1].split()[0])


def test_rows_that_are_all_shifted(theirs: Theirs) -> None:
    theirs.save("train", theirs.pooled()[1:])
    found = theirs.wrong()
    assert f"{TRAIN - 1} rows, and {TRAIN} samples" in found["beside"]
    assert "all -1 rows off" in found["why"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda they: they.prepared().flip(-1), "mirrored"),
        (lambda they: raw(they), "without mean and std"),
        (lambda they: raw(they) * 255, "in 0…255"),
        (lambda they: raw(they) * 2 - 1, "in -1…1"),
        (lambda they: normal(they, raw(they).flip(1)), "with blue before red"),
        (lambda they: they.prepared().transpose(-1, -2), "turned on their side"),
    ],
)
def test_other_preprocessing_is_named(
    theirs: Theirs, change: Callable[[Theirs], Tensor], said: str
) -> None:
    theirs.save("train", theirs.pooled(change(theirs)))
    found = theirs.wrong()
    assert f"preprocessing: rows are equal where images are {said}" in found["why"]
    assert len(found["different"]) == TRAIN


def raw(they: Theirs) -> Tensor:
    return torch.from_numpy(they.images["train"]).movedim(-1, 1).float() / 255


def normal(they: Theirs, x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(
    ("theirs_resize", "said"),
    [
        (lambda image: image.resize((SIDE, SIDE), 2), "resized to a square, whatever their shape"),
        (
            lambda image: center_crop(resize(image, [SIDE]), [SIDE]),
            f"resized to {SIDE} and cut, as torchvision does",
        ),
        (
            lambda image: center_crop(resize(image, [SIDE + 2]), [SIDE]),
            f"resized to {SIDE + 2} and cut to {SIDE}, as torchvision does",
        ),
    ],
)
def test_images_that_were_resized_otherwise(
    theirs: Theirs, theirs_resize: Callable[[Any], Any], said: str
) -> None:
    """The recipe cuts the middle out of photos that are not square."""
    draw, tensors = np.random.default_rng(2), []
    for split, kind in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (folder := theirs.root / "photos" / split / kind).mkdir(parents=True)
        for i in range(6):
            wide = draw.integers(0, 256, (5, 11, 3), dtype=np.uint8).repeat(7, 0).repeat(6, 1)
            image = Image.fromarray(wide)
            image.save(folder / f"{i}.png")
            small = np.asarray(theirs_resize(image))
            tensors += [torch.from_numpy(small.copy()).movedim(-1, 0) / 255] * (split == "train")
    theirs.save("train", theirs.pooled(normal(theirs, torch.stack(tensors))))
    found = theirs.wrong("--data", "imagefolder:photos")
    assert found["why"] == [f"preprocessing: rows are equal where images are {said}"]


def test_what_is_only_less_exact_is_told_from_what_is_wrong(theirs: Theirs) -> None:
    draw = np.random.default_rng(3)
    rows = theirs.pooled()
    theirs.save("train", rows * (1 + 0.01 * draw.standard_normal(rows.shape)).astype("f4"))
    (reason,) = theirs.wrong()["why"]
    assert reason.startswith("rows are near, ")
    assert "fewer bits" in reason


def test_other_weights_have_no_explanation(theirs: Theirs) -> None:
    draw = np.random.default_rng(4)
    theirs.save("train", np.abs(draw.standard_normal((TRAIN, 16))).astype("f4"))
    found = theirs.wrong()
    assert len(found["different"]) == TRAIN
    assert found["why"] == []


def test_rows_that_were_never_written(theirs: Theirs) -> None:
    rows = theirs.pooled()
    rows[50:] = 0
    rows[7, 2] = np.nan
    theirs.save("train", rows)
    found = theirs.wrong()
    assert found["different"] == [7, *range(50, TRAIN)]
    assert found["why"] == ["11 rows are all 0, or not finite, the first 7"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: np.roll(y, 1), "labels are those of the row before"),
        (lambda y: np.roll(y, -1), "labels are those of the row after"),
        (lambda y: y + 1, "labels are +1 off: they begin at another number"),
        (lambda y: np.array([2, 0, 3, 1])[y], "classes are numbered in another order"),
    ],
)
def test_labels_that_are_shifted(
    theirs: Theirs, change: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    theirs.save("train", theirs.pooled())
    theirs.save("train_labels", change(theirs.labels["train"]))
    found = theirs.wrong()
    assert found["different"] == []
    assert found["why"] == [said]
    assert found["beside"][0].startswith("label: ")


# ---- what is refused -----------------------------------------------------------------------------


def test_rows_of_another_size_name_what_there_is(theirs: Theirs) -> None:
    theirs.save("train", theirs.pooled()[:, :5])
    said = theirs.audit()
    assert said.rc == 2
    assert "a row of --features has 5 values" in said.error
    assert "x_2 (576)" in said.error
    assert "x_2, averaged over all places (16)" in said.error


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no features in files .npy, .npz, .safetensors"),
        ({"train.npy": b""}, "train.npy cannot be read: "),
        ({"train.npz": b"PK\x03\x04 half"}, "train.npz cannot be read: "),
        ({"train.safetensors": b"\x08"}, "train.safetensors cannot be read: "),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(
    theirs: Theirs, files: dict[str, bytes], said: str
) -> None:
    for name, content in files.items():
        (theirs.folder / name).write_bytes(content)
    found = theirs.audit()
    assert found.rc == 4
    assert said in found.error


def test_what_are_no_features_is_said(theirs: Theirs) -> None:
    theirs.save("numbers", np.arange(5))
    said = theirs.audit()
    assert said.rc == 4
    assert "has no features (numbers in numbers.npy is left out: it has no rows" in said.error
    theirs.save("a", np.zeros((5, 3), "f4"))
    theirs.save("b", np.zeros((5, 4), "f4"))
    assert "rows of several shapes (3, 4)" in theirs.audit().error


def test_a_network_without_weights_is_no_measure(theirs: Theirs) -> None:
    theirs.save("train", theirs.pooled())
    text = RECIPE.replace('weights = "net.safetensors"\n', "").replace(
        "net.py:blocks", "torchvision:resnet18"
    )
    (theirs.root / "theirs.toml").write_text(text.replace(f"= {SIDE}", "= 64"))
    said = theirs.audit()
    assert said.rc == 2
    assert "name it with --network and --weights" in said.error
    said = inside(theirs.root, "audit", "--features", "cache", "--network", "net.py:blocks")
    assert said.rc == 2
    assert "--network needs --data" in said.error
