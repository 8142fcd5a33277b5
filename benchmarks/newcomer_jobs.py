"""The jobs of `newcomer.py` that are done by commands: data, networks, training, weights."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from functools import partial

import numpy as np
from newcomer_user import NAMES, Job, No, User, needed, write_photos

# ---- data ----------------------------------------------------------------------------------------


def photos_without_split(user: User) -> None:
    write_photos(user, "photos")
    user.init_and_run("photos", name="photos")


def photos_by_hand(user: User) -> None:
    """A recipe without `init`, which leaves to the data what they say."""
    write_photos(user, "photos")
    user.file("mine.toml", BY_HAND)
    user.command("run", "mine.toml", "--split", "0.2")
    user.there("runs/mine/0/report.json")


BY_HAND = """
[network]
layers = 2
width = 8
[data]
source = "imagefolder:photos"
channels = 3
size = 32
[augment]
crop = 32
views = 0
[auxiliary]
k = 2
width = 8
[schedule]
kind = "cosine"
epochs = 1
batch = 16
lr = 0.05
"""


def photos_with_val(user: User) -> None:
    for folder, split in (("photos/train", "train"), ("photos/val", "test")):
        write_photos(user, folder, split)
    user.init_and_run("photos", name="photos")


def hugging_face(user: User, method: str, path: str) -> None:
    """What this method of a `datasets.Dataset` wrote."""
    datasets = needed("datasets")
    datasets.disable_progress_bars()
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    rows = {"image": list(user.pixels["x_train"]), "label": user.pixels["y_train"]}
    made = datasets.Dataset.from_dict(rows, datasets.Features(columns))
    getattr(made, method)(user.place / path)
    user.init_and_run(f"hf:{path}", name="leaves")


def table_of_paths(user: User) -> None:
    with (user.place / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *write_photos(user, "jpegs")])
    user.init_and_run("csv:photos.csv", name="photos")


def webdataset(user: User) -> None:
    with tarfile.open(user.place / "train-000.tar", "w") as tar:
        for i, (path, name) in enumerate(write_photos(user, "jpegs")):
            tar.add(user.place / path, f"{i:04}.jpg")
            label = str(NAMES.index(name)).encode()
            member = tarfile.TarInfo(f"{i:04}.cls")
            member.size = len(label)
            tar.addfile(member, io.BytesIO(label))
    user.init_and_run("webdataset:train-*.tar", "--to", "tars.toml", name="tars")


def data_set_class(user: User) -> None:
    write_photos(user, "photos")
    user.file("mydata.py", DATA_SET_CLASS)
    user.init_and_run("python:mydata.py:make", name="mydata")


DATA_SET_CLASS = """
from pathlib import Path
from PIL import Image

class Photos:
    def __init__(self, folder):
        self.files = sorted(Path(folder).glob("*/*.jpg"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return Image.open(self.files[i]), self.files[i].parent.name

def make():
    return Photos("photos")
"""


def pair_of_npy(user: User) -> None:
    (user.place / "arrays").mkdir()
    np.save(user.place / "arrays/x.npy", user.pixels["x_train"])
    np.save(user.place / "arrays/y.npy", user.pixels["y_train"])
    user.init_and_run("npz:arrays", name="arrays")


def arrays(
    user: User,
    x: Callable[[np.ndarray], np.ndarray] = np.asarray,
    y: Callable[[np.ndarray], np.ndarray] = np.asarray,
    metric: str = "top1",
) -> None:
    """Pixels as another kind of sample, with another kind of label, in one `.npz`, not divided."""
    made = {"x": x(user.pixels["x_train"]), "y": y(user.pixels["y_train"])}
    np.savez(user.place / "mine.npz", **made)
    user.init_and_run("mine.npz", name="mine")
    report = json.loads((user.place / "runs/mine/0/report.json").read_text("utf-8"))
    if report["layers"][-1]["test"].get(metric) is None:
        raise No(f"no {metric} among {', '.join(report['layers'][-1]['test'])}")


def floats(x: np.ndarray) -> np.ndarray:
    return (x / 255).astype(np.float32)


def twelve(x: np.ndarray) -> np.ndarray:
    return np.tile(x, 4).astype(np.uint16) * 257


def series(x: np.ndarray) -> np.ndarray:
    return floats(x[:, 16]).swapaxes(1, 2)


def volumes(x: np.ndarray) -> np.ndarray:
    return floats(x[:, ::2, ::2]).reshape(len(x), 1, 16, 16, 3)[..., [0, 1, 2, 0]]


def several(y: np.ndarray) -> np.ndarray:
    return np.stack([y == 0, y != 1, y == 2], 1).astype(np.float32)


def one_hot(y: np.ndarray) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[y]


# ---- networks ------------------------------------------------------------------------------------


def network(user: User, text: str, name: str = "net.py:net") -> None:
    """A network of the user's own, as a file."""
    write_photos(user, "photos")
    user.file("net.py", text)
    user.init_and_run("photos", "--network", name, "--to", "own.toml", name="own")


SEQUENTIAL = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
"""
TOKENS = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 16, 8, 8)

    def forward(self, x):
        return self.cut(x).flatten(2).transpose(1, 2)

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(scaled_dot_product_attention(q, k, v))

def net():
    return [Patches(), Attention(), Attention()]
"""
UNET = """
import torch
from torch import nn
from torch.nn.functional import interpolate, max_pool2d

def conv(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())

class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.mid = conv(3, 4), conv(4, 8), conv(8, 8)
        self.up_two, self.up_one, self.out = conv(16, 4), conv(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        one = self.one(x)
        two = self.two(max_pool2d(one, 2))
        y = interpolate(self.mid(max_pool2d(two, 2)), scale_factor=2.0)
        y = interpolate(self.up_two(torch.cat([y, two], 1)), scale_factor=2.0)
        return self.out(self.up_one(torch.cat([y, one], 1)))
"""
MLP = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
                         nn.Linear(32, 3))
"""


def unet(user: User) -> str:
    write_photos(user, "photos")
    user.file("net.py", UNET)
    words = ("init", "photos", "--network", "net.py:UNet")
    return user.refused(*words, rc=3, because="its skip connection crosses")


def vectors(user: User) -> None:
    x = floats(user.pixels["x_train"])[:, ::4, ::4].reshape(-1, 192)
    np.savez(user.place / "mine.npz", x=x, y=user.pixels["y_train"])
    user.file("net.py", MLP)
    user.init_and_run("mine.npz", "--network", "net.py:net", name="mine")


def named(user: User, network: str, blocks: int) -> None:
    """A model of a library as it is: its recipe, and its plan."""
    needed(network.split(":")[0])
    write_photos(user, "photos")
    user.command("init", "photos", "--network", network)
    said = user.command("plan", "photos.toml")
    if f"has {blocks} blocks, each a layer" not in " ".join(said.split()):
        raise No(f"not {blocks} blocks: {said[:200]}")


def trained(user: User) -> None:
    """ResNet18 as it is, every layer trained."""
    write_photos(user, "photos")
    user.init_and_run("photos", "--network", "torchvision:resnet18", name="photos")


AS_THEY_ARE = (
    ("VGG11", "yes", "torchvision:vgg11", 8),
    ("MobileNetV2", "yes", "torchvision:mobilenet_v2", 19),
    ("EfficientNet-B0", "argument", "torchvision:efficientnet_b0", 18),
    ("ConvNeXt-tiny", "argument", "torchvision:convnext_tiny", 22),
    ("ViT-B/16", "no", "torchvision:vit_b_16", 13),
    ("Swin-T", "no", "torchvision:swin_t", 16),
    ("timm ViT", "no", "timm:vit_tiny_patch16_224", 13),
    ("a whole timm model, ResNet18", "no", "timm:resnet18", 9),
)
"""Models of libraries, and how many blocks docs/networks.md says that they are cut into."""
JOBS: tuple[Job, ...] = (
    ("photos in one folder, no split", "no", photos_without_split),
    ("photos with train/ and val/", "yes", photos_with_val),
    ("photos, a recipe by hand, without counts", "no", photos_by_hand),
    ("npz with x and y, uint8 images", "no", arrays),
    (".npy files in a folder", "no", pair_of_npy),
    ("a Dataset class", "no", data_set_class),
    ("Hugging Face directory", "no", partial(hugging_face, method="save_to_disk", path="leaves")),
    ("parquet", "no", partial(hugging_face, method="to_parquet", path="leaves.parquet")),
    ("CSV of paths and labels", "no", table_of_paths),
    ("WebDataset tar", "no", webdataset),
    ("float32 images", "no", partial(arrays, x=floats)),
    ("12 channels, uint16", "no", partial(arrays, x=twelve)),
    ("1-D signals", "no", partial(arrays, x=series)),
    ("3-D volumes", "no", partial(arrays, x=volumes)),
    ("multi-label", "no", partial(arrays, y=several, metric="map")),
    ("one-hot labels", "no", partial(arrays, y=one_hot, metric="top1")),
    ("regression", "no", partial(arrays, y=np.sqrt, metric="r2")),
    ("a plain nn.Sequential", "partly", partial(network, text=SEQUENTIAL)),
    ("blocks of tokens with attention", "no", partial(network, text=TOKENS)),
    ("MLP on vectors", "no", vectors),
    ("U-Net", "refused", unet),
    ("ResNet18, trained", "yes", trained),
    *(
        (f"{title} (plan)", before, partial(named, network=name, blocks=blocks))
        for title, before, name, blocks in AS_THEY_ARE
    ),
)
