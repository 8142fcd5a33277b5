"""`strata.cache` beside what people write by hand: five lines, one pass, killed and resumed.

Claim: features of a torchvision ResNet-18 for 2,000 JPEGs take five lines; the second call takes
less than a second, in a process of its own; a first call that is killed half-way and called again
ends at the same bytes; first call and ten epochs of a linear head from it are faster than the same
loop with a forward pass in each epoch, by at least what `plan` says, and no slower than a script
with np.save and np.load.

Method: images of CIFAR-10 (JPEG) are enlarged to 256 pixels and written as JPEG into class folders;
a transform cuts them to 112. Random weights; nothing is downloaded. Every job is a process of its
own, which times its parts after its imports; the jobs take turns, `--rounds` times, and medians are
compared. Rates that `plan` goes by are of this machine, by `calibrate`. What `plan` expects leaves
the decoding of images out, since a run decodes them once.

    STRATA_TEST_DATA=… python benchmarks/cache_api.py [--quick] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cifar_images import images
from measuring import RESULTS, keep, strata
from PIL import Image

import checkout  # noqa: F401

SIZE, SIDE, BATCH = 256, 112, 128
DATA = """
import time, numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms
import strata
torch.manual_seed(0)
EPOCHS, BATCH, SIDE = {epochs}, {batch}, {side}
cut = transforms.Compose([transforms.CenterCrop(SIDE), transforms.ToTensor()])
photos = datasets.ImageFolder("photos", cut)
network = models.resnet18()
network.fc = nn.Identity()
head = nn.Linear(512, len(photos.classes))
optimiser = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
def step(x, y):
    optimiser.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(head(x), y)
    loss.backward()
    optimiser.step()
cache = strata.cache  # imported as the others are, before the clock begins
begun = time.perf_counter()
"""
"""What every job begins with: the caller's own data set, network and step."""
CACHE = 'x = cache(network, photos, "store", progress=False)\n'
WRITTEN = "written = time.perf_counter()\n"
JOBS = {
    "feed": CACHE
    + WRITTEN
    + """
with x.feed(BATCH) as batches:
    for epoch in range(EPOCHS):
        for a, y in batches:
            step(a, y)
""",
    "loader": CACHE
    + WRITTEN
    + """
for epoch in range(EPOCHS):
    for a, y in DataLoader(x.dataset(), batch_size=BATCH, shuffle=True):
        step(a, y)
""",
    "forward": WRITTEN
    + """
network.eval()
for epoch in range(EPOCHS):
    for images, y in DataLoader(photos, batch_size=BATCH, shuffle=True):
        with torch.no_grad():
            a = network(images)
        step(a, y)
""",
    "numpy": """
network.eval()
features, labels = [], []
with torch.no_grad():
    for images, y in DataLoader(photos, batch_size=BATCH):
        features.append(network(images).numpy())
        labels.append(y.numpy())
np.save("features.npy", np.concatenate(features))
np.save("labels.npy", np.concatenate(labels))
"""
    + WRITTEN
    + """
features, labels = np.load("features.npy"), np.load("labels.npy")
for epoch in range(EPOCHS):
    for rows in np.array_split(np.random.permutation(len(labels)), -(-len(labels) // BATCH)):
        step(torch.from_numpy(features[rows]), torch.from_numpy(labels[rows]))
""",
    "cache": CACHE + WRITTEN,
}
TOLD = """
print("done", written - begun, time.perf_counter() - written)
"""
LINES = """import strata
network.fc = nn.Identity()
x = strata.cache(network, photos)
head = nn.Linear(512, len(photos.classes))
strata.solve(head, x, epochs=10)
"""
RECIPE = """
network = {{ name = "torchvision:resnet18", frozen = "all" }}
[data]
source = "npz:{images}"
classes = 10
channels = 3
size = {side}
mean = [0.0, 0.0, 0.0]
std = [1.0, 1.0, 1.0]
train = {count}
test = 10
[augment]
crop = {side}
views = 1
[auxiliary]
k = 1
[schedule]
kind = "one-cycle"
epochs = {epochs}
batch = {batch}
lr = 0.05
precision = "float32"
"""


def photos(place: Path, count: int) -> Path:
    """JPEGs in class folders."""
    with np.load(images(place, count, 10)) as arrays:
        pixels, labels = arrays["x_train"], arrays["y_train"]
    for i, (pixel, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = place / f"photos/{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image, data = (
            Image.fromarray(pixel).resize((SIZE, SIZE), Image.Resampling.BICUBIC),
            io.BytesIO(),
        )
        image.save(data, "jpeg", quality=90)
        (folder / f"{i:05d}.jpg").write_bytes(data.getvalue())
    return place / "photos"


def job(place: Path, name: str, settings: dict[str, int]) -> subprocess.Popen[str]:
    code = DATA.format(**settings) + JOBS[name] + TOLD
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], cwd=place, stdout=subprocess.PIPE, text=True
    )


def timed(place: Path, name: str, settings: dict[str, int]) -> dict[str, float]:
    """Seconds of writing, and of the epochs."""
    with job(place, name, settings) as process:
        said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{name} failed")
    write, epochs = map(float, said.split()[1:])
    return {"write": write, "epochs": epochs}


def shards(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.glob("x_*/*/x/c.*")}


def emptied(store: Path) -> None:
    subprocess.run(["rm", "-rf", str(store)], check=True)


def killed(place: Path, settings: dict[str, int]) -> dict[str, Any]:
    """A call that is killed half-way, and called again; a store of a whole call is there."""
    store, whole = place / "store", shards(place / "store")
    emptied(store)
    with job(place, "cache", settings) as process:
        while len(there := list(store.glob("x_*/*/receipts/*.json"))) < len(whole) // 2:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    again = timed(place, "cache", settings)
    same = shards(store) == whole
    return {"shards": len(whole), "kept": len(there), "seconds_again": again["write"], "same": same}


def planned(place: Path, count: int, settings: dict[str, int]) -> dict[str, float]:
    """How much faster `plan` says that ten epochs are, writing included."""
    path = place / "plan.toml"
    path.write_text(RECIPE.format(images=images(place, count, 10), count=count, **settings))
    strata(place, "calibrate", path)
    reuse = strata(place, "plan", path)["economics"]["reuse"]
    epochs = settings["epochs"]
    keeping = reuse["write"] + epochs * reuse["read"]
    return {
        **{k: reuse[k] for k in ("write", "read", "again")},
        "ratio": epochs * reuse["again"] / keeping,
    }


def measure(place: Path, *, quick: bool, rounds: int) -> dict[str, Any]:
    count, epochs = (200, 3) if quick else (2000, 10)
    settings = {"epochs": epochs, "batch": BATCH, "side": 64 if quick else SIDE}
    photos(place, count)
    seconds: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name in ("feed", "cache", "loader", "forward", "numpy"):
            if name == "feed":
                emptied(place / "store")
            seconds.setdefault(name, []).append(timed(place, name, settings))
    medians = {
        name: {part: statistics.median(one[part] for one in each) for part in each[0]}
        for name, each in seconds.items()
    }
    total = {name: sum(medians[name].values()) for name in ("feed", "forward", "numpy")}
    loader = medians["feed"]["write"] + medians["loader"]["epochs"]
    return {
        "photos": count,
        "epochs": epochs,
        "rounds": rounds,
        "lines": len(LINES.splitlines()),
        "seconds": seconds,
        "first_call": medians["feed"]["write"],
        "second_call": medians["cache"]["write"],
        "epochs_from": {n: medians[n]["epochs"] for n in ("feed", "loader", "forward", "numpy")},
        "total": total | {"loader": loader},
        "faster_than_forward": total["forward"] / total["feed"],
        "of_numpy": total["feed"] / total["numpy"],
        "killed": killed(place, settings),
        "planned": planned(place, count, settings),
    }


def holds(found: dict[str, Any]) -> dict[str, bool]:
    return {
        "lines": found["lines"] <= 5,
        "second_call": found["second_call"] < 1.0,
        "same_bytes": found["killed"]["same"],
        "faster_than_forward": found["faster_than_forward"] >= found["planned"]["ratio"],
        "no_slower_than_numpy": found["of_numpy"] <= 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cache_api.json")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(prefix="cache-api-", dir=Path.cwd()) as place:
        found = measure(Path(place), quick=options.quick, rounds=rounds)
    found["holds"] = holds(found)
    keep(found, options.out, show=True)


if __name__ == "__main__":
    main()
