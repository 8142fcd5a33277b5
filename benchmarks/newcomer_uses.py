"""The jobs of `newcomer.py` that are uses: training and weights, Python, and what others read."""

from __future__ import annotations

from functools import partial

from newcomer_user import Job, No, User, needed, write_photos


def pretrained(user: User) -> None:
    """Weights of the whole model, frozen; one probe, and two heads from the cache."""
    weights = "import torch, torchvision; m = torchvision.models.resnet18()\n"
    user.process(["-c", weights + "torch.save(m.state_dict(), 'r18.pth')"], 0)
    write_photos(user, "photos")
    given = ("--network", "torchvision:resnet18", "--weights", "r18.pth", "--frozen", "all")
    user.command("init", "photos", *given)
    user.command("run", "photos.toml")
    user.command("probe", "photos.toml", "--layer", "9")
    user.command("final", "photos.toml", "--vary", "lr=0.01,0.1")
    user.there("features/x_9-*", "runs/photos/0/sweep_final/*")


# ---- training ------------------------------------------------------------------------------------


def settings(user: User, keys: str, mine: str = "") -> None:
    """Keys of the recipe that `init` wrote, perhaps with a file of one's own."""
    write_photos(user, "photos")
    if mine:
        user.file("mine.py", mine)
    user.command("init", "photos")
    user.keys("photos.toml", keys)
    user.command("run", "photos.toml")
    user.there("runs/photos/0/report.json")


FOCAL = """
from torch.nn.functional import cross_entropy

def focal(logits, labels):
    nats = cross_entropy(logits, labels, reduction="none")
    return (1 - (-nats).exp()) ** 2 * nats
"""
COLOURS = """
from torchvision.transforms import v2

colours = v2.ColorJitter(0.4, 0.4, 0.4)
"""
HEAD = """
from torch import nn

def head(shape, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], classes))
"""


# ---- from Python, and for others -----------------------------------------------------------------

LEVEL = """
import strata

run = strata.open_run("runs/photos/0")
level = strata.open_level(run.features(1).levels[0].directory)
print(level.read(0, 4).shape)
with strata.feed(level, batch=8) as batches:
    for x, y in batches:
        print(x.shape, y.shape)
"""
XARRAY = """
import strata
import xarray as xr

ds = xr.open_zarr(strata.open_run("runs/photos/0").features(1).levels[0].directory)
print(dict(ds.x.sizes), ds.label.values[:3])
"""
LOADER = """
import strata
from torch.utils.data import DataLoader

x = strata.open_run("runs/photos/0").features(1)
for features, labels in DataLoader(x.dataset(), batch_size=8, shuffle=True):
    print(features.shape, labels.shape)
"""
LAYER = """
import strata

run = strata.run("photos.toml")
layer = run.network(2)
x = strata.cache(layer, run.features(1).dataset())
print(x.shape)
"""
CACHE = """
import strata
from torch import nn
from torchvision import datasets, models, transforms

photos = datasets.ImageFolder("photos", transforms.ToTensor())
network = models.resnet18()
network.fc = nn.Identity()
x = strata.cache(network, photos)
head = nn.Linear(512, len(photos.classes))
print(strata.solve(head, x, epochs=1))
"""
OUTSIDE = """
import torch

network = torch.export.load("out/model.pt2").module()
print(network(torch.zeros(2, 3, 50, 70, dtype=torch.uint8)).shape)
"""
ONNX = """
import numpy, onnxruntime

session = onnxruntime.InferenceSession("out/model.onnx")
print(session.run(None, {"images": numpy.zeros((2, 3, 50, 70), numpy.uint8)})[0].shape)
"""
NO_STRATA = "import sys\nsys.modules['strata'] = None\n"
"""Written before a script that must do without."""


def trained(user: User) -> None:
    write_photos(user, "photos")
    user.init_and_run("photos", name="photos")


def script(user: User, text: str, shows: str, *packages: str) -> None:
    """A trained run, then a script that must print this."""
    for package in packages:
        needed(package)
    trained(user)
    says(user, text, shows)


def says(user: User, text: str, shows: str, before: str = "") -> None:
    said = user.python(text, before)
    if shows not in said:
        raise No(f"no {shows!r} in {said[-200:]!r}")


def level(user: User) -> None:
    script(user, LEVEL, "torch.Size([8, 8, ")


def by_xarray(user: User) -> None:
    script(user, XARRAY, "'sample': 48", "xarray")


def loader(user: User) -> None:
    script(user, LOADER, "torch.Size([8]")


def layer(user: User) -> None:
    write_photos(user, "photos")
    user.command("init", "photos")
    says(user, LAYER, "(48, 16, ")


def cached(user: User) -> None:
    write_photos(user, "photos")
    says(user, CACHE, "'loss'")


def my_store(user: User) -> None:
    """A module of mine with the name of one of Strata's rooms."""
    write_photos(user, "photos")
    for name in ("store", "stages", "pipeline", "cli"):
        (user.place / f"{name}.py").write_text("raise SystemExit('a module of mine')\n")
    says(user, CACHE, "'loss'")
    trained(user)


def export(user: User) -> None:
    trained(user)
    user.command("export", "photos.toml", "--to", "out")
    says(user, OUTSIDE, "torch.Size([2, 3])", NO_STRATA)


def onnx(user: User) -> None:
    needed("onnxscript"), needed("onnxruntime")
    trained(user)
    user.command("export", "photos.toml", "--to", "out", "--onnx")
    says(user, ONNX, "(2, 3)", NO_STRATA)


def logs(user: User) -> None:
    needed("tensorboard")
    write_photos(user, "photos")
    user.command("init", "photos")
    user.command("run", "photos.toml", "--log-dir", "logs")
    user.there("logs/epochs.csv", "logs/**/events.out.tfevents.*")


def report(user: User) -> None:
    trained(user)
    user.command("report", "photos.toml")
    user.there("runs/photos/0/report.html")


def narrow(user: User) -> None:
    """Tables of four commands at 80 columns."""
    trained(user)
    user.command("sweep", "photos.toml", "--layer", "2", "--vary", "lr=0.01,0.02")
    shown = [user.command(word, "photos.toml") for word in ("plan", "status", "evaluate")]
    shown.append(user.command("du"))
    for line in "".join(shown).splitlines():
        if len(line) > 80 and set(line) & set("│┃━─"):
            raise No(f"{len(line)} columns: {line}")


def audited(user: User) -> None:
    """Features that a script saved, with the network and the images that they should be of."""
    for folder, split in (("photos/train", "train"), ("photos/val", "test")):
        write_photos(user, folder, split)
    (user.place / "cache").mkdir()
    user.process(["-c", THEIRS], 0)
    user.file("net.py", "from torch import nn\n\ndef net():\n    return [nn.Conv2d(3, 8, 3)]\n")
    user.command("init", "photos", "--network", "net.py:net", "--weights", "net.pth")
    user.keys("photos.toml", USUAL)
    user.command("audit", "photos.toml", "--features", "cache")


USUAL = "data.mean = [0.485, 0.456, 0.406]\ndata.std = [0.229, 0.224, 0.225]"
THEIRS = """
import numpy as np, torch
from torchvision import datasets, transforms
from torch import nn

usual = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
photos = datasets.ImageFolder(
    "photos/train", transforms.Compose([transforms.ToTensor(), usual]))
network = nn.Sequential(nn.Conv2d(3, 8, 3))
torch.save(network.state_dict(), "net.pth")
x = torch.stack([x for x, y in photos])
np.save("cache/train.npy", network(x).mean((2, 3)).detach().numpy())
"""

ADAMW = 'schedule.optimizer = "adamw"\nschedule.kind = "cosine"\nschedule.lr = 1e-3'
SMOOTH = "schedule.label_smoothing = 0.1\nschedule.mixup = 0.2"
TRANSFORM = 'augment.views = 2\naugment.transform = "mine.py:colours"'
OWN_HEAD = 'auxiliary.name = "mine.py:head"'
JOBS: tuple[Job, ...] = (
    ("pretrained, frozen: features, probe, heads", "no", pretrained),
    ("AdamW, cosine", "no", partial(settings, keys=ADAMW)),
    ("label smoothing, mixup", "no", partial(settings, keys=SMOOTH)),
    ("focal loss", "no", partial(settings, keys='loss.name = "mine.py:focal"', mine=FOCAL)),
    ("ColorJitter, or own transform", "no", partial(settings, keys=TRANSFORM, mine=COLOURS)),
    (
        "own auxiliary head",
        "no",
        partial(settings, keys=OWN_HEAD, mine=HEAD),
    ),
    ("read a level from Python", "yes", level),
    ("xarray on a level", "no", by_xarray),
    ("torch DataLoader on features", "no", loader),
    ("strata.cache of a torchvision ResNet18, a head", "no", cached),
    ("train a layer from Python, features of it", "no", layer),
    ("import strata beside a store.py of mine", "no", my_store),
    ("export, load without Strata, images of any size", "partly", export),
    ("ONNX, images of any size", "no", onnx),
    ("TensorBoard, CSV", "no", logs),
    ("report page", "yes", report),
    ("tables at 80 columns", "no", narrow),
    ("audit of a cache that a script wrote", "no", audited),
)
