"""A small run inside the test's process: a session on the digits, with any recipe text."""

from pathlib import Path

import torch

from pipeline import rundir
from pipeline.ingest import ensure_images
from pipeline.session import Session
from store.feature_store import Store

TINY = """
[data]
source = "digits"
classes = 10
channels = 1
size = 8
mean = [0.3]
std = [0.4]
train = 1437
test = 360
[augment]
pad = 2
crop = 8
flip = {flip}
views = {views}
[network]
layers = {layers}
width = 8
downsample = {downsample}
batch_norm = true
bias = false
[auxiliary]
k = 2
width = 8
batch_norm = true
[schedule]
kind = "one-cycle"
epochs = {epochs}
batch = 64
lr = 0.1
keep = "{keep}"
precision = "float32"
[cache]
precision = "{precision}"
shard_mb = 1
block = 64
"""

DEFAULTS = {
    "flip": "true",
    "views": '"canvas"',
    "layers": 3,
    "downsample": "[1]",
    "epochs": 2,
    "keep": "last",
    "precision": "float16",
}


def tiny(**changes: object) -> str:
    """TOML of a tiny recipe."""
    return TINY.format(**{**DEFAULTS, **changes})


def open_run(place: Path, text: str, *, device: str = "cpu", compute: str = "float32") -> Session:
    """A session with x_0 written."""
    directory = place / "run"
    run = rundir.find(directory)
    if run is None:
        facts = {"compute": compute, "device": device, "machine": {}, "versions": {}}
        run = rundir.create(directory, "tiny", text, 0, None, facts)
    session = Session(run, Store(place / "store"), torch.device(device))
    ensure_images(session)
    return session
